"""Do not check the gradients of each step for NaN.

In: a recipe. Out: the recipe with other data-parallel settings.
"""

from typing import Any

from runtime.engines.nemo.recipe import ddp


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch the check off."""
    recipe.trainer.strategy.ddp = ddp(recipe, check_for_nan_in_grad=False)
