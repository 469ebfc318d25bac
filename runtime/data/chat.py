"""Read the user's own conversations from a JSONL file, one {"messages": [...]} per line.

In: a plan with data.path. Out: training.jsonl and validation.jsonl.
"""

from pathlib import Path
from typing import Any

from runtime.data import lines
from runtime.data.conversation import conversation
from runtime.data.lines import Example
from runtime.data.split import split
from runtime.guard.manifest import sha256_of

Plan = dict[str, Any]
HINT = 'each line is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


def identity(plan: Plan) -> dict[str, Any]:
    """What identifies the conversations: the hash of the file."""
    return {"sha256": sha256_of(lines.user_file(plan))}


def write(plan: Plan, folder: Path) -> None:
    """Write the conversations of the file, split into training and validation. JobError: faulty lines."""
    split(read_jsonl(lines.user_file(plan)), plan["seed"], folder)


def read_jsonl(path: Path) -> list[Example]:
    """The conversations of a file. JobError: the first faulty lines, with their line numbers."""
    return lines.read(path, conversation, HINT)


def place(plan: Plan, example: Example) -> str:
    """Where the conversation is, as file:line."""
    return f"{lines.user_file(plan)}:{example[lines.LINE]}"
