"""Tell the telemetry of this node when steps of a training with Megatron-Bridge end, with one of its callbacks.

In: the first step of the attempt. Out: callbacks.

This module imports Megatron-Bridge, so only a training imports it.
"""

from typing import Any

from megatron.bridge.training.callbacks import Callback

from runtime.node import telemetry


def callbacks(first: int) -> list[Any]:
    """A callback, if this process has a sampler."""
    return [TellSteps(first)] if telemetry.is_on() else []


class TellSteps(Callback):  # type: ignore[misc]
    """Tells the sampler which step ends, counted from 0 and on from a checkpoint."""

    def __init__(self, first: int) -> None:
        self.step = first

    def on_train_step_start(self, _context: Any) -> None:
        """Before a step."""
        telemetry.before_step(self.step)

    def on_train_step_end(self, _context: Any) -> None:
        """After a step."""
        telemetry.after_step(self.step)
        self.step += 1
