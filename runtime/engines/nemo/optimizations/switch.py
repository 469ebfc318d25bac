"""Switch on the optimizations that the plan selects.

In: a recipe and a plan. Out: the recipe, changed.

Each optimization is a file of this folder with two functions: `missing(recipe, plan)` says what the installed packages
lack for it, `apply(recipe, plan)` switches it on. If it is off, the stock recipe stays as it is. The catalogue's
optimizations.toml describes the measured effect and the numerics of each.
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


def unavailable(recipe: Any, plan: Plan) -> dict[str, str]:
    """Those optimizations of the plan that the installed packages cannot do, and what they lack."""
    lacking = {name: _module(name).missing(recipe, plan) for name in _selected(plan)}
    return {name: phrase for name, phrase in lacking.items() if phrase}


def apply(recipe: Any, plan: Plan, off: dict[str, str]) -> None:
    """Apply every optimization of the plan, except those that are `unavailable`."""
    on = [name for name in _selected(plan) if name not in off]
    say(f"optimizations: {', '.join(on) or 'none, the stock recipe'}")
    for name, lacking in off.items():
        say(f"warning: the optimization {name} is off: {lacking}")
    for name in on:
        _module(name).apply(recipe, plan)


def _selected(plan: Plan) -> list[str]:
    return [name for name, is_on in plan["optimizations"].items() if is_on]


def _module(name: str) -> Any:
    return import_module(f"{__package__}.{name}")
