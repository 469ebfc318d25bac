"""The checkpoints of a run: publish each one complete, find the newest complete one, keep the last ones.

In: the folder of a run's checkpoints, and plans. Out: <folder>/step_<N>/{weights/,manifest.json} after N steps.

A checkpoint is written into a staging folder. It gets a manifest and is renamed to step_<N>, so a folder of this name is
complete. A crash of the file system can still damage it, so its files must have the sizes of the manifest. They are not
hashed: a checkpoint has 100 GB and more. A damaged checkpoint is renamed, and an older one is used.

One job at a time owns the folder (see claim.py). An owner that was taken for dead publishes nothing.

Environment: FTGEN_RUN_DIR, the run directory (default $STAGE_PATH/logs).

manifest.json contains {"format", "step", "plan_sha256", "plan", "data", "versions", "files": {path: {"size": bytes}}}.

In <folder>:  step_<N>/  max_steps  .claims/<n>/  .step_<N>.staging-<n>/  step_<N>.untrusted-<time>/
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from runtime.guard import publish
from runtime.guard.claim import Claim, Watch, highest, stale_s
from runtime.guard.manifest import sync
from runtime.job.errors import JobError
from runtime.job.progress import say

FORMAT = 1
NAME = "manifest.json"
PREFIX = "step_"
STEPS = "max_steps"  # the file with the number of steps
# Keys of a plan that do not change what is trained. All others must be the same when a run is resumed.
NOT_TRAINING = {"format", "ftgen_version", "name", "experiment", "spec_file", "spec_sha256", "point", "overrides", "save"}
NOT_TRAINING |= {"window_steps", "profile", "environment", "stage_path", "modules", "setup_lines", "prefix", "python"}
NOT_TRAINING |= {"slurm", "checkpoint.gated", "export", "log"}
NOT_TRAINING |= {"gpu.memory_gib", "gpu.peak_flops", "model.flops_per_sample", "model.parameters"}

Plan = dict[str, Any]


class Checkpoint(NamedTuple):
    """A complete checkpoint."""

    path: Path
    step: int  # number of steps that were made
    manifest: dict[str, Any]


def folder_of_run() -> Path:
    """The folder of this run's checkpoints; the script sets FTGEN_RUN_DIR."""
    stage = os.environ.get("STAGE_PATH") or Path.cwd()
    return Path(os.environ.get("FTGEN_RUN_DIR") or Path(stage, "logs"), "checkpoints")


def own(folder: Path) -> Claim:
    """The right to write into the folder, for this process alone. JobError: another process has it and still lives."""
    claims = folder / ".claims"
    publish.make_directory(claims)
    watch, end = Watch(claims), time.monotonic() + 1.5 * stale_s()
    said = False
    while not (claim := watch.claim()):
        if not said:
            say(f"waiting for {folder}: {watch.holder()} trains this run, or was killed a moment ago")
            said = True
        if time.monotonic() > end:
            raise JobError(f"{watch.holder()} trains the run of {folder}", "wait until it ends, or cancel it")
        time.sleep(0.5)
    return claim


def clear(folder: Path, claim: Claim) -> None:
    """Remove what earlier owners left half-written, and rename the damaged checkpoints that are newer than a good one."""
    for left in [*folder.glob(f".{PREFIX}*.staging-*"), *folder.glob(f".{PREFIX}*.trash")]:
        if left.suffix == ".trash" or left.name.rpartition("-")[2] != str(claim.generation):
            shutil.rmtree(left, ignore_errors=True)
    for step, path in _all(folder):
        if (found := flaw(path)) is None:
            return
        aside = path.with_name(f"{path.name}.untrusted-{time.strftime('%Y%m%d-%H%M%S')}")
        path.rename(aside)
        say(f"checkpoint of step {step} is not used: {found}. It was moved to {aside}, which you can delete")


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that has no flaw; None if there is none."""
    for step, path in _all(folder):
        if flaw(path) is None:
            return Checkpoint(path, step, json.loads((path / NAME).read_text()))
    return None


def flaw(path: Path) -> str | None:
    """The first thing that is wrong with a checkpoint, or None. Never raises, whatever the folder contains."""
    try:
        document = json.loads((path / NAME).read_text())
        if document["format"] != FORMAT or not document["files"] or f"{PREFIX}{document['step']}" != path.name:
            return f"{NAME} has another format"
        sizes = {name: entry["size"] for name, entry in document["files"].items()}
        for name, size in sizes.items():
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} cannot be read: {error}"
    return None


def staging(folder: Path, step: int, generation: int) -> Path:
    """Where owner number `generation` writes the checkpoint of a step."""
    return folder / f".{PREFIX}{step}.staging-{generation}"


def sync_files(folder: Path) -> None:
    """Wait until the files below a folder are on the disk. A node can do this only for what it has written itself."""
    for path in folder.rglob("*"):
        sync(path)


def publish_step(folder: Path, step: int, generation: int, about: dict[str, Any]) -> int:
    """Give the staged checkpoint of a step its manifest and its name. JobError: another job owns the run by now.

    Returns its size in bytes.
    """
    staged, place = staging(folder, step, generation), folder / f"{PREFIX}{step}"
    files = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
    sizes = {name: {"size": path.stat().st_size} for name, path in files.items()}
    document = {"format": FORMAT, "step": step, **about, "files": sizes}
    (staged / NAME).write_text(json.dumps(document, indent=1) + "\n")
    for path in (staged / NAME, staged, *(path for path in staged.rglob("*") if path.is_dir())):
        sync(path)
    if highest(folder / ".claims") != generation:
        raise JobError(f"another job has taken over the run of {folder}", "let it train: this job stops here")
    staged.rename(place)
    sync(folder)
    return sum(entry["size"] for entry in sizes.values())


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the newest checkpoints. Each is renamed first: a half-removed one must not have its name."""
    for _, path in _all(folder)[count:]:
        trash = path.with_name(f".{path.name}.trash")
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def steps(folder: Path) -> int | None:
    """The number of steps of a run with epochs, which its first attempt has written; None before that."""
    try:
        return int((folder / STEPS).read_text())
    except (FileNotFoundError, ValueError):
        return None


def write_steps(folder: Path, count: int) -> None:
    """Write the number of steps of a run with epochs. The job's script reads it too."""
    written = folder / f".{STEPS}"
    written.write_text(f"{count}\n")
    written.replace(folder / STEPS)


def about(plan: Plan, data: list[str], versions: dict[str, str]) -> dict[str, Any]:
    """What a manifest says of the training: plan, names of the data's folders (with their hashes), package versions."""
    return {"plan_sha256": digest(plan), "plan": plan, "data": data, "versions": versions}


def digest(plan: Plan) -> str:
    """Hash of those keys of a plan that change what is trained."""
    return sha256(json.dumps(dict(_training(plan)), sort_keys=True).encode()).hexdigest()


def refuse_other(checkpoint: Checkpoint, plan: Plan) -> None:
    """JobError if the checkpoint was made by a plan that trains something else, with every difference."""
    before, now = dict(_training(checkpoint.manifest["plan"])), dict(_training(plan))
    found = [
        f"{key} is {before.get(key)!r} there and {now.get(key)!r} here"
        for key in sorted(before.keys() | now.keys())
        if (before.get(key) or None) != (now.get(key) or None)
    ]
    if found:
        schedule = " (max_steps changes the learning rate of every step)" if "max_steps" in found[0] else ""
        raise JobError(
            f"{checkpoint.path} was saved by another plan: {'; '.join(found)}{schedule}",
            "compile the spec as it was, or submit the script without --resume: that starts a new run",
        )


def _all(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of every folder that has a checkpoint's name, the newest first."""
    names = ((path.name.removeprefix(PREFIX), path) for path in folder.glob(f"{PREFIX}*"))
    return sorted(((int(step), path) for step, path in names if step.isdigit()), reverse=True)


def _training(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a plan, without those that do not change what is trained."""
    for key, value in tree.items():
        if f"{prefix}{key}" in NOT_TRAINING:
            continue
        if isinstance(value, dict) and value:
            yield from _training(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
