"""Use Transformer Engine's fused SwiGLU, in FP8 with the cast in it. In: a recipe. Out: the recipe, changed."""

from typing import Any


def apply(recipe: Any, plan: dict[str, Any]) -> None:
    """Switch the op fuser on for the MLP alone, unless the plan has all of it on."""
    recipe.model.config.use_transformer_engine_op_fuser = True
    if not plan["optimizations"]["op_fuser"]:
        from nemo.collections.llm.peft import lora

        lora.HAVE_TE_FUSED_LORA = False  # the same setting would also fuse the adapters, which rounds their input
