"""The training data, made once for all jobs. In: a plan and a tokenizer. Out: files that NeMo's data module reads.

`files` gives a directory with training.jsonl and validation.jsonl, one {"input", "output"} on each line, and where the
plan packs, one with the same tokenized and packed into sequences of seq_length tokens. Both are published by the guard
below $STAGE_PATH/data, so that ranks, nodes and jobs that start together make them once, wherever they run.
"""

import json
import os
import random
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from runtime import guard, text
from runtime.errors import JobError
from runtime.manifest import sha256_of
from runtime.progress import timed

Plan = dict[str, Any]
FORMAT = 1  # of what this module writes
VALIDATION = 0.05  # of all examples, as NeMo's SQuAD module splits them
SHOWN = 5  # faulty lines that an error shows


class Files(NamedTuple):
    """Where the data is."""

    examples: Path  # training.jsonl, validation.jsonl
    packed: Path | None  # training.npy, validation.npy, metadata.json


def files(plan: Plan, tokenizer: Path) -> Files:
    """Make what is not there yet. `tokenizer` is a Hugging Face tokenizer's directory. JobError: a faulty file."""
    examples = source(plan)
    place = _place(plan["data"]["kind"], examples)
    guard.ensure(place, examples, lambda staging: _build(plan, staging))
    if not plan["data"]["packed"]:
        return Files(place, None)
    packed = {
        "kind": "packed examples",
        "examples": examples,
        "tokenizer": sha256_of(tokenizer / "tokenizer.json"),
        "seq_length": plan["seq_length"],
        "seed": plan["seed"],
    }
    packed_place = _place(f"{plan['data']['kind']}-packed-{plan['seq_length']}", packed)
    guard.ensure(packed_place, packed, lambda staging: _pack(plan, place, tokenizer, staging))
    return Files(place, packed_place)


def source(plan: Plan) -> dict[str, Any]:
    """What identifies the examples."""
    data = plan["data"]
    identity = {"kind": f"{data['kind']} examples", "format": FORMAT, "seed": plan["seed"]}
    if data["kind"] == "synthetic":
        return identity | {"examples": data["examples"]}
    if data["kind"] == "jsonl":
        return identity | {"sha256": sha256_of(user_file(plan))}
    return identity


def user_file(plan: Plan) -> Path:
    """The file of kind "jsonl"; a relative path is one below STAGE_PATH. JobError: it cannot be read."""
    path = Path(os.environ.get("STAGE_PATH") or Path.cwd(), plan["data"]["path"])
    if not path.is_file() or not os.access(path, os.R_OK):
        raise JobError(f"data.path: there is no file {path} that can be read", "give the path of a file on every node")
    return path


def _place(name: str, identity: dict[str, Any]) -> Path:
    short = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return Path(os.environ.get("STAGE_PATH") or Path.cwd(), "data", f"{name}-{short}")


def _build(plan: Plan, staging: Path) -> None:
    makers: dict[str, Callable[[Plan, Path], None]] = {"squad": _squad, "synthetic": _synthetic, "jsonl": _jsonl}
    with timed(f"preparing the data: {plan['data']['kind']}"):
        makers[plan["data"]["kind"]](plan, staging)
        _index(staging)


def _squad(plan: Plan, staging: Path) -> None:
    from nemo.collections.llm import SquadDataModule

    try:
        SquadDataModule(dataset_root=staging, seed=plan["seed"]).prepare_data()
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise JobError(
            f"SQuAD cannot be downloaded: {reason}", 'set data.kind = "synthetic" in the spec: it needs no network'
        ) from error


def _synthetic(plan: Plan, staging: Path) -> None:
    rng = random.Random(plan["seed"])  # noqa: S311
    _split([text.example(rng) for _ in range(plan["data"]["examples"])], plan["seed"], staging)


def _jsonl(plan: Plan, staging: Path) -> None:
    _split(read_jsonl(user_file(plan)), plan["seed"], staging)


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """The examples of a file; JobError with the first faulty lines, numbered."""
    found = list(_lines(path))
    if faults := [example for example in found if isinstance(example, str)]:
        more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise JobError("; ".join(faults[:SHOWN]) + more, 'each line is {"input": "...", "output": "..."}')
    examples = [example for example in found if isinstance(example, dict)]
    if len(examples) < 2:
        raise JobError(f"{path}: {len(examples)} examples, at least 2 are needed", "one to train on, one to validate")
    return examples


def _lines(path: Path) -> Iterator[dict[str, str] | str]:
    """Of each line that is not empty its example, or what is wrong with it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _example(line, f"{path}:{number}")


def _example(line: bytes, where: str) -> dict[str, str] | str:
    try:
        document = json.loads(line)
    except ValueError as error:
        return f"{where}: not JSON: {error}"
    if not isinstance(document, dict):
        return f"{where}: not an object"
    for key in ("input", "output"):
        if not isinstance(document.get(key), str) or not document[key].strip():
            return f'{where}: no text under "{key}"'
    return {key: document[key] for key in ("input", "output")}


def _split(examples: list[dict[str, str]], seed: int, directory: Path) -> None:
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)  # noqa: S311
    count = max(1, round(len(examples) * VALIDATION))
    for name, numbers in (("validation", order[:count]), ("training", order[count:])):
        with (directory / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(examples[number]) + "\n" for number in sorted(numbers))


def _index(directory: Path) -> None:
    """Make NeMo's line index now: left to the training, several jobs would write the same file at once."""
    from nemo.collections.llm.gpt.data.utils import build_index_files

    build_index_files([str(path) for path in sorted(directory.glob("*.jsonl"))], newline_int=ord("\n"), workers=1)


def _pack(plan: Plan, examples: Path, tokenizer: Path, staging: Path) -> None:
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.llm.gpt.data.packed_sequence import prepare_packed_sequence_data

    with timed(f"packing the data into sequences of {plan['seq_length']} tokens"):
        for name in ("training", "validation"):
            prepare_packed_sequence_data(
                input_path=examples / f"{name}.jsonl",
                output_path=staging / f"{name}.npy",
                output_metadata_path=staging / "metadata.json",
                packed_sequence_size=plan["seq_length"],
                tokenizer=AutoTokenizer(str(tokenizer)),
                max_seq_length=plan["seq_length"],
                seed=plan["seed"],
                dataset_kwargs={"pad_to_max_length": True},
            )
