"""Apply LoRA's scale to the small tensor between the adapter's two matrices.

In: a recipe, which stays as it is. Out: NeMo's adapter class, changed for this process.
"""

from typing import Any

import torch

from runtime.engines.nemo.optimizations import needs


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing("nemo.collections.llm.peft.utils:ParallelLinearAdapter.forward")


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Scale the small tensor in this process."""
    scale_small_tensor()


def scale_small_tensor() -> None:
    """Multiply [tokens, rank] by alpha / rank, instead of the adapter's output [tokens, features].

    The result has the same bits if alpha / rank is a power of two. Requires TP = 1 and no dropout.
    """
    from nemo.collections.llm.peft.utils import ParallelLinearAdapter

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.linear_in(x)
        x, _ = self.linear_out(self.activation(x) * (self.alpha / self.dim))
        return x

    ParallelLinearAdapter.forward = forward
