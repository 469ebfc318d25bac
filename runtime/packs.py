"""How a step's packed sequences are laid out for the model. In: a recipe's data and model. Out: both, with steps that do so.

`short_padding`: what fills a pack up is one sequence more to attention and rotary embedding, as long as the emptiest pack of
all leaves it, and with padded cu_seqlens all sequences are worked on as if they were that long. Here it is cut into
sequences no longer than the longest example.

`merge_micro_batches`: the stock recipe runs micro-batches of one pack one after the other. Here the batch of a step,
[packs, length], is laid end to end as [1, packs * length]; attention keeps to the examples, because their boundaries
(cu_seqlens) come along. The gradient is the stock one: every token's loss is weighted so that the packs' means are averaged,
as they are when they are micro-batches of their own, however many tokens with a loss each has. The logged loss is the mean
over all tokens, as always.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

MULTIPLE = 64  # of tokens that attention works on at a time: the longest sequence is said to be a multiple of it


def short_padding(data: Any, config: Any) -> None:
    """Make a GPTConfig's steps cut the padding of packs. For packed data and one context-parallel rank."""
    metadata = json.loads(Path(data.packed_sequence_specs.packed_metadata_path).read_text())
    longest = max(split["dataset_max_seqlen"] for split in metadata)
    config.data_step_fn = _Step(config.data_step_fn, lambda batch: cut_padding(batch, -(-longest // MULTIPLE) * MULTIPLE))


def merge_micro_batches(data: Any, config: Any, packs: int) -> None:
    """Make NeMo's data module give a step's whole batch, and a GPTConfig's steps merge it. For packed data, CP = PP = 1."""
    from nemo.collections.llm.gpt.data.fine_tuning import FineTuningDataModule
    from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

    FineTuningDataModule.validate_batch_size_for_packed_sequence = lambda _self: None  # it allows one pack alone
    data.micro_batch_size = packs
    config.data_step_fn = _Step(config.data_step_fn, merge)
    MaskedTokenLossReduction.forward = _weighted(MaskedTokenLossReduction.forward)


class _Step:
    """A data step that changes the batch that it reads, on the CPU, and leaves the rest to the one that it was made from."""

    def __init__(self, step: Any, change: Any) -> None:
        self.step, self.change = step, change

    def __call__(self, dataloader_iter: Iterator[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = next(dataloader_iter)
        changed = self.change(batch[0] if isinstance(batch, tuple) else batch)
        step: dict[str, Any] = self.step(iter([changed]), *args, **kwargs)
        if "loss_weights" in changed and step.get("loss_weights") is None:  # NeMo's step drops what it does not know
            step["loss_weights"] = changed["loss_weights"].cuda(non_blocking=True)
        return step


def cut_padding(batch: dict[str, Any], longest: int) -> dict[str, Any]:
    """A batch of one row with no sequence of more than `longest` tokens, which no example has: only padding is cut.

    cu_seqlens [1, n] grows by as much as the longest padding would need, always: CUDA graphs want one shape.
    """
    ends = _ends(batch)[0]
    cut = [0]
    for begin, end in pairwise(ends):
        cut += [*range(begin + longest, end, longest), end]
    count = len(ends) + ends[-1] // longest
    cut += [ends[-1]] * (count - len(cut))
    return batch | _cu_seqlens(cut) | {"max_seqlen": torch.tensor([[longest]], dtype=torch.int32)}


def merge(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch [packs, length] of NeMo's packed dataset as one of [1, packs * length], with `loss_weights` of that shape."""
    _, length = batch["tokens"].shape
    rows = _ends(batch)
    ends = sorted({0} | {pack * length + end for pack, row in enumerate(rows) for end in row})
    count = sum(len(row) - 1 for row in rows) + 1  # the same for every batch where NeMo pads cu_seqlens
    ends += [ends[-1]] * (count - len(ends))
    flat = {key: batch[key].reshape(1, -1) for key in ("tokens", "labels", "loss_mask", "position_ids")}
    return {
        **flat,
        **_cu_seqlens(ends),
        "attention_mask": batch["attention_mask"][:1],
        "max_seqlen": batch["max_seqlen"].max().reshape(1, 1),
        "loss_weights": _loss_weights(batch["loss_mask"]).reshape(1, -1),
    }


def _ends(batch: dict[str, Any]) -> list[list[int]]:
    """Of each row the boundaries of its sequences, from 0 on; NeMo's cu_seqlens holds -1 behind them."""
    lengths = batch["cu_seqlens_argmin"].flatten().tolist()
    return [row[:length] for row, length in zip(batch["cu_seqlens"].tolist(), lengths, strict=True)]


def _cu_seqlens(ends: list[int]) -> dict[str, torch.Tensor]:
    """One row's boundaries as NeMo's forward step reads them."""
    return {
        "cu_seqlens": torch.tensor([[*ends, -1]], dtype=torch.int32),
        "cu_seqlens_argmin": torch.tensor([[len(ends)]]),
    }


def _loss_weights(loss_mask: torch.Tensor) -> torch.Tensor:
    """[packs, length], float32: what a token's loss counts, for the mean over all tokens to be that of the packs' means."""
    tokens = loss_mask.sum(dim=1, keepdim=True, dtype=torch.float32)
    return (tokens.sum() / (len(loss_mask) * tokens.clamp(min=1))).expand(loss_mask.shape)


def _weighted(stock: Any) -> Any:
    def forward(self: Any, batch: dict[str, Any], loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """The weighted sum of the losses for the gradient; what is logged is not weighted."""
        total, tokens, logged = stock(self, batch, loss)
        if batch.get("loss_weights") is not None:
            total = (loss.float() * batch["loss_mask"] * batch["loss_weights"]).sum()
        return total, tokens, logged

    return forward
