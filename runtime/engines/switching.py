"""Switch on the optimizations that the plan selects.

In: an engine's package of optimizations, a recipe and a plan. Out: the recipe, changed.

Each optimization is a file of the package with two functions: `missing(recipe, plan)` says what the installed packages
lack for it, `apply(recipe, plan)` switches it on. If it is off, the stock recipe stays as it is. The catalogue's
optimizations.toml describes the measured effect and the numerics of each.
"""

from importlib import import_module
from typing import Any

from runtime.job.progress import say

Plan = dict[str, Any]


def unavailable(package: str, recipe: Any, plan: Plan) -> dict[str, str]:
    """Those optimizations of the plan that the installed packages cannot do, and what they lack."""
    lacking = {name: module(package, name).missing(recipe, plan) for name in _selected(plan)}
    return {name: phrase for name, phrase in lacking.items() if phrase}


def apply(package: str, recipe: Any, plan: Plan, off: dict[str, str]) -> None:
    """Apply every optimization of the plan, except those that are `unavailable`."""
    on = [name for name in _selected(plan) if name not in off]
    say(f"optimizations: {', '.join(on) or 'none, the stock recipe'}")
    for name, lacking in off.items():
        say(f"warning: the optimization {name} is off: {lacking}")
    for name in on:
        module(package, name).apply(recipe, plan)


def module(package: str, name: str) -> Any:
    """The module of an optimization."""
    return import_module(f"{package}.{name}")


def _selected(plan: Plan) -> list[str]:
    return [name for name, is_on in plan["optimizations"].items() if is_on]
