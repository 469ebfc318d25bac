"""Hold examples out of the training, for the validation.

In: a plan, and a folder with training.jsonl and validation.jsonl as its kind of data has split them. Out: the same
folder, split as plan["validation"] asks; the number of held-out sequences.

Without plan["validation"], and with its default fraction, the split stays as it is. With a file, the training gets all
examples of the data.
"""

import json
from pathlib import Path
from typing import Any

from runtime.data import jsonl
from runtime.data.split import VALIDATION, split
from runtime.guard.manifest import sha256_of
from runtime.job.errors import JobError

Plan = dict[str, Any]


def identity(plan: Plan) -> dict[str, Any]:
    """What identifies the split, if it is not the default: the fraction, or the hash of the file."""
    asked = plan.get("validation")
    if not asked or asked["fraction"] == VALIDATION:
        return {}
    return {"validation": {"sha256": sha256_of(user_file(plan))} if asked["file"] else {"fraction": asked["fraction"]}}


def apply(plan: Plan, folder: Path) -> None:
    """Split the examples of the folder again. JobError: the file has faulty lines."""
    if not identity(plan):
        return
    asked = plan["validation"]
    names = ("training", "validation")
    examples = [json.loads(line) for name in names for line in (folder / f"{name}.jsonl").open()]
    if not asked["file"]:
        split(examples, plan["seed"], folder, asked["fraction"])
        return
    for name, lines in zip(names, (examples, jsonl.read_jsonl(user_file(plan))), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def user_file(plan: Plan) -> Path:
    """Path of validation.file; a relative path is below STAGE_PATH. JobError: the file cannot be read."""
    return jsonl.readable(plan["validation"]["file"], "validation.file")


def refuse_too_few(plan: Plan, examples: Path, packed: Path | None) -> None:
    """JobError if the held-out set does not fill one global batch: NeMo would validate on nothing, and not say so."""
    if not plan.get("validation"):
        return
    count = _rows(packed / "validation.npy") if packed else _lines(examples / "validation.jsonl")
    refuse_fewer(count, plan, "sequences" if packed else "examples")


def refuse_fewer(count: int, plan: Plan, what: str) -> None:
    """JobError if this many held-out sequences do not fill a global batch."""
    if count < plan["global_batch_size"]:
        more = "add examples to validation.file" if plan["validation"]["file"] else "increase validation.fraction"
        raise JobError(
            f"validation: the held-out data has {count} {what}, but a global batch has {plan['global_batch_size']}",
            f"{more}, or reduce global_batch_size",
        )


def check(plan: Plan) -> None:
    """JobError if it is clear before the training that the held-out examples are too few, or cannot be read.

    Packing makes fewer sequences than examples. The training counts them.
    """
    asked = plan.get("validation")
    if not asked:
        return
    if asked["file"]:
        refuse_fewer(_lines(user_file(plan)), plan, "examples")
    elif plan["data"]["kind"] == "jsonl":
        refuse_fewer(max(1, round(_lines(jsonl.user_file(plan)) * asked["fraction"])), plan, "examples")


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


def _rows(path: Path) -> int:
    """Number of rows of a .npy file, from its header."""
    from numpy.lib import format as npy

    with path.open("rb") as file:
        version: tuple[int, int] = npy.read_magic(file)  # type: ignore[no-untyped-call]
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return int(read(file)[0][0])  # type: ignore[no-untyped-call]
