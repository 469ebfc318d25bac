"""Compute the LM head and the loss only for tokens that have a loss, in Megatron-Core's GPTModel.

In: the loss mask of a batch, while it is on the CPU. Out: a loss that is zero for all other tokens.

The engines differ only in the step that calls `rows_of` and `give`. Nothing waits for the GPU. Each row of logits is the
same sum as before, but a GEMM with another number of rows may add in another order.
"""

from typing import Any

import torch

ROWS = 128  # the number of tokens is rounded up to a multiple, so that few shapes occur


def install() -> None:
    """Make Megatron-Core's GPTModel look for the rows, in this process. Requires TP = PP = CP = 1."""
    from megatron.core.models.gpt import GPTModel

    GPTModel.rows_are_picked = False  # whether the last layer returns the rows with a loss alone
    GPTModel._postprocess = _postprocess_with(GPTModel._postprocess)


def rows_of(loss_mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Flat indices into [batch, sequence] of the tokens with a loss, padded, on the GPU; and their number."""
    rows = loss_mask.flatten().nonzero().flatten()
    height = max(1, -(-len(rows) // ROWS)) * ROWS
    padded = torch.zeros(height, dtype=torch.long, pin_memory=torch.cuda.is_available())
    padded[: len(rows)] = rows
    return padded.cuda(non_blocking=True), len(rows)


def give(model: Any, rows: torch.Tensor, count: int) -> None:
    """Give the rows of the next forward pass to the GPTModel inside of `model`."""
    gpt = gpt_of(model)
    gpt.loss_rows, gpt.loss_count = rows, count


def gpt_of(model: Any) -> Any:
    """The GPTModel inside of its wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def pick(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[rows, 1, hidden] of states [sequence, batch, hidden]."""
    return states.transpose(0, 1).flatten(0, 1).index_select(0, rows).unsqueeze(1)


def _postprocess_with(whole: Any) -> Any:
    def postprocess(self: Any, hidden_states: torch.Tensor, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """Loss [batch, sequence], zero for tokens without a loss, from hidden states [sequence, batch, hidden]."""
        rows = getattr(self, "loss_rows", None)
        if labels is None or rows is None or not self.post_process:
            return whole(self, hidden_states, *args, labels=labels, **kwargs)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        picked = hidden_states if self.rows_are_picked else pick(hidden_states, rows)
        logits, _ = self.output_layer(picked, weight=weight)
        loss = self.compute_language_model_loss(labels.flatten().index_select(0, rows).unsqueeze(0), logits).flatten()
        count = self.loss_count
        return loss.new_zeros(labels.numel()).index_copy(0, rows[:count], loss[:count]).view_as(labels)

    return postprocess
