"""Accumulate weight gradients in the GEMM that computes them, without APEX.

In: a recipe. Out: the recipe with the fusion on.

Megatron-Core and NeMo use the fusion only if they can import APEX's extension `fused_weight_gradient_mlp_cuda`. This
module stands in for that extension. Then the GEMMs of Transformer Engine accumulate into main_grad, and the two
`wgrad_gemm` functions below do the same for Megatron's LM head.
"""

import sys
from typing import Any

import torch

from runtime.engines.nemo.optimizations import needs


def missing(recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing_in_config(recipe, "gradient_accumulation_fusion") or needs.missing(
        "megatron.core.tensor_parallel.layers:_grad_accum_fusion_available"
    )


def before_imports() -> None:
    """Make this module importable as the extension, before Megatron-Core looks for it."""
    sys.modules.setdefault("fused_weight_gradient_mlp_cuda", sys.modules[__name__])


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch the fusion on."""
    recipe.model.config.gradient_accumulation_fusion = True


def wgrad_gemm_accum_fp16(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] += grad_outputᵀ [out, n] @ inputs [n, in]; all have the same 16-bit type."""
    main_grad.addmm_(grad_output.t(), inputs)


def wgrad_gemm_accum_fp32(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] (float32) += grad_outputᵀ [out, n] @ inputs [n, in]."""
    main_grad.add_(grad_output.t() @ inputs)
