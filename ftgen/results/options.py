"""Options of a run: how it differs from the recipe.

In: its plan and its environment, as read from JSON. Out: words such as `TP 2`.

Runs with different options are no repeats of each other, even if their work is the same.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ftgen.documents import get

SIZES = {
    "MBS": ("micro_batch_size",),
    "TP": ("parallelism", "tensor_model_parallel_size"),
    "PP": ("parallelism", "pipeline_model_parallel_size"),
    "CP": ("parallelism", "context_parallel_size"),
}
RECIPE_TARGETS = ["linear_qkv"]  # of LoRA
RECIPE_ENGINE = "nemo"
ENGINE = "engine "  # begins the option of a run with another engine


def options(plan: Mapping[str, Any] | None, environment: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """`TP 2`, and the names of the optimizations that were on; empty without a plan."""
    if not plan:
        return ()
    words = [*sizes(plan), *other_work(plan)]
    optimizations = plan.get("optimizations")
    if isinstance(optimizations, dict):
        words += sorted(str(name) for name, on in optimizations.items() if on is True and name not in off(environment))
    return tuple(words)


def off(environment: Mapping[str, Any] | None) -> dict[str, str]:
    """Optimizations of the plan that the packages of the job could not do, and what they lack."""
    told = (environment or {}).get("optimizations_off")
    return {str(name): str(lacking) for name, lacking in told.items()} if isinstance(told, dict) else {}


def sizes(plan: Mapping[str, Any]) -> list[str]:
    """`MBS 2`, `TP 2`, `PP 2`, `CP 2`: those that are more than 1."""
    found = ((short, get(plan, path)) for short, path in SIZES.items())
    return [f"{short} {size}" for short, size in found if isinstance(size, int) and size > 1]


def other_work(plan: Mapping[str, Any]) -> list[str]:
    """`engine megatron_bridge`, `not packed`, `LoRA on linear_qkv+linear_fc1`: why it is other work than the recipe's."""
    found = list(option_of_engine(get(plan, ("engine",))))
    if found and get(plan, ("fp8_scaling",)) == "delayed":
        found.append("delayed FP8 scaling")
    if get(plan, ("data", "packed")) is False:
        found.append("not packed")
    targets = get(plan, ("lora", "targets"))
    if isinstance(targets, list) and targets != RECIPE_TARGETS:
        found.append(f"LoRA on {'+'.join(map(str, targets))}")
    return found


def option_of_engine(engine: str | None) -> tuple[str, ...]:
    """`engine megatron_bridge`; nothing for the recipe's engine, or an unknown one."""
    return () if engine in (None, RECIPE_ENGINE) else (f"{ENGINE}{engine}",)


def engine_of(words: Iterable[str]) -> str:
    """The option that names another engine than the recipe's; "" if there is none."""
    return next((word for word in words if word.startswith(ENGINE)), "")


def is_optimization(word: str) -> bool:
    """Whether an option is the name of an optimization."""
    return " " not in word


def shortly(words: Iterable[str]) -> str:
    """The sizes, the other work and the number of optimizations, for the head of a table."""
    large = [word for word in words if not is_optimization(word)]
    rest = sum(map(is_optimization, words))
    count = [f"{rest} optimization{'s' if rest > 1 else ''}"] if rest else []
    return ", ".join(large + count)
