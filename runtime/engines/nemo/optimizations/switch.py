"""Switch on the optimizations that the plan selects.

In: a recipe and a plan. Out: the recipe, changed.

Each optimization is a file of this folder with a function `apply(recipe, plan)`. If it is off, the stock recipe stays
as it is. The catalogue's optimizations.toml describes the measured effect and the numerics of each.
"""

from importlib import import_module
from typing import Any

from runtime.job.progress import say

Plan = dict[str, Any]
BEFORE_IMPORTS = ("fused_wgrad_accumulation",)  # Megatron-Core decides about these while it is imported


def before_imports(plan: Plan) -> None:
    """Prepare those optimizations that need it before NeMo and Megatron-Core are imported."""
    for name in BEFORE_IMPORTS:
        if plan["optimizations"][name]:
            _module(name).before_imports()


def apply(recipe: Any, plan: Plan) -> None:
    """Apply every optimization that is on."""
    on = [name for name, is_on in plan["optimizations"].items() if is_on]
    say(f"optimizations: {', '.join(on) or 'none, the stock recipe'}")
    for name in on:
        _module(name).apply(recipe, plan)


def _module(name: str) -> Any:
    return import_module(f"{__package__}.{name}")
