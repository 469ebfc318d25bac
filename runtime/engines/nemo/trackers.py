"""Send the metrics of a NeMo training to TensorBoard, Weights & Biases or MLflow, with the loggers of Lightning.

In: a recipe, and a plan with `log`. Out: the recipe with loggers. Lightning calls them on rank 0 alone.
"""

import importlib
from pathlib import Path
from typing import Any

from runtime.engines.trackers import asked, mlflow_address, run_name, tell

Plan = dict[str, Any]
# Packages that would be imported late (imports.py): Lightning compares their classes.
IMPORTED = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def before_imports(plan: Plan) -> None:
    """Import what must not be deferred. Call it before `imports.defer`."""
    for name in asked(plan):
        if name in IMPORTED:
            importlib.import_module(IMPORTED[name])


def add(recipe: Any, plan: Plan, directory: Path, step: int) -> None:
    """Add the loggers. `directory` is the run directory, `step` the number of steps that earlier attempts made and saved."""
    folder = directory / "trackers"
    offline = bool(tell(plan, folder))
    make = {
        "tensorboard": lambda: _tensorboard(folder, step),
        "wandb": lambda: _wandb(folder, plan["log"]["wandb"]["project"], offline),
        "mlflow": lambda: _mlflow(folder, plan["log"]["mlflow"]["experiment"]),
    }
    recipe.trainer.logger = [make[name]() for name in asked(plan)]
    recipe.log.update_logger_directory = False


def _tensorboard(folder: Path, step: int) -> Any:
    import nemo_run as run
    from lightning.pytorch.loggers import TensorBoardLogger

    # what an attempt before has written after its last checkpoint does not count
    return run.Config(TensorBoardLogger, save_dir=str(folder), name="tensorboard", version="", purge_step=step or None)


def _wandb(folder: Path, project: str, offline: bool) -> Any:
    import nemo_run as run
    from lightning.pytorch.loggers import WandbLogger

    mode = {"offline": True} if offline else {}
    name = run_name(folder)
    return run.Config(WandbLogger, save_dir=str(folder), project=project, name=name, id=name, resume="allow", **mode)


def _mlflow(folder: Path, experiment: str) -> Any:
    import nemo_run as run

    from runtime.engines.nemo.mlflow_run import ContinuedRun

    return run.Config(
        ContinuedRun,
        id_file=str(folder / "mlflow_run_id"),
        experiment_name=experiment,
        run_name=run_name(folder),
        tracking_uri=mlflow_address(folder),
    )
