"""Switch on the optimizations that the plan names. In: a recipe and a plan. Out: the recipe, changed.

Each optimization is a file of this folder with its name and a function `apply(recipe, plan)`. One that is off leaves the stock
recipe as it is. The catalogue's optimizations.toml has the measured effect and the numerics of each.
"""

from importlib import import_module
from typing import Any

from runtime.job.progress import say

Plan = dict[str, Any]
BEFORE_IMPORTS = ("fused_wgrad_accumulation",)  # Megatron-Core decides about these while it is imported


def before_imports(plan: Plan) -> None:
    """What must be done before NeMo and Megatron-Core are imported."""
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
