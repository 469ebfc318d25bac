"""Read a dataset of the Hugging Face hub, or of a local file or folder, with the package `datasets`.

In: a plan with data.dataset (name on the hub, at the commit data.revision) or data.path. Out: training.jsonl and
validation.jsonl.

A local folder is one that `save_to_disk` wrote, or one with files that `load_dataset` reads (parquet, arrow, JSON). From
the hub, the same files are downloaded. The code of a dataset is never run.
"""

import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

from runtime.data import lines
from runtime.data.conversation import conversation
from runtime.data.lines import LINE, Example, FaultError
from runtime.data.split import split
from runtime.guard import manifest
from runtime.guard.manifest import sha256_of
from runtime.hub.fetch import fetch
from runtime.hub.repository import Repository
from runtime.job.errors import JobError

Plan = dict[str, Any]
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}  # of one file, by its suffix
DEPTH = 4  # folders above a file in a dataset of the hub
NAMES = ("*.parquet", "*.arrow", "*.json", "*.jsonl")
# README.md names the configurations and their files.
FILES = ("README.md", *("*/" * depth + name for depth in range(DEPTH + 1) for name in NAMES))
HINT = "correct these rows, or set data.columns"


def identity(plan: Plan) -> dict[str, Any]:
    """What identifies the examples: the commit, or the hash of the local files; and what is read of them."""
    data = plan["data"]
    read = {key: data[key] for key in ("config", "split", "columns")}
    if data["dataset"]:
        return read | {"dataset": data["dataset"], "revision": data["revision"]}
    return read | {"sha256": _sha256(user_path(plan))}


def write(plan: Plan, folder: Path) -> None:
    """Download or read the rows, and write them as examples. JobError: faulty rows, no such dataset, no network."""
    cache = folder / "cache"
    downloaded = [fetch(one, plan["name"]) for one in repositories(plan)]
    files = _without_manifest(downloaded[0], cache / "files") if downloaded else user_path(plan)
    try:
        table = _read(plan, files, cache)
    except (KeyError, ValueError) as error:
        reason = f"no split {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise JobError(f"{_name(plan)}: {reason}", "correct data.config or data.split") from error
    examples = _examples(plan, table)
    split(examples, plan["seed"], folder)
    shutil.rmtree(cache, ignore_errors=True)


def repositories(plan: Plan) -> list[Repository]:
    """What `write` reads from the hub: the files of the dataset at its commit."""
    data = plan["data"]
    return [Repository(data["dataset"], "dataset", data["revision"], FILES, ())] if data["dataset"] else []


def _without_manifest(folder: Path, links: Path) -> Path:
    """A folder with links to the files of a downloaded one: `datasets` would read the guard's manifest.json as data."""
    for file in folder.rglob("*"):
        if file.is_file() and file != folder / manifest.NAME:
            link = links / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    return links


def place(plan: Plan, example: Example) -> str:
    """Where the example is: the dataset and the row, from 0."""
    return f"{_name(plan)} row {example[LINE]}"


def user_path(plan: Plan) -> Path:
    """Path of a local dataset; a relative data.path is below STAGE_PATH. JobError: there is nothing."""
    path = lines.below_stage_path("data.path", plan["data"]["path"])
    if not path.exists() or not os.access(path, os.R_OK):
        raise JobError(f"data.path: {path} does not exist or cannot be read", "give a path that every node can read")
    return path


def _read(plan: Plan, path: Path, cache: Path) -> Any:
    """The rows of the plan's split. KeyError, ValueError: there is no such split or configuration."""
    import datasets

    config, wanted = plan["data"]["config"], plan["data"]["split"]
    datasets.disable_progress_bars()
    if (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    if (path / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(path))[wanted]
    if path.is_dir():
        return datasets.load_dataset(str(path), config, split=wanted, cache_dir=str(cache))
    if path.suffix not in READERS:
        raise JobError(f"data.path: {path}: is no file of a dataset", f"use a folder, or a file *{', *'.join(READERS)}")
    return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train", cache_dir=str(cache))


def _examples(plan: Plan, table: Any) -> list[Example]:
    columns = _columns(plan, table.column_names)
    examples, faults = [], []
    for number, row in enumerate(table.select_columns(list(columns.values()))):
        try:
            examples.append(_example({key: row[name] for key, name in columns.items()}) | {LINE: number})
        except FaultError as fault:
            faults.append(f"{_name(plan)} row {number}: {fault}")
    lines.refuse(faults, HINT)
    lines.require_two(examples, _name(plan))
    return examples


def _columns(plan: Plan, there: list[str]) -> dict[str, str]:
    """The columns to read, by what they are: messages, tools, system, prompt, completion."""
    asked = {key: name for key, name in plan["data"]["columns"].items() if name}
    if missing := [name for name in asked.values() if name not in there]:
        raise JobError(f"data.columns: {_name(plan)} has no column {missing[0]}", f"its columns are {', '.join(there)}")
    if not asked.keys() - {"tools"}:
        known = ({"messages": "messages"}, {"messages": "conversations"}, {"prompt": "prompt", "completion": "completion"})
        found = next((choice for choice in known if set(choice.values()) <= set(there)), None)
        if not found:
            rule = f"{_name(plan)} has neither messages nor prompt and completion, but the columns {', '.join(there)}"
            raise JobError(rule, "set data.columns.messages, or data.columns.prompt and data.columns.completion")
        asked = found | asked
    if "messages" in asked:
        asked = {key: key for key in ("tools", "system") if key in there} | asked
    return asked


def _example(row: dict[str, Any]) -> Example:
    if "prompt" in row:
        for key in ("prompt", "completion"):
            if not isinstance(row[key], str) or not row[key].strip():
                raise FaultError(f"the {key} has no text")
        return {"input": row["prompt"], "output": row["completion"]}
    messages = row.pop("messages")
    from_value = isinstance(messages, list) and any(isinstance(one, dict) and "from" in one for one in messages)
    return conversation(row | {"conversations" if from_value else "messages": messages})


def _name(plan: Plan) -> str:
    data = plan["data"]
    return f"{data['dataset'] or data['path']} ({data['split']})"


def _sha256(path: Path) -> str:
    """Hash of a file, or of the names and contents of a folder's files."""
    if path.is_file():
        return sha256_of(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith((".", "cache-")))
    return sha256("".join(f"{file.relative_to(path)} {sha256_of(file)}\n" for file in files).encode()).hexdigest()
