"""The forward pass of a LoRA adapter, with its scale on the small tensor. Both engines' adapters have the same parts.

In: an adapter. Out: its output.
"""

from typing import Any

import torch


def forward(self: Any, x: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    """Multiply [tokens, rank] by alpha / rank, instead of the adapter's output [tokens, features].

    The result has the same bits if alpha / rank is a power of two. Requires TP = 1 and no dropout.
    """
    x, _ = self.linear_in(x)
    x, _ = self.linear_out(self.activation(x) * (self.alpha / self.dim))
    return x
