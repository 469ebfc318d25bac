"""Read the user's own examples from a JSONL file, one {"input", "output"} per line.

In: a plan with data.path. Out: training.jsonl and validation.jsonl.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.data.split import split
from runtime.guard.manifest import sha256_of
from runtime.job import variables
from runtime.job.errors import JobError

Plan = dict[str, Any]
SHOWN = 5  # number of faulty lines that an error shows


def identity(plan: Plan) -> dict[str, Any]:
    """What identifies the examples: the hash of the file."""
    return {"sha256": sha256_of(user_file(plan))}


def write(plan: Plan, folder: Path) -> None:
    """Write the examples of the file, split into training and validation."""
    split(read_jsonl(user_file(plan)), plan["seed"], folder)


def user_file(plan: Plan) -> Path:
    """Path of the file; a relative data.path is below STAGE_PATH. JobError: the file cannot be read."""
    return readable(plan["data"]["path"], "data.path")


def readable(name: str, key: str) -> Path:
    """Path of the file that a key of the spec names. JobError: the file cannot be read."""
    path = Path(os.environ.get("STAGE_PATH") or Path.cwd(), variables.path_with_values(key, name))
    if not path.is_file() or not os.access(path, os.R_OK):
        raise JobError(
            f"{key}: the file {path} does not exist or cannot be read",
            "give the path of a file that every node can read",
        )
    return path


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """The examples of a file. JobError: the first faulty lines, with their line numbers."""
    found = list(_lines(path))
    if faults := [example for example in found if isinstance(example, str)]:
        more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise JobError("; ".join(faults[:SHOWN]) + more, 'each line is {"input": "...", "output": "..."}')
    examples = [example for example in found if isinstance(example, dict)]
    if len(examples) < 2:
        raise JobError(
            f"{path}: has {len(examples)} examples, but at least 2 are needed", "add one for training, one for validation"
        )
    return examples


def _lines(path: Path) -> Iterator[dict[str, str] | str]:
    """For each line that is not empty: its example, or an error text."""
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
            return f'{where}: "{key}" has no text'
    return {key: document[key] for key in ("input", "output")}
