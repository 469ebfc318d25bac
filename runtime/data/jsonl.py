"""The user's own examples, one {"input", "output"} a line. In: a plan. Out: training.jsonl and validation.jsonl."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.data.split import split
from runtime.guard.manifest import sha256_of
from runtime.job.errors import JobError

Plan = dict[str, Any]
SHOWN = 5  # faulty lines that an error shows


def identity(plan: Plan) -> dict[str, Any]:
    """The hash of the file."""
    return {"sha256": sha256_of(user_file(plan))}


def write(plan: Plan, folder: Path) -> None:
    """Read the file and split it."""
    split(read_jsonl(user_file(plan)), plan["seed"], folder)


def user_file(plan: Plan) -> Path:
    """The file of kind "jsonl"; a relative path is one below STAGE_PATH. JobError: it cannot be read."""
    path = Path(os.environ.get("STAGE_PATH") or Path.cwd(), plan["data"]["path"])
    if not path.is_file() or not os.access(path, os.R_OK):
        raise JobError(f"data.path: there is no file {path} that can be read", "give the path of a file on every node")
    return path


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
