"""What the trackers of both engines have in common: TensorBoard, Weights & Biases and MLflow.

In: a plan with `log`. Out: what is asked for, what is missing, where it goes. Files go to <run directory>/trackers. The step
lines of the log stay the source of every result.

Weights & Biases and MLflow get their addresses and keys from the environment: WANDB_MODE, WANDB_API_KEY, WANDB_BASE_URL,
MLFLOW_TRACKING_URI and so on. Without a key or a network, they write files, which `wandb sync` and `mlflow ui` read.

An attempt that goes on with a run goes on with its curves.
"""

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


def run_name(folder: Path) -> str:
    """The run's name: <experiment>_<id>, the folder around the run directory. `folder` is the trackers'."""
    return folder.parent.parent.name


def mlflow_address(folder: Path) -> str:
    """The server of MLflow, or a file."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder}/mlflow.db"


def tell(plan: Plan, folder: Path) -> str:
    """Say where each tracker writes, and make the folder. Returns why Weights & Biases is offline; "" if it is not."""
    names, reason = asked(plan), offline() if "wandb" in asked(plan) else ""
    if os.environ.get("RANK", "0") == "0":
        folder.mkdir(parents=True, exist_ok=True)
    if "tensorboard" in names:
        say(f"TensorBoard: tensorboard --logdir {folder / 'tensorboard'}")
    if "wandb" in names:
        how = f"offline, because {reason}: wandb sync {folder}/wandb/offline-run-*" if reason else "online"
        say(f"Weights & Biases: {how}")
    if "mlflow" in names:
        by_hand = f"mlflow ui --backend-store-uri {mlflow_address(folder)}"
        say(f"MLflow: {'the server of MLFLOW_TRACKING_URI' if os.environ.get('MLFLOW_TRACKING_URI') else by_hand}")
    return reason


def offline() -> str:
    """Why Weights & Biases writes only files; "" if it sends them. WANDB_MODE decides, if it is set."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return "" if mode == "online" else f"WANDB_MODE is {mode}"
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or WANDB)
    if not os.environ.get("WANDB_API_KEY") and not _has_login(host.hostname or ""):
        return "there is no WANDB_API_KEY"
    if _writes():
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


def _writes() -> bool:
    """Whether trackers can be written on this rank: on the first one with NeMo, on the last one with Megatron-Bridge."""
    return int(os.environ.get("RANK", "0")) in (0, int(os.environ.get("WORLD_SIZE", "1")) - 1)
