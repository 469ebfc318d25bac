"""Send the metrics of a training to TensorBoard, Weights & Biases or MLflow, with the loggers of Lightning.

In: a recipe, and a plan with `log`. Out: the recipe with loggers. Files go to <run directory>/trackers. The step lines of
the log stay the source of every result.

Weights & Biases and MLflow get their addresses and keys from the environment: WANDB_MODE, WANDB_API_KEY, WANDB_BASE_URL,
MLFLOW_TRACKING_URI and so on. Without a key or a network, they write files, which `wandb sync` and `mlflow ui` read.

Lightning calls the loggers on rank 0 alone. An attempt that goes on with a run goes on with its curves.
"""

import importlib
import netrc
import os
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from runtime.job.progress import say

Plan = dict[str, Any]
# The key of the plan, and the packages that its logger needs, with their names on PyPI.
PACKAGES = {
    "tensorboard": {"tensorboard": "tensorboard"},
    "wandb": {"wandb": "wandb"},
    "mlflow": {"mlflow": "mlflow"},
}
# Packages that would be imported late (imports.py): Lightning compares their classes.
IMPORTED = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
WANDB = "https://api.wandb.ai"
ANSWER_S = 5.0  # longest wait for a connection


def asked(plan: Plan) -> list[str]:
    """The trackers of the plan."""
    return [name for name in PACKAGES if (plan.get("log") or {}).get(name)]


def missing(plan: Plan) -> Iterator[tuple[str, str]]:
    """A tracker of the plan and the package that it lacks."""
    for name in asked(plan):
        for package, published in PACKAGES[name].items():
            if not find_spec(package):
                yield name, published


def before_imports(plan: Plan) -> None:
    """Import what must not be deferred. Call it before `imports.defer`."""
    for name in asked(plan):
        if name in IMPORTED:
            importlib.import_module(IMPORTED[name])


def add(recipe: Any, plan: Plan, directory: Path, step: int) -> None:
    """Add the loggers. `directory` is the run directory, `step` the number of steps that earlier attempts made and saved."""
    make = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    folder = directory / "trackers"
    recipe.trainer.logger = [make[name](plan, folder, step) for name in asked(plan)]
    recipe.log.update_logger_directory = False


def _tensorboard(_plan: Plan, folder: Path, step: int) -> Any:
    import nemo_run as run
    from lightning.pytorch.loggers import TensorBoardLogger

    say(f"TensorBoard: tensorboard --logdir {folder / 'tensorboard'}")
    # what an attempt before has written after its last checkpoint does not count
    return run.Config(TensorBoardLogger, save_dir=str(folder), name="tensorboard", version="", purge_step=step or None)


def _wandb(plan: Plan, folder: Path, _step: int) -> Any:
    import nemo_run as run
    from lightning.pytorch.loggers import WandbLogger

    reason = offline()
    say(
        f"Weights & Biases: offline, because {reason}: wandb sync {folder}/wandb/offline-run-*"
        if reason
        else "Weights & Biases: online"
    )
    if _rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    mode = {"offline": True} if reason else {}
    return run.Config(
        WandbLogger,
        save_dir=str(folder),
        project=plan["log"]["wandb"]["project"],
        name=_run(folder),
        id=_run(folder),
        resume="allow",
        **mode,
    )


def _mlflow(plan: Plan, folder: Path, _step: int) -> Any:
    import nemo_run as run
    from lightning.pytorch.loggers import MLFlowLogger

    address = os.environ.get("MLFLOW_TRACKING_URI") or f"file:{folder / 'mlruns'}"
    say(
        "MLflow: the server of MLFLOW_TRACKING_URI"
        if os.environ.get("MLFLOW_TRACKING_URI")
        else f"MLflow: mlflow ui --backend-store-uri {address}"
    )
    return run.Config(
        MLFlowLogger, experiment_name=plan["log"]["mlflow"]["experiment"], run_name=_run(folder), tracking_uri=address
    )


def offline() -> str:
    """Why Weights & Biases writes only files; "" if it sends them. WANDB_MODE decides, if it is set."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return "" if mode == "online" else f"WANDB_MODE is {mode}"
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or WANDB)
    if not os.environ.get("WANDB_API_KEY") and not _has_login(host.hostname or ""):
        return "there is no WANDB_API_KEY"
    if _rank() == 0:
        try:
            socket.create_connection(
                (host.hostname or "", host.port or (443 if host.scheme == "https" else 80)), ANSWER_S
            ).close()
        except OSError:
            return f"{host.hostname} cannot be reached"
    return ""


def _has_login(host: str) -> bool:
    """Whether `wandb login` has written a key for the host."""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run(folder: Path) -> str:
    """The run's name: <experiment>_<id>, the folder around the run directory."""
    return folder.parent.parent.name


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
