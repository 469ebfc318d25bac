"""Switch on the optimizations that the plan selects, in NeMo's recipe. See runtime/engines/switching.py.

In: a recipe and a plan. Out: the recipe, changed.
"""

from typing import Any

from runtime.engines import switching

Plan = dict[str, Any]
BEFORE_IMPORTS = ("fused_wgrad_accumulation",)  # Megatron-Core decides about these while it is imported


def before_imports(plan: Plan) -> None:
    """Prepare those optimizations that need it before NeMo and Megatron-Core are imported."""
    for name in BEFORE_IMPORTS:
        if plan["optimizations"][name]:
            switching.module(str(__package__), name).before_imports()


def unavailable(recipe: Any, plan: Plan) -> dict[str, str]:
    """Those optimizations of the plan that the installed packages cannot do, and what they lack."""
    return switching.unavailable(str(__package__), recipe, plan)


def apply(recipe: Any, plan: Plan, off: dict[str, str]) -> None:
    """Apply every optimization of the plan, except those that are `unavailable`."""
    switching.apply(str(__package__), recipe, plan, off)
