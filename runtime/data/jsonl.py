"""Read the user's own examples from a JSONL file, one {"input", "output"} per line.

In: a plan with data.path. Out: training.jsonl and validation.jsonl.
"""

from pathlib import Path
from typing import Any

from runtime.data import lines
from runtime.data.lines import Example, FaultError
from runtime.data.split import split
from runtime.guard.manifest import sha256_of

Plan = dict[str, Any]
HINT = 'each line is {"input": "...", "output": "..."}'


def identity(plan: Plan) -> dict[str, Any]:
    """What identifies the examples: the hash of the file."""
    return {"sha256": sha256_of(lines.user_file(plan)), "format": 2}  # since format 2, an example has its line


def write(plan: Plan, folder: Path) -> None:
    """Write the examples of the file, split into training and validation."""
    split(read_jsonl(lines.user_file(plan)), plan["seed"], folder)


def place(plan: Plan, example: Example) -> str:
    """Where the example is, as file:line."""
    return f"{lines.user_file(plan)}:{example[lines.LINE]}"


def read_jsonl(path: Path) -> list[Example]:
    """The examples of a file. JobError: the first faulty lines, with their line numbers."""
    return lines.read(path, pair, HINT)


def pair(document: Example) -> Example:
    """The input and output of an example. FaultError: one has no text."""
    for key in ("input", "output"):
        if not isinstance(document.get(key), str) or not document[key].strip():
            raise FaultError(f'"{key}" has no text')
    return {key: document[key] for key in ("input", "output")}
