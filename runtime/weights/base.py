"""Keep what a base model has beside its weights: config, tokenizer, chat template, license, and the list of its tensors.

In: a directory in Hugging Face format. Out: a folder with these small files and tensors.json.

A conversion keeps them beside the converted checkpoint, because the engines' own formats lose them. An export puts them
beside the exported weights, and compares the exported tensors with tensors.json.
"""

import json
import shutil
from collections.abc import Container
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from runtime.job.errors import JobError
from runtime.weights import shards
from runtime.weights.shards import Entry

FOLDER = "hugging_face"  # in a converted checkpoint
TENSORS = "tensors.json"
# Small files of a model, in the top folder of its repository. Licenses such as Llama's must go with every copy.
SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def keep(model: Path, folder: Path) -> None:
    """Copy the small files of `model` into the new `folder`, and list its tensors. JobError: a file is damaged."""
    try:
        tensors = shards.entries(model, shards.files_of(model))
    except (OSError, ValueError) as error:
        raise JobError(f"the weights in {model} are damaged: {error}", "download or copy them again") from error
    folder.mkdir()
    copy(model, folder)
    listed = {name: {"dtype": it.dtype, "shape": it.shape, "file": it.file} for name, it in tensors.items()}
    (folder / TENSORS).write_text(json.dumps(listed, indent=1) + "\n")


def copy(model: Path, folder: Path, without: Container[str] = ()) -> None:
    """Copy the small files of `model` into `folder`. A file of the hub's cache is a link; the copy is a file."""
    for path in sorted(model.iterdir()):
        if path.is_file() and path.name not in without and any(fnmatch(path.name, pattern) for pattern in SMALL):
            shutil.copyfile(path, folder / path.name)


def set_chat_template(folder: Path, text: str) -> None:
    """Give the tokenizer in `folder` the chat template that the training used. Older versions of transformers read it from
    tokenizer_config.json, newer ones from the file.
    """
    (folder / "chat_template.jinja").write_text(text)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": text}, indent=2) + "\n")


def tensors(folder: Path) -> dict[str, Entry]:
    """The tensors of the base, by name, in the order of its files."""
    document: dict[str, Any] = json.loads((folder / TENSORS).read_text())
    return {name: Entry(it["dtype"], tuple(it["shape"]), it["file"]) for name, it in document.items()}


def config(folder: Path) -> dict[str, Any]:
    """config.json."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
