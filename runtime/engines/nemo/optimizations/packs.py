"""What the optimizations of packed sequences share: a data step that changes the batch, and the boundaries of sequences.

In: NeMo's data step and its batches on the CPU. Out: the same, changed.
"""

from collections.abc import Iterator
from typing import Any

import torch


class ChangedStep:
    """A data step that changes each batch on the CPU and then calls the step that it replaces."""

    def __init__(self, step: Any, change: Any) -> None:
        self.step, self.change = step, change

    def __call__(self, dataloader_iter: Iterator[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = next(dataloader_iter)
        changed = self.change(batch[0] if isinstance(batch, tuple) else batch)
        step: dict[str, Any] = self.step(iter([changed]), *args, **kwargs)
        if "loss_weights" in changed and step.get("loss_weights") is None:  # NeMo's step drops the keys it does not know
            step["loss_weights"] = changed["loss_weights"].cuda(non_blocking=True)
        return step


def ends_of(batch: dict[str, Any]) -> list[list[int]]:
    """For each row the boundaries of its sequences, from 0 on; in NeMo's cu_seqlens they are followed by -1."""
    lengths = batch["cu_seqlens_argmin"].flatten().tolist()
    return [row[:length] for row, length in zip(batch["cu_seqlens"].tolist(), lengths, strict=True)]


def cu_seqlens(ends: list[int]) -> dict[str, torch.Tensor]:
    """The boundaries of one row, in the form that NeMo's forward step reads."""
    return {
        "cu_seqlens": torch.tensor([[*ends, -1]], dtype=torch.int32),
        "cu_seqlens_argmin": torch.tensor([[len(ends)]]),
    }
