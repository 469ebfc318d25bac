"""Prepare the training data, once for all jobs.

In: a plan and a tokenizer. Out: a folder with training.jsonl and validation.jsonl, one {"input", "output"} per line.
If the plan packs its data, also a folder with these examples, tokenized and packed into sequences of seq_length
tokens.

The guard publishes both folders below $STAGE_PATH/data, so ranks, nodes and jobs that start together prepare them
once. Each kind of data is a file of this package with two functions: `identity(plan)` gives what identifies its
examples, `write(plan, folder)` writes them. A kind that reads the Hugging Face hub has a third: `repositories(plan)`.
"""

import json
import os
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from runtime.data import packing
from runtime.guard import manifest, publish
from runtime.guard.manifest import sha256_of
from runtime.hub.fetch import fetch
from runtime.hub.repository import Repository
from runtime.job.progress import timed

Plan = dict[str, Any]
FORMAT = 1  # version of the examples' format: part of their identity


class Files(NamedTuple):
    """The folders of the data."""

    examples: Path  # training.jsonl, validation.jsonl
    packed: Path | None  # training.npy, validation.npy, metadata.json; of Megatron-Bridge *.idx.parquet


def prepare(plan: Plan, tokenizer: Path, packing: Any = packing) -> Files:
    """Prepare what does not exist yet. `tokenizer` is the folder of a Hugging Face tokenizer. JobError: faulty data.

    `packing` has the functions `index` and `pack` of the engine, as packing.py has NeMo's.
    """
    examples = identity(plan)
    folder = _folder(plan["data"]["kind"], examples)
    publish.ensure(folder, examples, lambda staging: _build(plan, staging, packing))
    if not plan["data"]["packed"]:
        return Files(folder, None)
    packed = {
        "kind": "packed examples",
        "examples": examples,
        "tokenizer": sha256_of(tokenizer / "tokenizer.json"),
        "seq_length": plan["seq_length"],
        "seed": plan["seed"],
    }
    if (ranks := plan["parallelism"]["context_parallel_size"]) > 1:
        packed["context_parallel_size"] = ranks  # examples are padded so that these ranks can share each
    packed_folder = _folder(f"{plan['data']['kind']}-packed-{plan['seq_length']}", packed)
    publish.ensure(packed_folder, packed, lambda staging: packing.pack(plan, folder, tokenizer, staging))
    return Files(folder, packed_folder)


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
        fetch(repository, plan["name"], into_home=True)


def identity(plan: Plan) -> dict[str, Any]:
    """What identifies the examples: two plans with the same identity use the same folder."""
    kind = plan["data"]["kind"]
    own: dict[str, Any] = _module(kind).identity(plan)
    engine = {} if plan["engine"] == "nemo" else {"engine": plan["engine"]}  # the index of the lines is the engine's
    return {"kind": f"{kind} examples", "format": FORMAT, "seed": plan["seed"]} | engine | own


def _folder(name: str, identity: dict[str, Any]) -> Path:
    short = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return Path(os.environ.get("STAGE_PATH") or Path.cwd(), "data", f"{name}-{short}")


def _build(plan: Plan, staging: Path, packing: Any) -> None:
    kind = plan["data"]["kind"]
    with timed(f"preparing the data: {kind}"):
        _module(kind).write(plan, staging)
        packing.index(staging)


def _module(kind: str) -> Any:
    return import_module(f"runtime.data.{kind}")
