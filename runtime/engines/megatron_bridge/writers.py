"""Write metrics with the libraries of the trackers themselves: TensorBoard, Weights & Biases, MLflow.

In: metrics by name, and the step. Out: files, or what the libraries send.

A writer that begins again in the same folder goes on with the run of the earlier attempt.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from runtime.engines import trackers

Metrics = Mapping[str, float]


class Writer(Protocol):
    """Where metrics go."""

    def log(self, metrics: Metrics, step: int) -> None:
        """Write the metrics of a step, counted from 0."""

    def close(self) -> None:
        """Write all that is left."""


class TensorBoard:
    """Files for TensorBoard."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what an attempt before has written after its last checkpoint does not count
        self.writer = SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=step or None)

    def log(self, metrics: Metrics, step: int) -> None:
        """Write the metrics of a step."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write all that is left."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, folder: Path, project: str, offline: bool) -> None:
        import wandb

        name = trackers.run_name(folder)
        options: dict[str, Any] = {"mode": "offline"} if offline else {}
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(dir=str(folder), project=project, name=name, id=name, resume="allow", **options)

    def log(self, metrics: Metrics, step: int) -> None:
        """Write the metrics of a step. `trainer/global_step` is the step's name in Lightning's logger."""
        self.run.log({**metrics, "trainer/global_step": step})

    def close(self) -> None:
        """Write all that is left."""
        self.run.finish()


class Mlflow:
    """One run of MLflow for all attempts."""

    def __init__(self, folder: Path, experiment: str) -> None:
        from mlflow import MlflowClient

        folder.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(trackers.mlflow_address(folder))
        file = folder / "mlflow_run_id"
        if not file.is_file():
            known = self.client.get_experiment_by_name(experiment)
            number = known.experiment_id if known else self.client.create_experiment(experiment)
            made = self.client.create_run(number, run_name=trackers.run_name(folder))
            file.write_text(made.info.run_id, encoding="utf-8")
        self.id = file.read_text(encoding="utf-8")

    def log(self, metrics: Metrics, step: int) -> None:
        """Write the metrics of a step."""
        for name, value in metrics.items():
            self.client.log_metric(self.id, name, value, step=step)

    def close(self) -> None:
        """Say that the run has ended."""
        self.client.set_terminated(self.id)
