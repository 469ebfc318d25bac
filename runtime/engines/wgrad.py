"""Stand in for APEX's extension that accumulates weight gradients in the GEMM that computes them.

In: a process that has not imported Megatron-Core. Out: `fused_weight_gradient_mlp_cuda` can be imported.

Megatron-Core, NeMo and Megatron-Bridge use the fusion only if they can import the extension. With the stand-in, the GEMMs
of Transformer Engine accumulate into main_grad, and the two functions below do the same for Megatron's LM head.
"""

import sys

import torch

EXTENSION = "fused_weight_gradient_mlp_cuda"


def stand_in_for_apex() -> None:
    """Make this module importable as the extension, before Megatron-Core looks for it."""
    sys.modules.setdefault(EXTENSION, sys.modules[__name__])


def is_stand_in() -> bool:
    """Whether this module stands in for the extension."""
    return sys.modules.get(EXTENSION) is sys.modules[__name__]


def wgrad_gemm_accum_fp16(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] += grad_outputᵀ [out, n] @ inputs [n, in]; all have the same 16-bit type."""
    main_grad.addmm_(grad_output.t(), inputs)


def wgrad_gemm_accum_fp32(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] (float32) += grad_outputᵀ [out, n] @ inputs [n, in]."""
    main_grad.add_(grad_output.t() @ inputs)
