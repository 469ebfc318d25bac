"""Send the metrics of a training with Megatron-Bridge to TensorBoard, Weights & Biases or MLflow.

In: a plan with `log`, the run directory. Out: a callback. The metrics have the names that they have with NeMo, so that the
curves of both engines lie over each other.

Megatron-Bridge's own loggers are not used: they have other names, begin a new run of MLflow in each attempt, and register
each checkpoint by the path of its staging folder.

This module imports Megatron-Bridge, so only a training imports it.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.bridge.training.callbacks import Callback

from runtime.engines import trackers
from runtime.engines.megatron_bridge.writers import Metrics, Mlflow, TensorBoard, Wandb, Writer

Plan = dict[str, Any]
LOSS = "lm loss"


class Track(Callback):  # type: ignore[misc]
    """Writes the metrics of each step and each validation, on the last rank, which has the loss."""

    def __init__(self, plan: Plan, directory: Path, step: int) -> None:
        """`directory` is the run directory, `step` the number of steps that earlier attempts made and saved."""
        folder = directory / "trackers"
        offline = bool(trackers.tell(plan, folder))
        make: dict[str, Callable[[], Writer]] = {
            "tensorboard": lambda: TensorBoard(folder, step),
            "wandb": lambda: Wandb(folder, plan["log"]["wandb"]["project"], offline),
            "mlflow": lambda: Mlflow(folder, plan["log"]["mlflow"]["experiment"]),
        }
        has_loss = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        self.writers: list[Writer] = [make[name]() for name in trackers.asked(plan)] if has_loss else []
        self.rate, self.began = 0.0, 0.0

    def on_train_step_start(self, context: Any) -> None:
        """Note the time, and the learning rate of this step: at its end, the optimizer has that of the next one."""
        self.rate, self.began = context.optimizer.param_groups[0]["lr"], time.monotonic()

    def on_train_step_end(self, context: Any) -> None:
        """Write the metrics of the step."""
        if self.writers:
            metrics = {"reduced_train_loss": float(context.loss_dict[LOSS]), "lr": self.rate}
            metrics |= {"train_step_timing in s": time.monotonic() - self.began}
            metrics |= {} if context.grad_norm is None else {"grad_norm": float(context.grad_norm)}
            self._log(metrics, context.state.train_state.step)

    def on_eval_end(self, context: Any) -> None:
        """Write the loss of the validation, at the step before it."""
        if self.writers:
            self._log({"val_loss": float(context.total_loss_dict[LOSS])}, context.state.train_state.step - 1)

    def on_train_end(self, _context: Any) -> None:
        """Write all that is left."""
        for writer in self.writers:
            writer.close()

    def _log(self, metrics: Metrics, step: int) -> None:
        for writer in self.writers:
            writer.log(metrics, step)
