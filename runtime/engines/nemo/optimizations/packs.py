"""Change batches in a data step, and find the boundaries of packed sequences, for several optimizations.

In: NeMo's data step and its batches on the CPU. Out: a data step and batches that are changed.
"""

from collections.abc import Iterator
from typing import Any

import torch


class ChangedStep:
    """A data step that changes each batch on the CPU and then calls the step that it replaces."""

    def __init__(self, step: Any, change: Any) -> None:
        self.step, self.change = step, change

    def __call__(self, dataloader_iter: Iterator[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The result of the replaced step for the changed batch; `loss_weights` is kept if the change adds it."""
        batch = next(dataloader_iter)
        changed = self.change(batch[0] if isinstance(batch, tuple) else batch)
        step: dict[str, Any] = self.step(iter([changed]), *args, **kwargs)
        if "loss_weights" in changed and step.get("loss_weights") is None:  # NeMo's step drops unknown keys
            step["loss_weights"] = changed["loss_weights"].cuda(non_blocking=True)
        return step


def ends_of(batch: dict[str, Any]) -> list[list[int]]:
    """The boundaries of the sequences in each row, starting with 0, without the -1 that pads NeMo's cu_seqlens."""
    lengths = batch["cu_seqlens_argmin"].flatten().tolist()
    return [row[:length] for row, length in zip(batch["cu_seqlens"].tolist(), lengths, strict=True)]


def cu_seqlens(ends: list[int]) -> dict[str, torch.Tensor]:
    """The boundaries of one row, as the tensors that NeMo's forward step reads."""
    return {
        "cu_seqlens": torch.tensor([[*ends, -1]], dtype=torch.int32),
        "cu_seqlens_argmin": torch.tensor([[len(ends)]]),
    }


def bounds_of(packed_seq_params: Any) -> torch.Tensor:
    """The boundaries of the sequences, with their padding, as Megatron-Core hands them on: int32, on the GPU."""
    padded = packed_seq_params.cu_seqlens_q_padded
    bounds: torch.Tensor = packed_seq_params.cu_seqlens_q if padded is None else padded
    return bounds
