"""LoRA's adapters with less to do. In: nothing. Out: NeMo's adapter class, changed for this process."""

from typing import Any

import torch


def scale_small_tensor() -> None:
    """Multiply by alpha / rank between the two matrices, [tokens, rank], rather than behind them, [tokens, features].

    The same bits where alpha / rank is a power of two. For one tensor-parallel rank and no dropout.
    """
    from nemo.collections.llm.peft.utils import ParallelLinearAdapter

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.linear_in(x)
        x, _ = self.linear_out(self.activation(x) * (self.alpha / self.dim))
        return x

    ParallelLinearAdapter.forward = forward
