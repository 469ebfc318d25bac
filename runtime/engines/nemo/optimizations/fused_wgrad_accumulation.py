"""Accumulate weight gradients in the GEMM that computes them, without APEX.

In: a recipe. Out: the recipe with the fusion on.

runtime/engines/wgrad.py stands in for APEX's extension, without which Megatron-Core and NeMo do not use the fusion.
"""

from typing import Any

from runtime.engines import wgrad
from runtime.engines.nemo.optimizations import needs


def missing(recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing_in_config(recipe, "gradient_accumulation_fusion") or needs.missing(
        "megatron.core.tensor_parallel.layers:_grad_accum_fusion_available"
    )


def before_imports() -> None:
    """Stand in for APEX's extension."""
    wgrad.stand_in_for_apex()


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch the fusion on."""
    recipe.model.config.gradient_accumulation_fusion = True
