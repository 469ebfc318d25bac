"""Generate synthetic examples that are as long as those of SQuAD.

In: a plan with data.examples and a seed. Out: training.jsonl and validation.jsonl.
"""

import random
from pathlib import Path
from typing import Any

from runtime.data import synthetic_text
from runtime.data.split import split


def identity(plan: dict[str, Any]) -> dict[str, Any]:
    """What identifies the examples, beside the seed: their number."""
    return {"examples": plan["data"]["examples"]}


def write(plan: dict[str, Any], folder: Path) -> None:
    """Generate plan["data"]["examples"] examples from the seed."""
    rng = random.Random(plan["seed"])  # noqa: S311
    split([synthetic_text.example(rng) for _ in range(plan["data"]["examples"])], plan["seed"], folder)
