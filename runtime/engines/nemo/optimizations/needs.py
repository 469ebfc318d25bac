"""Find out whether the installed packages and the recipe have what an optimization uses. See runtime/engines/needs.py.

In: names. Out: the first one that is not there, as a phrase.
"""

from typing import Any

from runtime.engines.needs import has, missing

__all__ = ["missing", "missing_in_config"]


def missing_in_config(recipe: Any, *fields: str) -> str:
    """What is missing of these fields in the config of the recipe's model, which differs from model to model."""
    config = recipe.model.config.__fn_or_cls__
    lacking = [field for field in fields if not has(config, field)]
    return f"NeMo's {config.__name__} has no {lacking[0]}" if lacking else ""
