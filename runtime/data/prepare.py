"""Prepare the training data, once for all jobs.

In: a plan and a tokenizer. Out: a folder with training.jsonl and validation.jsonl, one example per line, and a folder
with the tokens of these examples. If the engine reads and packs the data, as in the recipe, also a folder with its packs.

The guard publishes the folders below $STAGE_PATH/data, so ranks, nodes and jobs that start together prepare them
once. Each kind of data is a file of this package: `identity(plan)` gives what identifies its examples,
`write(plan, folder)` writes them, and `place(plan, example)` tells where the user finds an example of the user's own
data. A kind that reads the Hugging Face hub also has `repositories(plan)`. An example is {"input", "output"} or
{"messages"}; one of the user's also has "line".
"""

import json
import os
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from runtime.data import held_out, packing
from runtime.data.lines import LINE, Example
from runtime.data.split import SPLITS, is_recipes
from runtime.guard import manifest, publish
from runtime.guard.manifest import Source, sha256_of
from runtime.hub import fetch as hub
from runtime.hub.repository import Repository
from runtime.job.progress import timed

Plan = dict[str, Any]
FORMAT = 1  # version of the examples' format: part of their identity
TOKENS_FORMAT = 1  # version of the tokens' format
READ_BY_ENGINES = ("squad", "synthetic", "jsonl")  # kinds of data that the engines can read themselves


class Files(NamedTuple):
    """The folders of the data."""

    examples: Path  # training.jsonl, validation.jsonl
    tokens: Path  # arrays of store.py, report.json, metadata.json
    packed: Path | None  # of NeMo: training.npy, validation.npy, metadata.json; of Megatron-Bridge *.idx.parquet


def prepare(plan: Plan, tokenizer_folder: Path, packing: Any = packing) -> Files:
    """Prepare all that a training needs. `tokenizer_folder` has a Hugging Face tokenizer. JobError: faulty data.

    `packing` has the functions `index` and `pack` of the engine, as packing.py has NeMo's.
    """
    source = identity(plan)
    examples = _fetch(plan, source, packing)
    files = Files(examples, _tokens(plan, source, examples, tokenizer_folder), None)
    if plan["data"]["packed"] and is_recipes(plan):
        files = files._replace(packed=_packed(plan, source, examples, tokenizer_folder, packing))
    held_out.refuse_too_few(plan, *files)
    return files


def _packed(plan: Plan, source: Source, examples: Path, tokenizer_folder: Path, packing: Any) -> Path:
    """The folder of the engine's packs."""
    packed = {
        "kind": "packed examples",
        "examples": source,
        "tokenizer": sha256_of(tokenizer_folder / "tokenizer.json"),
        "seq_length": plan["seq_length"],
        "seed": plan["seed"],
    }
    if (ranks := plan["parallelism"]["context_parallel_size"]) > 1:
        packed["context_parallel_size"] = ranks  # examples are padded so that these ranks can share each
    packed_folder = _folder(f"{plan['data']['kind']}-packed-{plan['seq_length']}", packed)
    return publish.ensure(packed_folder, packed, lambda staging: packing.pack(plan, examples, tokenizer_folder, staging))


def repositories(plan: Plan) -> list[Repository]:
    """What the examples are made of, on the Hugging Face hub. Nothing, if the examples exist."""
    module = _module(plan["data"]["kind"])
    if not hasattr(module, "repositories"):
        return []
    examples = identity(plan)
    exist = manifest.flaw(_folder(plan["data"]["kind"], examples), examples) is None
    return [] if exist else list(module.repositories(plan))


def download(plan: Plan) -> None:
    """Have in STAGE_PATH what the examples are made of. A job does this in one task, before its ranks prepare the data.

    So not every rank waits for the hub, and no rank needs a hub cache that its node does not see.
    """
    for repository in repositories(plan):
        hub.fetch(repository, plan["name"], into_home=True)


def fetch(plan: Plan, packing: Any = packing) -> Path:
    """The folder of the examples. This is all that may need a network. JobError: faulty data, or no network."""
    return _fetch(plan, identity(plan), packing)


def tokenize(plan: Plan, tokenizer_folder: Path, packing: Any = packing) -> Path:
    """The folder of the tokens. Needs neither NeMo nor a GPU, except to read SQuAD. JobError: faulty data."""
    source = identity(plan)
    return _tokens(plan, source, _fetch(plan, source, packing), tokenizer_folder)


def identity(plan: Plan) -> Source:
    """What identifies the examples: two plans with the same identity use the same folder."""
    kind = plan["data"]["kind"]
    own: dict[str, Any] = _module(kind).identity(plan)
    has_index = kind in READ_BY_ENGINES and plan["engine"] != "nemo"  # the index of the lines is the engine's
    engine = {"engine": plan["engine"]} if has_index else {}
    return {"kind": f"{kind} examples", "format": FORMAT, "seed": plan["seed"]} | engine | own | held_out.identity(plan)


def _fetch(plan: Plan, source: Source, packing: Any) -> Path:
    folder = _folder(plan["data"]["kind"], source)
    return publish.ensure(folder, source, lambda staging: _build(plan, staging, packing))


def _tokens(plan: Plan, examples_source: Source, examples: Path, tokenizer_folder: Path) -> Path:
    from runtime.data import tokens  # needs numpy, which a machine that only downloads may not have
    from runtime.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(tokenizer_folder, plan["data"]["chat_template"])
    source = {
        "kind": "tokens",
        "format": TOKENS_FORMAT,
        "examples": examples_source,
        "tokenizer": tokenizer.identity(),
        "seq_length": plan["seq_length"],
        **{key: plan["data"][key] for key in ("too_long", "packed", "order")},
    }
    folder = _folder(f"{plan['data']['kind']}-tokens-{plan['seq_length']}", source)

    def where(split: str, example: Example) -> str:
        if split == "validation" and (file := held_out.file_of(plan)):
            return f"{file}:{example[LINE]}"
        return str(_module(plan["data"]["kind"]).place(plan, example))

    def build(staging: Path) -> None:
        sha256 = examples_source.get("sha256") or _sha256_of_examples(examples)
        with timed("tokenizing the data"):
            tokens.build(plan, examples, tokenizer, staging, where=where, sha256=sha256)

    return publish.ensure(folder, source, build)


def _sha256_of_examples(folder: Path) -> str:
    return sha256(b"".join((folder / f"{split}.jsonl").read_bytes() for split in SPLITS)).hexdigest()


def _folder(name: str, identity: dict[str, Any]) -> Path:
    short = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return Path(os.environ.get("STAGE_PATH") or Path.cwd(), "data", f"{name}-{short}")


def _build(plan: Plan, staging: Path, packing: Any) -> None:
    kind = plan["data"]["kind"]
    with timed(f"preparing the data: {kind}"):
        _module(kind).write(plan, staging)
        held_out.apply(plan, staging)
        if kind in READ_BY_ENGINES:
            packing.index(staging)


def _module(kind: str) -> Any:
    return import_module(f"runtime.data.{kind}")
