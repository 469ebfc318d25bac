"""Hold examples out of the training, for the validation.

In: a plan, and a folder with training.jsonl and validation.jsonl as its kind of data has split them. Out: the same
folder, split as plan["validation"] asks; the number of held-out sequences.

Without plan["validation"], and with its default fraction, the split stays as it is. With a file, the training gets all
examples of the data.
"""

import json
from pathlib import Path
from typing import Any

from runtime.data import chat, jsonl, lines, report
from runtime.data.conversation import conversation
from runtime.data.lines import Example
from runtime.data.split import VALIDATION, split
from runtime.guard.manifest import sha256_of
from runtime.job.errors import JobError

Plan = dict[str, Any]


def identity(plan: Plan) -> dict[str, Any]:
    """What identifies the split, if it is not the default: the fraction, or the hash of the file."""
    asked = plan.get("validation")
    if not asked or asked["fraction"] == VALIDATION:
        return {}
    file = file_of(plan)
    return {"validation": {"sha256": sha256_of(file)} if file else {"fraction": asked["fraction"]}}


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
    for name, found in zip(names, (examples, _read(plan, user_file(plan))), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in found))


def user_file(plan: Plan) -> Path:
    """Path of validation.file; a relative path is below STAGE_PATH. JobError: the file cannot be read."""
    return lines.readable("validation.file", plan["validation"]["file"])


def file_of(plan: Plan) -> Path | None:
    """The same, or None if the plan has no such file."""
    return user_file(plan) if plan.get("validation") and plan["validation"]["file"] else None


def _read(plan: Plan, path: Path) -> list[Example]:
    """The examples of a file: conversations for kind "chat", either for "hf", inputs and outputs for all others."""
    if plan["data"]["kind"] == "chat":
        return chat.read_jsonl(path)
    if plan["data"]["kind"] == "hf":
        return lines.read(path, _either, f"{jsonl.HINT}, or with messages: {chat.HINT}")
    return jsonl.read_jsonl(path)


def _either(document: Example) -> Example:
    return conversation(document) if {"messages", "conversations"} & document.keys() else jsonl.pair(document)


def refuse_too_few(plan: Plan, examples: Path, tokens: Path, packed: Path | None) -> None:
    """JobError if the held-out set does not fill one global batch: the engine would validate on nothing, and not say so."""
    if not plan.get("validation"):
        return
    refuse_fewer(*sequences(plan, examples, tokens, packed), plan)


def sequences(plan: Plan, examples: Path, tokens: Path, packed: Path | None) -> tuple[int, str]:
    """The number of held-out sequences, and whether they are packs or examples."""
    if packed:
        return _packs(packed), "packs"
    if plan["data"]["order"] == "recipe":
        return _lines(examples / "validation.jsonl"), "examples"
    return report.samples_of(report.read(tokens)["validation"])


def refuse_fewer(count: int, what: str, plan: Plan) -> None:
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
        refuse_fewer(_lines(user_file(plan)), "examples", plan)
    elif plan["data"]["kind"] in ("jsonl", "chat"):
        refuse_fewer(max(1, round(_lines(lines.user_file(plan)) * asked["fraction"])), "examples", plan)


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


def _packs(folder: Path) -> int:
    """The number of held-out packs of an engine: NeMo's are in a .npy file, Megatron-Bridge's in a parquet file."""
    if (file := folder / "validation.idx.parquet").is_file():
        from pyarrow import parquet

        return int(parquet.read_metadata(file).num_rows)
    return _rows(folder / "validation.npy")


def _rows(path: Path) -> int:
    """Number of rows of a .npy file, from its header."""
    from numpy.lib import format as npy

    with path.open("rb") as file:
        version: tuple[int, int] = npy.read_magic(file)  # type: ignore[no-untyped-call]
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return int(read(file)[0][0])  # type: ignore[no-untyped-call]
