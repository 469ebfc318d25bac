"""Find the checkpoint that is to be exported.

In: a plan, and a run directory, a checkpoint, or nothing. Out: a `Run`: the checkpoint, and the plan that trained it.

Environment: FTGEN_RUN_DIR, the directory of this job: <runs>/<experiment>_<id>/<experiment>.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from runtime.guard import checkpoints
from runtime.job.errors import JobError
from runtime.weights import distributed

Plan = dict[str, Any]
# Step lines of the engines: the number of the step, and the loss. NeMo counts from 0, Megatron-Bridge from 1.
NEMO_LINE = re.compile(r"^Training epoch \d+, iteration (\d+)/.* reduced_train_loss: (\S+)", re.MULTILINE)
BRIDGE_LINE = re.compile(r"^ \[.*\] iteration +(\d+)/.*\| lm loss: (\S+) \|", re.MULTILINE)
DATA = re.compile(r"^ftgen data: (\{.*\})$", re.MULTILINE)
VALIDATION = re.compile(r"^ftgen: validation after step (\d+): loss (\S+)", re.MULTILINE)


class Run(NamedTuple):
    """A checkpoint, and the plan that trained it."""

    checkpoint: Path  # .../step_<N>
    plan: Plan
    manifest: dict[str, Any]  # of the checkpoint; empty if the engine saved it without ftgen

    @property
    def weights(self) -> Path:
        """The folder of the distributed checkpoint."""
        return self.checkpoint / "weights"

    @property
    def directory(self) -> Path:
        """The run directory."""
        above = self.checkpoint.parent
        return above.parent if above.name == "checkpoints" else above

    def export(self, what: str) -> Path:
        """The folder of an export."""
        return self.directory / "exports" / self.checkpoint.name / what

    def data(self) -> dict[str, Any]:
        """What the newest log of the run says of its data: hash and counts; empty if no log is here."""
        lines = [line for log in self._logs() for line in DATA.findall(log)]
        return _document(lines[-1]) if lines else {}

    def losses(self) -> dict[str, str]:
        """First and last loss up to this checkpoint, and the last validation loss, as the logs of the run have them."""
        end = self.manifest.get("step", 0)
        logs = self._logs()
        made = {int(step) + 1: loss for log in logs for step, loss in NEMO_LINE.findall(log)}
        made |= {int(step): loss for log in logs for step, loss in BRIDGE_LINE.findall(log)}
        steps = {step: loss for step, loss in made.items() if step <= end}
        validations = {int(step): loss for log in logs for step, loss in VALIDATION.findall(log) if int(step) <= end}
        found = {f"loss of step {step}": steps[step] for step in sorted({min(steps), max(steps)})} if steps else {}
        return found | {f"validation loss after step {step}": validations[step] for step in sorted(validations)[-1:]}

    def _logs(self) -> list[str]:
        return [path.read_text(errors="replace") for path in sorted(self.directory.glob("log-*.out"), key=_age)]


def _document(text: str) -> dict[str, Any]:
    """A JSON object of the log; empty if the line was cut."""
    try:
        return dict(json.loads(text))
    except ValueError:
        return {}


def find(plan: Plan, given: str) -> Run:
    """The checkpoint to export. `given`: a run directory or a checkpoint; "": this run, or the newest run of the experiment.

    JobError: there is no checkpoint, or it is damaged.
    """
    folder = Path(given or os.environ["FTGEN_RUN_DIR"]).resolve()
    if (distributed.inner(folder / "weights") / distributed.METADATA).is_file():
        return _run(folder, plan)
    here = [folder, *(path.parent for path in folder.glob("*/checkpoints"))]
    others = [] if given else sorted(folder.parent.parent.glob(f"*/{folder.name}"), key=_age, reverse=True)
    for directory in [*here, *others]:
        if found := checkpoints.newest(directory / "checkpoints"):
            return _run(found.path, plan)
    raise JobError(
        f"there is no checkpoint in {given or folder.parent.parent}: neither weights/ nor checkpoints/step_<N>/weights/",
        "give the directory of a run that saved, or one of its checkpoints; [save] in the spec makes runs save",
    )


def _run(checkpoint: Path, plan: Plan) -> Run:
    file = checkpoint / checkpoints.NAME
    if not file.is_file():
        return Run(checkpoint, plan, {})
    if flaw := checkpoints.flaw(checkpoint):
        raise JobError(f"the checkpoint {checkpoint} is damaged: {flaw}", "give another checkpoint of the run")
    manifest = json.loads(file.read_text())
    return Run(checkpoint, manifest["plan"], manifest)


def _age(path: Path) -> float:
    return path.stat().st_mtime
