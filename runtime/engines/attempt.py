"""One attempt of a run that is saved: which checkpoint it goes on from, and what it saves.

In: a plan with `save`. Out: an `Attempt`; with the data, what the engine saves (`Saves`).

A run has several attempts if its job is requeued, or if its script is submitted again with --resume. All attempts share
the run directory, and so the folder of checkpoints.
"""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.data.prepare import Files
from runtime.guard import checkpoints
from runtime.guard.checkpoints import Checkpoint
from runtime.guard.claim import Claim
from runtime.job import children, environment, stop
from runtime.job.errors import JobError
from runtime.job.progress import say

if TYPE_CHECKING:
    from runtime.engines.saving import Saves

Plan = dict[str, Any]


class Attempt(NamedTuple):
    """What this attempt owns and goes on from."""

    folder: Path  # of the checkpoints
    claim: Claim | None  # of rank 0
    checkpoint: Checkpoint | None  # None: it begins with the first step

    @property
    def step(self) -> int:
        """Number of steps that earlier attempts made and saved."""
        return self.checkpoint.step if self.checkpoint else 0


def begin(plan: Plan) -> Attempt:
    """Take over the run and choose its newest checkpoint. JobError: another plan or a living job owns it."""
    stop.listen(signal.SIGUSR1)  # until the first step has ended, SIGTERM still ends this process
    children.pass_signals_by(signal.SIGUSR1, signal.SIGTERM)
    children.end_with_this_process()
    folder, claim = checkpoints.folder_of_run(), None
    if os.environ["RANK"] == "0":
        claim = checkpoints.own(folder)
        checkpoints.clear(folder, claim)
    checkpoint = checkpoints.newest(folder)
    if checkpoint:
        checkpoints.refuse_other(checkpoint, plan)
        say(f"resumed after step {checkpoint.step}: {checkpoint.path}")
    return Attempt(folder, claim, checkpoint)


def steps(plan: Plan) -> int | None:
    """The number of steps of the run. With epochs, None before its first attempt has read the data."""
    return plan["max_steps"] or checkpoints.steps(checkpoints.folder_of_run())


def saves(plan: Plan, attempt: Attempt, files: Files) -> "Saves":
    """What the attempt saves. JobError: the data has changed since its checkpoint. Imports torch.

    With epochs, `plan` has the number of steps that the data gave.
    """
    from runtime.engines.saving import Saves

    last_step = plan["max_steps"]
    if plan["epochs"]:
        if attempt.claim:
            checkpoints.write_steps(attempt.folder, last_step)
        plan = plan | {"max_steps": None}  # the plan as the script has it, for the manifests
    data = [folder.name for folder in files if folder]
    versions = environment.packages()
    if attempt.checkpoint:
        _compare(attempt.checkpoint, data, versions)
    return Saves(
        folder=str(attempt.folder),
        last_step=last_step,
        every_steps=plan["save"]["every_steps"],
        keep=plan["save"]["keep"],
        generation=attempt.claim.generation if attempt.claim else 0,
        resumed=attempt.step,
        checkpoint_bytes=plan["save"]["checkpoint_bytes"],
        about=checkpoints.about(plan, data, versions),
        lead_s=plan["slurm"]["end_before_limit_s"] if os.environ.get("SLURM_JOB_ID") else 0,
    )


def _compare(checkpoint: Checkpoint, data: list[str], versions: dict[str, str]) -> None:
    before, packages = checkpoint.manifest["data"], checkpoint.manifest["versions"]
    if before != data:
        raise JobError(
            f"{checkpoint.path} was trained on other data: {', '.join(before)} there and {', '.join(data)} here",
            "restore the data as it was, or submit the script without --resume: that starts a new run",
        )
    changed = [
        f"{name} {packages.get(name)} -> {versions.get(name)}" for name in versions if packages.get(name) != versions[name]
    ]
    if changed:
        say(f"warning: packages have changed since {checkpoint.path}, so results may differ: {', '.join(changed)}")
