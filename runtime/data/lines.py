"""Read a JSONL file, one JSON object a line, and collect what is wrong with each line.

In: a file, and a function that checks one object. Out: the examples, each with the number of its line, or a JobError
that names the first faulty lines.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.job import variables
from runtime.job.errors import JobError

Example = dict[str, Any]
LINE = "line"  # key of an example: its line in the user's file, from 1
SHOWN = 5  # number of faults that an error shows


class FaultError(Exception):
    """What is wrong with one example. The text does not say where the example is."""


def user_file(plan: dict[str, Any]) -> Path:
    """Path of the file; a relative data.path is below STAGE_PATH. JobError: the file cannot be read."""
    return readable("data.path", plan["data"]["path"])


def readable(key: str, name: str) -> Path:
    """Path of the file that a key of the spec names. JobError: the file cannot be read."""
    path = below_stage_path(key, name)
    if not path.is_file() or not os.access(path, os.R_OK):
        raise JobError(
            f"{key}: the file {path} does not exist or cannot be read",
            "give the path of a file that every node can read",
        )
    return path


def below_stage_path(key: str, name: str) -> Path:
    """The path that a key names, with the values of its variables; a relative path is below STAGE_PATH."""
    return Path(os.environ.get("STAGE_PATH") or Path.cwd(), variables.path_with_values(key, name))


def read(path: Path, check: Callable[[Example], Example], hint: str) -> list[Example]:
    """The examples of a file, as `check` returns them. JobError: the first faulty lines, or fewer than two examples."""
    examples, faults = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    examples.append(check(_document(line, first=number == 1)) | {LINE: number})
                except FaultError as fault:
                    faults.append(f"{path}:{number}: {fault}")
    refuse(faults, hint)
    require_two(examples, str(path))
    return examples


def refuse(faults: list[str], hint: str) -> None:
    """JobError with the first faults, if there are any."""
    if faults:
        more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise JobError("; ".join(faults[:SHOWN]) + more, hint)


def require_two(examples: list[Example], where: str) -> None:
    """JobError unless there are two examples."""
    if len(examples) < 2:
        raise JobError(
            f"{where}: has {len(examples)} examples, but at least 2 are needed", "add one for training, one for validation"
        )


def _document(line: bytes, *, first: bool) -> Example:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise FaultError(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}") from None
    try:
        document = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise FaultError("has half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    except (ValueError, RecursionError) as error:
        raise FaultError(f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise FaultError("not an object")
    return document
