"""The forward pass of a LoRA adapter, in two faster forms. Both engines' adapters have the same parts.

In: an adapter. Out: its output, or the sum with that of the frozen layer. Requires TP = 1 and no dropout.
"""

from typing import Any

import torch


def forward(self: Any, x: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    """Multiply [tokens, rank] by alpha / rank, instead of the adapter's output [tokens, features].

    The result has the same bits if alpha / rank is a power of two.
    """
    x, _ = self.linear_out(small(self, x))
    return x


def small(adapter: Any, x: torch.Tensor) -> torch.Tensor:
    """The tensor between the two matrices, [..., rank], times alpha / rank."""
    x, _ = adapter.linear_in(x)
    scaled: torch.Tensor = adapter.activation(x) * (adapter.alpha / adapter.dim)
    return scaled


class AddProduct(torch.autograd.Function):  # type: ignore[misc]
    """add(sum [..., features], small [..., rank], weight [features, rank]) -> sum + small @ weight.T, in the memory of sum.

    The GEMM itself adds, in float32, and rounds once. Nobody else may have kept the sum.
    """

    @staticmethod
    def forward(ctx: Any, total: torch.Tensor, factor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Add the product."""
        ctx.save_for_backward(factor, weight)
        total = total.detach()
        total.view(-1, total.shape[-1]).addmm_(factor.reshape(-1, factor.shape[-1]), weight.t())
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of the three."""
        factor, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        return gradient, (rows @ weight).view_as(factor), rows.t() @ factor.reshape(-1, factor.shape[-1])
