"""Start and stop the profiler between two steps. The engine calls it, with the number of the step.

In: the tool, the first and the last step, a file. Out: the profile that the tool writes.

This module imports torch, so only a profiled training imports it.
"""

from pathlib import Path
from typing import Any

import torch

from runtime.job.progress import say


class Profiler:
    """Profile from the start of `first_step` to the end of `last_step`, counted from 0."""

    def __init__(self, tool: str, first_step: int, last_step: int, file: str) -> None:
        self.tool, self.first_step, self.last_step, self.file = tool, first_step, last_step, Path(file)
        self.profile: Any = None

    def before_step(self, step: int) -> None:
        """Start the profiler before `first_step`."""
        if step != self.first_step:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the GPU may still be at the step before
        if self.tool == "nsys":
            torch.cuda.profiler.start()
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profile = torch.profiler.profile(activities=activities, record_shapes=True)
        self.profile.start()

    def after_step(self, step: int) -> None:
        """Stop the profiler after `last_step`."""
        if step != self.last_step:
            return
        if self.tool == "nsys":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        elif self.profile:
            self.profile.stop()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.profile.export_chrome_trace(f"{self.file}.json")
            say(f"profile: {self.file}.json")
            self.profile = None
