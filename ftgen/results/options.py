"""Options of a run: how its plan differs from the recipe. In: a plan, as read from JSON. Out: words such as `TP 2`.

Runs with different options are no repeats of each other, even if their work is the same.
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
    """`TP 2`, and the names of the optimizations that are on; empty without a plan."""
    if not plan:
        return ()
    sizes = ((short, _at(plan, path)) for short, path in SIZES.items())
    words = [f"{short} {size}" for short, size in sizes if isinstance(size, int) and size > 1]
    optimizations = plan.get("optimizations")
    if isinstance(optimizations, dict):
        words += sorted(str(name) for name, on in optimizations.items() if on is True)
    return tuple(words)


def shortly(words: Iterable[str]) -> str:
    """The sizes and the number of optimizations, for the head of a table."""
    sizes = [word for word in words if word.partition(" ")[0] in SIZES]
    rest = sum(word.partition(" ")[0] not in SIZES for word in words)
    count = [f"{rest} optimization{'s' if rest > 1 else ''}"] if rest else []
    return ", ".join(sizes + count)


def _at(plan: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = plan
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value
