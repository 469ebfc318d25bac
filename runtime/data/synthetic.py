"""Made-up examples with the statistics of SQuAD. In: a plan. Out: training.jsonl and validation.jsonl."""

import random
from pathlib import Path
from typing import Any

from runtime.data import synthetic_text
from runtime.data.split import split


def identity(plan: dict[str, Any]) -> dict[str, Any]:
    """How many examples there are."""
    return {"examples": plan["data"]["examples"]}


def write(plan: dict[str, Any], folder: Path) -> None:
    """Make plan["data"]["examples"] examples from the seed."""
    rng = random.Random(plan["seed"])  # noqa: S311
    split([synthetic_text.example(rng) for _ in range(plan["data"]["examples"])], plan["seed"], folder)
