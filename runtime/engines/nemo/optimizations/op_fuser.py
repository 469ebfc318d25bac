"""Use Transformer Engine's op fuser for the MLP and the LoRA adapters. It rounds differently.

In: a recipe. Out: the recipe with the op fuser on.
"""

from typing import Any

from runtime.engines.nemo.optimizations import needs


def missing(recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing_in_config(recipe, "use_transformer_engine_op_fuser") or needs.missing(
        "megatron.core.extensions.transformer_engine:TEFusedMLP._make_fused_impl"
    )


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch the op fuser on."""
    recipe.model.config.use_transformer_engine_op_fuser = True
