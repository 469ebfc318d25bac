"""Split examples into training and validation.

In: a list of examples. Out: training.jsonl and validation.jsonl.
"""

import json
import random
from pathlib import Path
from typing import Any

SPLITS = ("training", "validation")
VALIDATION = 0.05  # fraction of all examples, the same as in NeMo's SQuAD module


def split(examples: list[dict[str, str]], seed: int, folder: Path, fraction: float = VALIDATION) -> None:
    """Write both files; `fraction` of the examples is held out. Each file keeps the order of the examples."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)  # noqa: S311
    count = max(1, round(len(examples) * fraction))
    for name, numbers in (("validation", order[:count]), ("training", order[count:])):
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(examples[number]) + "\n" for number in sorted(numbers))


def is_recipes(plan: dict[str, Any]) -> bool:
    """Whether the engine reads, packs and orders the examples, as in the recipe. Then ftgen only counts the tokens."""
    return bool(plan["data"]["order"] == "recipe")
