"""Save a training while it runs, and stop it between two steps when Slurm asks for that. This is the same for each engine.

In: what is saved where (`Saves`), the engine's steps, and its function that writes a checkpoint. Out: checkpoints as
checkpoints.py describes.

All ranks write their part of a checkpoint in Megatron's distributed format, and wait until it is on the disk. Rank 0
publishes it. Saving is synchronous: an asynchronous save that is killed leaves nothing, and its processes live on.

This module imports torch, so only a training imports it.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed import ReduceOp

from runtime.guard import checkpoints, publish
from runtime.job import stop
from runtime.job.errors import JobError
from runtime.job.progress import say, say_clock

CLOCK_S = 30.0  # between two lines with the time, about
# How torch and Megatron word a failed write: they do not hand on the error of the system.
DISK_ERRORS = ("No space left on device", "Disk quota exceeded", "unexpected pos")


class Saves(NamedTuple):
    """What is saved, where and when."""

    folder: str
    last_step: int  # number of steps of the run
    every_steps: int
    keep: int
    generation: int  # number of the claim of this job; 0 on all ranks but rank 0
    resumed: int  # step of the checkpoint that this job goes on from; 0 if it begins
    checkpoint_bytes: int  # estimated size of a checkpoint
    about: dict[str, Any]  # for the manifests
    lead_s: int  # seconds from Slurm's warning to the time limit; 0 outside of Slurm


class Saving:
    """Saves after every N steps, after the last one, and after the step in which the training is asked to stop."""

    def __init__(self, saves: Saves) -> None:
        self.saves = saves
        self.folder = Path(saves.folder)
        self.saved = saves.resumed  # step of the last checkpoint
        self.size = saves.checkpoint_bytes  # of the last checkpoint; before the first one, estimated
        self.stopping = False  # after the current step, although it is not the last one
        self.began = 0.0  # of the current step
        self.clock = 0.0  # of the last line with the time
        self.told = False  # that the lead time is too short

    def begin(self) -> None:
        """Before the first step: check that all ranks resume from the same step, and tell them the number of the claim."""
        stop.listen(signal.SIGUSR1, signal.SIGTERM)
        first, last = -_over_ranks(-self.saves.resumed), _over_ranks(self.saves.resumed)
        if first != last:
            raise JobError(
                f"the ranks see different checkpoints in {self.folder}: step {first} and step {last}",
                "the shared file system is late: submit the job again",
            )
        self.saves = self.saves._replace(generation=_over_ranks(self.saves.generation))
        self._tell_the_time(self.saves.resumed)

    def before_step(self, made: int) -> None:
        """Note the time, and write it now and then. `made` is the number of steps before this one."""
        self.began = time.monotonic()
        if self.began - self.clock > CLOCK_S:
            self._tell_the_time(made)

    def after_step(self, step: int) -> bool:
        """Whether to save now. All ranks agree, and stop after the same step."""
        asked = bool(_over_ranks(int(bool(stop.asked()))))
        self.stopping = asked and step < self.saves.last_step
        if self.stopping:
            say(f"asked to stop ({stop.asked() or 'another rank was'}): the run is saved after step {step}")
        return asked or step == self.saves.last_step or step % self.saves.every_steps == 0

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Save, on all ranks together. `write` writes all that a resume needs into a folder."""
        before_s = time.monotonic() - self.began  # the step, and its validation
        if step != self.saved:
            begin = time.monotonic()
            self.size = self._publish(step, write)
            took_s, gib = time.monotonic() - begin, self.size / 2**30
            say(f"saved step {step} in {took_s:.2f} s: checkpoints/{checkpoints.PREFIX}{step}, {gib:.3g} GiB")
            self._tell_the_time(step)
            self._warn_of_the_limit(before_s + took_s)
        self.saved = step
        if self.stopping:
            say(f"stopped after step {step} of {self.saves.last_step}: exit code {stop.AGAIN}, to be run again")

    def _publish(self, step: int, write: Callable[[Path], None]) -> int:
        """Write and publish the checkpoint of a step. Returns its size in bytes, on rank 0."""
        is_first, size = os.environ["RANK"] == "0", 0
        staging = checkpoints.staging(self.folder, step, self.saves.generation)
        try:
            if is_first:
                publish.require_space(self.folder, self.size, f"the checkpoint of step {step}")
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir()
            _wait_for_all()
            write(staging)
            if os.environ["LOCAL_RANK"] == "0":
                checkpoints.sync_files(staging)
            _wait_for_all()
            if is_first:
                size = checkpoints.publish_step(self.folder, step, self.saves.generation, self.saves.about)
                checkpoints.keep_newest(self.folder, self.saves.keep)
            _wait_for_all()
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)  # on a full disk, every byte counts
            if publish.is_disk_error(error) or any(words in str(error) for words in DISK_ERRORS):
                raise JobError(
                    f"the checkpoint of step {step} cannot be written: the disk or your quota is full: {self.folder}",
                    f"free some space. The run can go on after step {self.saved}",
                ) from error
            raise
        return size

    def _tell_the_time(self, step: int) -> None:
        self.clock = time.monotonic()
        say_clock(step)

    def _warn_of_the_limit(self, needed_s: float) -> None:
        if needed_s > self.saves.lead_s > 0 and not self.told:
            self.told = True
            say(
                f"warning: a step and its save take {needed_s:.0f} s, but Slurm warns only {self.saves.lead_s} s before the "
                f"time limit: set end_before_limit_s in the site profile to {2 * needed_s:.0f}"
            )


def _over_ranks(value: int) -> int:
    """The highest value of all ranks."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    highest = torch.tensor(value, device=torch.cuda.current_device(), dtype=torch.int64)
    torch.distributed.all_reduce(highest, op=ReduceOp.MAX)
    return int(highest.item())


def _wait_for_all() -> None:
    """Return when all ranks are here. They read a number that depends on all of them."""
    _over_ranks(0)
