"""Show the training data of a plan: its counts, and one example as the model sees it, with the trained text marked.

In: a plan. Out: text on stdout, exit code 0. Needs no GPU. JobError: faulty data, or no tokenizer.

The data is prepared as for a training, so a training that starts later finds it ready.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from runtime import engines
from runtime.data import packing, prepare, report, store
from runtime.data.split import SPLITS, is_recipes
from runtime.data.tokenizer import Tokenizer
from runtime.hub import find
from runtime.hub.fetch import fetch
from runtime.job.names import ENGINES
from runtime.weights import checkpoint, hub, random_llama

Plan = dict[str, Any]
BEGIN, END = "{+", "+}"  # around trained text, as `git diff --word-diff` marks what was added
GREEN, PLAIN = "\x1b[1;32m", "\x1b[0m"
# transformers imports torch if it can, which takes seconds, and tokenizers do not need it
WITHOUT_TORCH = {"USE_TORCH": "0", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
SHOWN = 4000  # characters of the example


def show(plan: Plan) -> int:
    """Prepare the data and print what it is."""
    if plan["data"]["kind"] not in prepare.READ_BY_ENGINES:
        os.environ |= WITHOUT_TORCH
    with tempfile.TemporaryDirectory() as scratch:
        folder = tokenizer(plan, Path(scratch))
        own = packing if plan["engine"] == "nemo" else engines.module(plan, "packing")
        tokens = prepare.tokenize(plan, folder, own)
        counted = report.read(tokens)
        print("\n".join([*_source(plan, counted), "", *_table(counted), "", *_steps(plan, counted)]))
        print(f"\nThe first example of the training, as the model sees it. The loss counts the text in {BEGIN}...{END}:\n")
        print(
            example(Tokenizer(folder, plan["data"]["chat_template"]), store.Examples(tokens, "training"), colour=_colour())
        )
    return 0


def tokenizer(plan: Plan, scratch: Path) -> Path:
    """The folder of the model's tokenizer: of the converted checkpoint, or else of its source. Writes only to `scratch`."""
    if checkpoint.converted(plan):
        return checkpoint.tokenizer(plan)
    source, model = plan["checkpoint"]["source"], plan["model"]
    if source == "directory":
        return checkpoint.user_directory(plan)
    if source == "random":
        random_llama.write_tokenizer(model["vocab_size"], model["max_position_embeddings"], scratch)
        return scratch
    return find.find(hub.repository(plan)) or fetch(hub.tokenizer(plan), plan["name"], into_home=True)


def example(reader: Tokenizer, examples: store.Examples, *, colour: bool) -> str:
    """The text of the first example, with marks around its trained text. At most `SHOWN` characters."""
    ids, trained, _ = examples[0]
    text = ""
    for is_trained, group in groupby(zip(trained.tolist(), ids.tolist(), strict=True), key=lambda pair: pair[0]):
        part = _printable(reader.text([number for _, number in group]))
        marked = f"{BEGIN}{part}{END}"
        text += (f"{GREEN}{marked}{PLAIN}" if colour else marked) if is_trained else part
        if len(text) > SHOWN:
            return f"{text[:SHOWN]}{PLAIN if colour else ''} ..."
    return text


def _source(plan: Plan, counted: report.Report) -> Iterator[str]:
    data = plan["data"]
    where = data["path"] or data["dataset"] or ""
    yield f"{plan['experiment']}: {data['kind']} data {where}".rstrip()
    yield f"sha256 {counted['sha256']}"
    for warning in report.warnings(plan, counted):
        yield f"warning: {warning}"


def _table(counted: report.Report) -> Iterator[str]:
    """A row for each count, a column for each split."""
    yield f"{'':18}" + "".join(f"{split:>14}" for split in SPLITS)
    counts = [counted[split] for split in SPLITS]
    rows = {
        "examples": [f"{each['examples']:,}" for each in counts],
        "tokens": [f"{each['tokens']:,}" for each in counts],
        "trained tokens": [f"{each['trained_tokens']:,}" for each in counts],
        "longest example": [f"{each['longest']['tokens']:,}" for each in counts],
        "too long": [f"{each['too_long']:,}" for each in counts],
        "truncated": [f"{each['truncated']:,}" for each in counts],
        "dropped": [f"{each['dropped']:,}" for each in counts],
    }
    if any("packs" in each for each in counts):
        rows["packs"] = [f"{each.get('packs', 0):,}" for each in counts]
        rows["fill of a pack"] = [f"{each.get('fill', 0):.1%}" for each in counts]
    for name, values in rows.items():
        yield f"{name:18}" + "".join(f"{value:>14}" for value in values)


def _steps(plan: Plan, counted: report.Report) -> Iterator[str]:
    if plan["data"]["packed"] and is_recipes(plan):
        engine, length = ENGINES[plan["engine"]], plan["seq_length"]
        yield f"{engine} packs these examples into sequences of {length} tokens when the job runs."
        return
    samples, what = report.samples_of(counted["training"])
    batch = plan["global_batch_size"]
    if plan["epochs"]:
        yield report.epochs_text(plan, counted)
    else:
        yield f"{plan['max_steps']} steps of {batch} {what} are {plan['max_steps'] * batch / samples:.1f} epochs."


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
