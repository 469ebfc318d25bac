"""The base of a training: its small files, its weights and its name.

In: a plan. Out: folders on this machine, and the name by which others find the base.
"""

from pathlib import Path
from typing import Any

from runtime.hub import find
from runtime.job.errors import JobError
from runtime.weights import base, checkpoint, hub

Plan = dict[str, Any]


def converted(plan: Plan) -> Path:
    """The converted checkpoint. JobError: it is not there or has changed."""
    folder = checkpoint.directory(plan)
    if not checkpoint.converted(plan):
        raise JobError(
            f"the converted checkpoint is not in {folder}",
            "set STAGE_PATH as in the training, or convert it again: bash <script>.sh --convert",
        )
    return folder


def files(plan: Plan, scratch: Path) -> Path:
    """The folder with the base's small files and the list of its tensors; `scratch`, if the conversion did not keep them."""
    kept = converted(plan) / base.FOLDER
    if (kept / base.TENSORS).is_file():
        return kept
    model = weights(plan)
    if model is None:
        raise JobError(
            f"{kept} does not exist: an older ftgen converted this checkpoint, and the base is not on this machine",
            f"move {kept.parent} away, and convert it again: bash <script>.sh --convert",
        )
    base.keep(model, scratch)
    return scratch


def weights(plan: Plan) -> Path | None:
    """The base in Hugging Face format, if it is on this machine."""
    kind = plan["checkpoint"]["source"]
    if kind == "hub":
        found = find.find(hub.repository(plan))
        return found if found and find.commit(found) == checkpoint.origin(plan).get("commit") else None
    folder = checkpoint.user_directory(plan) if kind == "directory" else None
    return folder if folder and folder.is_dir() else None


def name(plan: Plan) -> tuple[str, str | None]:
    """Where PEFT finds the base: a repository of the hub and its commit, or a directory."""
    if plan["checkpoint"]["source"] == "directory":
        return str(checkpoint.user_directory(plan)), None
    return plan["model"]["hf_id"], checkpoint.origin(plan).get("commit")
