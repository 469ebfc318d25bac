"""Apply LoRA's scale to the small tensor between the adapter's two matrices.

In: nothing of the recipe. Out: NeMo's adapter class, changed for this process.
"""

from typing import Any

import torch


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Change the adapters of this process."""
    scale_small_tensor()


def scale_small_tensor() -> None:
    """Multiply [tokens, rank] by alpha / rank, instead of the adapter's output [tokens, features].

    The same bits where alpha / rank is a power of two. For one tensor-parallel rank and no dropout.
    """
    from nemo.collections.llm.peft.utils import ParallelLinearAdapter

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.linear_in(x)
        x, _ = self.linear_out(self.activation(x) * (self.alpha / self.dim))
        return x

    ParallelLinearAdapter.forward = forward
