"""Do not check the gradients and the loss of each step for NaN.

In: a recipe. Out: the recipe with other settings.
"""

from typing import Any

from runtime.engines.megatron_bridge.recipe import Recipe


def missing(_recipe: Recipe, _plan: dict[str, Any]) -> str:
    """Nothing: all versions that can train have the settings."""
    return ""


def apply(recipe: Recipe, _plan: dict[str, Any]) -> None:
    """Switch both checks off."""
    recipe.config.ddp.check_for_nan_in_grad = False
    recipe.config.rerun_state_machine.check_for_nan_in_loss = False
