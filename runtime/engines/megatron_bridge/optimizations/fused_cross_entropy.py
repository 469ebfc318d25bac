"""Use Transformer Engine's fused cross entropy.

In: a recipe. Out: the recipe with another loss in its model's config.
"""

from typing import Any

from runtime.engines import needs
from runtime.engines.megatron_bridge.recipe import Recipe


def missing(_recipe: Recipe, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing("megatron.core.extensions.transformer_engine:te_parallel_cross_entropy")


def apply(recipe: Recipe, _plan: dict[str, Any]) -> None:
    """Switch the fused loss on."""
    recipe.config.model.cross_entropy_loss_fusion = True
    recipe.config.model.cross_entropy_fusion_impl = "te"
