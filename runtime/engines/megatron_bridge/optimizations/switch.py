"""Switch on the optimizations that the plan selects, in Megatron-Bridge's recipe. See runtime/engines/switching.py.

In: a recipe and a plan. Out: the recipe, changed.
"""

from typing import Any

from runtime.engines import switching

Plan = dict[str, Any]


def unavailable(recipe: Any, plan: Plan) -> dict[str, str]:
    """Those optimizations of the plan that the installed packages cannot do, and what they lack."""
    return switching.unavailable(str(__package__), recipe, plan)


def apply(recipe: Any, plan: Plan, off: dict[str, str]) -> None:
    """Apply every optimization of the plan, except those that are `unavailable`."""
    switching.apply(str(__package__), recipe, plan, off)
