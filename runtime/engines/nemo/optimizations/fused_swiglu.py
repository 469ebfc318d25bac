"""Use Transformer Engine's fused SwiGLU, which in FP8 includes the cast.

In: a recipe. Out: the recipe with the op fuser on for the MLP.
"""

from typing import Any

from runtime.engines.nemo.optimizations import op_fuser


def missing(recipe: Any, plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return op_fuser.missing(recipe, plan)


def apply(recipe: Any, plan: dict[str, Any]) -> None:
    """Switch the op fuser on for the MLP. Adapters are not fused, unless the plan also has op_fuser on."""
    recipe.model.config.use_transformer_engine_op_fuser = True
    if not plan["optimizations"]["op_fuser"]:
        from nemo.collections.llm.peft import lora

        lora.HAVE_TE_FUSED_LORA = False  # otherwise the setting would also fuse the adapters, which rounds their input
