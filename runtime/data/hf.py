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
from runtime.guard.manifest import sha256_of
from runtime.job.errors import JobError

Plan = dict[str, Any]
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}  # of one file, by its suffix
FILES = ("*.parquet", "*.arrow", "*.json", "*.jsonl", "README.md")  # README.md names the configurations and their files
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
    files = download(plan) if plan["data"]["dataset"] else user_path(plan)
    cache = folder / "cache"
    try:
        table = _read(plan, files, cache)
    except (KeyError, ValueError) as error:
        reason = f"no split {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise JobError(f"{_name(plan)}: {reason}", "correct data.config or data.split") from error
    examples = _examples(plan, table)
    split(examples, plan["seed"], folder)
    shutil.rmtree(cache, ignore_errors=True)


def download(plan: Plan) -> Path:
    """Folder of the dataset's files, at its commit, in the cache of $HF_HOME. Needs huggingface_hub and nothing else.

    JobError: no such dataset or commit, no access, no network.
    """
    from huggingface_hub import errors, snapshot_download

    name, revision = plan["data"]["dataset"], plan["data"]["revision"]
    page = f"https://huggingface.co/datasets/{name}"
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=list(FILES)))
    except errors.RevisionNotFoundError as error:
        raise JobError(f"data.revision: {name} has no commit {revision}", f"see {page}/commits/main") from error
    except errors.RepositoryNotFoundError as error:  # and GatedRepoError
        what = f"{name} is no dataset of the Hugging Face hub, or there is no token with access to it"
        raise JobError(what, f"look at {page}; if it is private or gated, export HF_TOKEN=<your token>") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError) as error:
        hint = "run the script with --data on a machine with network: a job finds the data in STAGE_PATH"
        raise JobError(f"{name} is not in the cache, and the Hugging Face hub cannot be reached from here", hint) from error


def place(plan: Plan, example: Example) -> str:
    """Where the example is: the dataset and the row, from 0."""
    return f"{_name(plan)} row {example[LINE]}"


def user_path(plan: Plan) -> Path:
    """Path of a local dataset; a relative data.path is below STAGE_PATH. JobError: there is nothing."""
    path = lines.below_stage_path(plan)
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
