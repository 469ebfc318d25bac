"""How a run's work was done, where that is not the recipe's way. In: a plan as its JSON has it. Out: words.

Runs whose words differ are no repeats of each other, though the work is the same.
"""

from collections.abc import Iterable, Mapping
from typing import Any

SIZES = {
    "MBS": ("micro_batch_size",),
    "TP": ("parallelism", "tensor_model_parallel_size"),
    "PP": ("parallelism", "pipeline_model_parallel_size"),
    "CP": ("parallelism", "context_parallel_size"),
}


def options(plan: Mapping[str, Any] | None) -> tuple[str, ...]:
    """`TP 2`, and the names of the optimizations that are on; nothing for a plan that says nothing, or for none."""
    if not plan:
        return ()
    words = sizes(plan)
    optimizations = plan.get("optimizations")
    if isinstance(optimizations, dict):
        words += sorted(str(name) for name, on in optimizations.items() if on is True)
    return tuple(words)


def sizes(plan: Mapping[str, Any]) -> list[str]:
    """`MBS 2`, `TP 2`, `PP 2`, `CP 2`: those that are more than 1."""
    found = ((short, at(plan, path)) for short, path in SIZES.items())
    return [f"{short} {size}" for short, size in found if isinstance(size, int) and size > 1]


def shortly(words: Iterable[str]) -> str:
    """The sizes, and how many optimizations: for a table's head."""
    large = [word for word in words if word.partition(" ")[0] in SIZES]
    rest = sum(word.partition(" ")[0] not in SIZES for word in words)
    count = [f"{rest} optimization{'s' if rest > 1 else ''}"] if rest else []
    return ", ".join(large + count)


def at(plan: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The value at a path of keys; None where there is none."""
    value: Any = plan
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value
