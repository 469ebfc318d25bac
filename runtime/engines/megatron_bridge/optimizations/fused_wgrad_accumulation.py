"""Accumulate weight gradients in the GEMM that computes them, without APEX. See runtime/engines/wgrad.py.

In: a recipe. Out: the recipe with the fusion on.
"""

from typing import Any

from runtime.engines import needs
from runtime.engines.megatron_bridge.recipe import Recipe


def missing(_recipe: Recipe, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing("megatron.core.tensor_parallel.layers:_grad_accum_fusion_available")


def apply(recipe: Recipe, _plan: dict[str, Any]) -> None:
    """Switch the fusion on. The stand-in for APEX's extension is there already: see compatibility.py."""
    recipe.config.model.gradient_accumulation_fusion = True
