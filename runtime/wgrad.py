"""Weight gradients added where they are kept, without APEX. In: a GEMM's operands. Out: nothing; `main_grad` grows.

Stands in for APEX's extension `fused_weight_gradient_mlp_cuda`, whose presence Megatron-Core and NeMo take for leave to
fuse: Transformer Engine's own GEMMs then accumulate into main_grad, and these two serve Megatron's LM head.
"""

import torch


def wgrad_gemm_accum_fp16(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] += grad_outputᵀ [out, n] @ inputs [n, in], all of one 16-bit type."""
    main_grad.addmm_(grad_output.t(), inputs)


def wgrad_gemm_accum_fp32(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] (float32) += grad_outputᵀ [out, n] @ inputs [n, in]."""
    main_grad.add_(grad_output.t() @ inputs)
