"""Save a training while it runs, and stop it between two steps when Slurm asks for that.

In: a recipe, and what is saved where (`Saves`). Out: the recipe with a callback; checkpoints as checkpoints.py describes.

All ranks write their part of a checkpoint in Megatron's distributed format, and wait until it is on the disk. Rank 0
publishes it. Saving is synchronous: an asynchronous save that is killed leaves nothing, and its processes live on.

NeMo's own ModelCheckpoint is not used. If it is killed while it writes its second copy, `-last`, no resume is possible.

This module imports Lightning, so only a training imports it.
"""

import queue
import shutil
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import nemo_run as run
import torch
from lightning.pytorch.callbacks import Checkpoint
from megatron.core.dist_checkpointing.strategies import filesystem_async
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
    every_steps: int
    keep: int
    generation: int  # number of the claim of this job; 0 on all ranks but rank 0
    resumed: int  # step of the checkpoint that this job goes on from; 0 if it begins
    checkpoint_bytes: int  # estimated size of a checkpoint
    about: dict[str, Any]  # for the manifests
    lead_s: int  # seconds from Slurm's warning to the time limit; 0 outside of Slurm


def add(recipe: Any, saves: Saves) -> None:
    """Add the callback to the recipe."""
    recipe.trainer.enable_checkpointing = True
    recipe.trainer.strategy.ckpt_async_save = False
    filesystem_async._results_queue = queue.Queue()  # Megatron's own is a server process, for asynchronous saves
    recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), run.Config(Save, tuple(saves))]


class Save(Checkpoint):  # type: ignore[misc]
    """Saves after every N steps, after the last one, and after the step in which the training is asked to stop.

    Lightning calls a `Checkpoint` after all other callbacks. So NeMo's timer has stopped when a save begins: the times of
    the step lines are without saves.
    """

    last_model_path = ""  # NeMo sets it when it resumes

    def __init__(self, saves: tuple[Any, ...]) -> None:
        self.saves = Saves(*saves)
        self.folder = Path(self.saves.folder)
        self.saved = self.saves.resumed  # step of the last checkpoint
        self.size = self.saves.checkpoint_bytes  # of the last checkpoint; before the first one, estimated
        self.waiting = False  # for a validation, before the save
        self.stopping = False
        self.began = 0.0  # of the current step
        self.clock = 0.0  # of the last line with the time
        self.told = False  # that the lead time is too short

    def on_train_start(self, *_args: Any) -> None:
        """Check that all ranks resume from the same step, and tell them the number of the claim."""
        stop.listen(signal.SIGUSR1, signal.SIGTERM)
        first, last = -_over_ranks(-self.saves.resumed), _over_ranks(self.saves.resumed)
        if first != last:
            raise JobError(
                f"the ranks see different checkpoints in {self.folder}: step {first} and step {last}",
                "the shared file system is late: submit the job again",
            )
        self.saves = self.saves._replace(generation=_over_ranks(self.saves.generation))
        self._tell_the_time(self.saves.resumed)

    def on_train_batch_start(self, trainer: Any, *_args: Any) -> None:
        """Note the time, and write it now and then."""
        self.began = time.monotonic()
        if self.began - self.clock > CLOCK_S:
            self._tell_the_time(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_args: Any) -> None:
        """Save, if it is time to. If this step is validated too, do it after the validation.

        A run that is resumed does not repeat the validation of the step that it goes on from.
        """
        step = trainer.global_step
        self.stopping = bool(_over_ranks(int(bool(stop.asked()))))
        if self.stopping and step < trainer.max_steps:
            say(f"asked to stop ({stop.asked() or 'another rank was'}): the run is saved after step {step}")
        if self.stopping or step == trainer.max_steps or step % self.saves.every_steps == 0:
            loop = trainer.fit_loop
            self.waiting = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
            if not self.waiting:
                self._save(trainer)

    def on_validation_end(self, trainer: Any, *_args: Any) -> None:
        """Save, if a save waited for this validation."""
        if self.waiting:
            self.waiting = False
            self._save(trainer)

    def on_save_checkpoint(self, _trainer: Any, _module: Any, checkpoint: dict[str, Any]) -> None:
        """Count the current batch as completed. Lightning does so only after this callback.

        A resumed run would count one batch less, and validate one step later than it should.
        """
        for part in ("total", "current"):
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"][part]
            progress["completed"] = progress["processed"]

    def _save(self, trainer: Any) -> None:
        step = trainer.global_step
        before_s = time.monotonic() - self.began  # the step, and its validation
        if step != self.saved:
            begin = time.monotonic()
            self.size = self._write(trainer, step)
            took_s, gib = time.monotonic() - begin, self.size / 2**30
            say(f"saved step {step} in {took_s:.2f} s: checkpoints/{checkpoints.PREFIX}{step}, {gib:.3g} GiB")
            self._tell_the_time(step)
            self._warn_of_the_limit(before_s + took_s)
        self.saved = step
        if self.stopping and step < trainer.max_steps:
            say(f"stopped after step {step} of {trainer.max_steps}: exit code {stop.AGAIN}, to be run again")
            raise SystemExit(stop.AGAIN)

    def _write(self, trainer: Any, step: int) -> int:
        """Write and publish the checkpoint of a step, on all ranks together. Returns its size in bytes, on rank 0."""
        staging = checkpoints.staging(self.folder, step, self.saves.generation)
        barrier, size = trainer.strategy.barrier, 0
        try:
            if trainer.is_global_zero:
                publish.require_space(self.folder, self.size, f"the checkpoint of step {step}")
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir()
            barrier()
            trainer.save_checkpoint(staging, weights_only=False)
            if trainer.local_rank == 0:
                checkpoints.sync_files(staging)
            barrier()
            if trainer.is_global_zero:
                size = checkpoints.publish_step(self.folder, step, self.saves.generation, self.saves.about)
                checkpoints.keep_newest(self.folder, self.saves.keep)
            barrier()
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
