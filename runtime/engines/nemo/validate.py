"""Compute the loss of the held-out examples while a training runs.

In: a recipe, a plan with `validation`. Out: the recipe, which validates every N steps and after the last one; a line in
the log for each validation.

NeMo leaves out what does not fill a global batch. The line says how many sequences counted.

This module imports Lightning, so only a training imports it.
"""

import time
from typing import Any

import nemo_run as run
from lightning.pytorch.callbacks import Callback

from runtime.job.progress import say

Plan = dict[str, Any]


def add(recipe: Any, plan: Plan) -> None:
    """Switch validation on. It does not change what is trained: no random number and no sample is used up."""
    trainer = recipe.trainer
    trainer.limit_val_batches = 1.0
    trainer.num_sanity_val_steps = 0
    trainer.val_check_interval = plan["validation"]["every_steps"]
    trainer.check_val_every_n_epoch = None  # the interval counts steps of the whole run, not of an epoch
    trainer.callbacks = [*(trainer.callbacks or []), run.Config(Validate, plan["global_batch_size"])]


class Validate(Callback):  # type: ignore[misc]
    """Validates after the last step, and writes a line for each validation."""

    def __init__(self, global_batch_size: int) -> None:
        self.global_batch_size = global_batch_size
        self.began = 0.0
        self.batches = 0

    def on_train_batch_end(self, trainer: Any, *_args: Any) -> None:
        """After the last step, Lightning validates if it is told to stop."""
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True

    def on_validation_start(self, *_args: Any) -> None:
        """Note the time."""
        self.began, self.batches = time.monotonic(), 0

    def on_validation_batch_end(self, *_args: Any) -> None:
        """Count a global batch."""
        self.batches += 1

    def on_validation_end(self, trainer: Any, *_args: Any) -> None:
        """Write the loss, with all its digits."""
        loss, took_s = float(trainer.callback_metrics["val_loss"]), time.monotonic() - self.began
        counted = f"{self.batches * self.global_batch_size} sequences"
        say(f"validation after step {trainer.global_step}: loss {loss:.7g} over {counted} in {took_s:.2f} s")
