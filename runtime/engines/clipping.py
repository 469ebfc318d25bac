"""By what the gradients are scaled, without waiting for the GPU.

In: the norm of all gradients, on the GPU. Out: the factor, on the GPU. Megatron-Core computes it on the CPU, in float64.
"""

import torch

EPSILON = 1.0e-6  # that Megatron-Core adds to the norm


def factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """The factor in float32, from a norm in float64: 1 if the norm is not larger than `max_norm`, or is NaN."""
    by = torch.full_like(norm, max_norm) / (norm + EPSILON)  # a number / a tensor would be its reciprocal * number
    return by.masked_fill(~(by < 1.0), 1.0).float()
