"""Tell the telemetry of this node when steps of a NeMo training end, with a Lightning callback.

In: a recipe. Out: the recipe with the callback.

This module imports Lightning, so only a training imports it.
"""

from typing import Any

import nemo_run as run
from lightning.pytorch.callbacks import Callback

from runtime.node import telemetry


def add(recipe: Any) -> None:
    """Add the callback, if this process has a sampler."""
    if telemetry.is_on():
        recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), run.Config(TellSteps)]


class TellSteps(Callback):  # type: ignore[misc]
    """Tells the sampler which step ends."""

    def on_train_batch_start(self, trainer: Any, *_args: Any) -> None:
        """Before a step."""
        telemetry.before_step(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_args: Any) -> None:
        """After a step, which Lightning has already counted."""
        telemetry.after_step(trainer.global_step - 1)
