"""Profile steps of a training with Megatron-Bridge, with one of its callbacks.

In: a plan. Out: callbacks.

This module imports Megatron-Bridge, so only a training imports it.
"""

from typing import Any

from megatron.bridge.training.callbacks import Callback

from runtime.job import profile
from runtime.job.profiler import Profiler

Plan = dict[str, Any]


def callbacks(plan: Plan) -> list[Any]:
    """A callback, if the plan profiles this rank."""
    return [ProfileSteps(*profile.arguments(plan))] if profile.wanted(plan) else []


class ProfileSteps(Callback):  # type: ignore[misc]
    """Tells the profiler which step begins and ends."""

    def __init__(self, tool: str, first_step: int, last_step: int, file: str) -> None:
        self.profiler = Profiler(tool, first_step, last_step, file)
        self.step = 0

    def on_train_step_start(self, _context: Any) -> None:
        """Before a step."""
        self.profiler.before_step(self.step)

    def on_train_step_end(self, _context: Any) -> None:
        """After a step."""
        self.profiler.after_step(self.step)
        self.step += 1
