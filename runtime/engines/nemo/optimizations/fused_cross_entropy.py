"""Use Transformer Engine's fused cross entropy.

In: a recipe. Out: the recipe with another loss in its model's config.
"""

from typing import Any

from runtime.engines.nemo.optimizations import needs


def missing(recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing_in_config(recipe, "cross_entropy_fusion_impl") or needs.missing(
        "megatron.core.extensions.transformer_engine:te_parallel_cross_entropy"
    )


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch the fused loss on. It is correct only with micro_batch_size = 1 (Transformer Engine 2.9)."""
    recipe.model.config.cross_entropy_loss_fusion = True
    recipe.model.config.cross_entropy_fusion_impl = "te"
