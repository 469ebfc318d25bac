"""Profile steps of a NeMo training, with a Lightning callback.

In: a recipe and a plan. Out: the recipe with the callback.

This module imports Lightning, so only a training imports it.
"""

from typing import Any

import nemo_run as run
from lightning.pytorch.callbacks import Callback

from runtime.job import profile
from runtime.job.profiler import Profiler

Plan = dict[str, Any]


def add(recipe: Any, plan: Plan) -> None:
    """Add the callback, if the plan profiles this rank."""
    if profile.wanted(plan):
        callback = run.Config(ProfileSteps, *profile.arguments(plan))
        recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), callback]


class ProfileSteps(Callback):  # type: ignore[misc]
    """Tells the profiler which step begins and ends."""

    def __init__(self, tool: str, first_step: int, last_step: int, file: str) -> None:
        self.profiler = Profiler(tool, first_step, last_step, file)

    def on_train_batch_start(self, trainer: Any, *_args: Any) -> None:
        """Before a step."""
        self.profiler.before_step(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_args: Any) -> None:
        """After a step, which Lightning has already counted."""
        self.profiler.after_step(trainer.global_step - 1)
