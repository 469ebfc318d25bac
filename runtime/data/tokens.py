"""Tokenize the examples of a plan, handle those that are too long, pack the rest, and count everything.

In: a plan, the folder of its examples, a tokenizer. Out: a folder with the arrays of store.py for each split, report.json
with the counts, and metadata.json, which NeMo's packed data set reads.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.data import bins, lines, store
from runtime.data.lines import Example, FaultError
from runtime.data.split import SPLITS, is_recipes
from runtime.data.tokenizer import Tokenizer, Tokens
from runtime.job.errors import JobError

Plan = dict[str, Any]
BATCH = 512  # examples that are tokenized together


class Fault(NamedTuple):
    """What is wrong with an example, and the number of its line for the order of the faults."""

    line: int
    text: str


def build(
    plan: Plan, examples: Path, tokenizer: Tokenizer, staging: Path, where: Callable[[str, Example], str], sha256: str
) -> None:
    """Write the folder. `where` tells the place of an example of a split in the user's data, `sha256` is that of the data.

    JobError: faulty or too long examples.
    """
    faults: list[Fault] = []
    long: list[Fault] = []
    report: dict[str, Any] = {}
    for split in SPLITS:
        counter = Counter(plan)
        for number, (example, tokens) in enumerate(_tokenized(tokenizer, examples / f"{split}.jsonl")):
            line = example.get(lines.LINE, number + 1)
            place = where(split, example) if lines.LINE in example else f"{split}.jsonl:{line}"
            if isinstance(tokens, FaultError):
                faults.append(Fault(line, f"{place}: {tokens}"))
            elif not counter.add(tokens, number, line):
                long.append(Fault(line, f"{place}: {len(tokens.ids)} tokens"))
        report[split] = counter.write(staging, split)
    lines.refuse([fault.text for fault in sorted(faults)], "correct these examples")
    _refuse_long(plan, [fault.text for fault in sorted(long)], report)
    if not report["training"]["examples"]:
        raise JobError("no example is left for the training: all are too long", "set a larger seq_length")
    metadata = [metadata for split in SPLITS if (metadata := report[split].pop("metadata", None))]
    (staging / "metadata.json").write_text(json.dumps(metadata) + "\n")
    (staging / "report.json").write_text(json.dumps({"sha256": sha256, **report}, indent=1) + "\n")


class Counter:
    """Counts the examples of one split, and keeps those that fit."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.writer = plan, store.Writer()
        self.longest = {"tokens": 0, "line": 0}
        self.too_long = self.truncated = self.dropped = 0

    def add(self, tokens: Tokens, number: int, line: int) -> bool:
        """Keep the example, cut or drop it. False if it is too long and data.too_long is "error"."""
        limit, length = self.plan["seq_length"], len(tokens.ids)
        if length > self.longest["tokens"]:
            self.longest = {"tokens": length, "line": line}
        kept: Tokens | None = tokens
        if length > limit:
            self.too_long += 1
            if self.plan["data"]["too_long"] == "error":
                return False
            kept = truncated(tokens, limit) if self.plan["data"]["too_long"] == "truncate" else None
            self.truncated += kept is not None
            self.dropped += kept is None
        if kept:
            self.writer.add(kept, number)
        return True

    def write(self, folder: Path, split: str) -> dict[str, Any]:
        """Write the arrays and the packs, and return the counts."""
        examples = self.writer.write(folder, split)
        counted = {
            "examples": len(examples),
            "tokens": len(examples.ids),
            "trained_tokens": int(examples.trained.sum()),
            "longest": self.longest,
            "too_long": self.too_long,
            "truncated": self.truncated,
            "dropped": self.dropped,
        }
        packs_itself = self.plan["data"]["packed"] and not is_recipes(self.plan) and len(examples)
        return counted | (_pack(self.plan, examples, folder, split) if packs_itself else {})


def truncated(tokens: Tokens, limit: int) -> Tokens | None:
    """The example with `limit` tokens, or None if it cannot be cut.

    An input loses its end and the output stays whole, as in NeMo; an output that leaves no room for the input cannot be
    cut. A conversation loses its end; if then no token is trained, it cannot be cut.
    """
    ids, trained, prompt = tokens
    if prompt is None:
        return Tokens(ids[:limit], trained[:limit], None) if trained[1:limit].any() else None
    kept = prompt - (len(ids) - limit)
    if kept < 1:
        return None
    return Tokens(np.delete(ids, slice(kept, prompt)), np.delete(trained, slice(kept, prompt)), kept)


def _pack(plan: Plan, examples: store.Examples, folder: Path, split: str) -> dict[str, Any]:
    # a sequence of n tokens has n - 1 pairs of a token and the token to predict, and only these are in a pack
    lengths = (examples.lengths() - 1).tolist()
    packs = bins.pack(lengths, plan["seq_length"], plan["seed"])
    store.write_packs(folder, split, packs)
    filled = [sum(lengths[number] for number in pack) for pack in packs]
    metadata = {
        "dataset_max_seqlen": max(lengths),
        "max_samples_per_bin": max(map(len, packs)),
        "min_packed_seqlen": min(filled),
        "pack_size": plan["seq_length"],
    }
    return {"packs": len(packs), "fill": sum(filled) / len(packs) / plan["seq_length"], "metadata": metadata}


def _refuse_long(plan: Plan, places: list[str], report: dict[str, Any]) -> None:
    """JobError if examples are too long and data.too_long is "error"."""
    if not places:
        return
    longest = max((counted["longest"] for counted in report.values()), key=lambda one: int(one["tokens"]))
    examples = sum(counted["examples"] for counted in report.values()) + len(places)
    lines.refuse(
        [f"{len(places)} of {examples} examples have more than {plan['seq_length']} tokens, which is seq_length", *places],
        f'set data.too_long = "drop" or "truncate", or a seq_length of at least {longest["tokens"]}',
    )


def _tokenized(tokenizer: Tokenizer, file: Path) -> Iterator[tuple[Example, Tokens | FaultError]]:
    batch: list[Example] = []
    with file.open(encoding="utf-8") as examples:
        for line in examples:
            batch.append(json.loads(line))
            if len(batch) == BATCH:
                yield from zip(batch, tokenizer.tokens(batch), strict=True)
                batch = []
    yield from zip(batch, tokenizer.tokens(batch), strict=True)
