"""Compute the LM head and the loss only for tokens that have a loss.

In: a recipe. Out: the recipe, with steps that pick those tokens.

In a fine-tune, only the tokens of the answers have a loss. For every other token, the stock recipe computes the LM
head and the cross entropy and multiplies the result by zero. Here the loss mask is read while the batch is still on
the CPU, so nothing waits for the GPU. Each row of logits is the same sum as before, but a GEMM with another number of
rows may add in another order.
"""

from collections.abc import Iterator
from typing import Any

import torch

from runtime.engines.nemo.optimizations import needs

ROWS = 128  # the number of tokens is rounded up to a multiple, so that few shapes occur


def missing(recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing_in_config(recipe, "data_step_fn", "forward_step_fn") or needs.missing(
        "megatron.core.models.gpt:GPTModel._postprocess(labels)",
        "megatron.core.models.gpt:GPTModel.compute_language_model_loss",
        "megatron.core.models.gpt:GPTModel.shared_embedding_or_output_weight",
        "nemo.collections.llm.gpt.model.base:gpt_data_step",
        "nemo.collections.llm.gpt.model.base:gpt_forward_step",
    )


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Make the recipe's steps pick the tokens with a loss."""
    install(recipe.model.config)


def install(config: Any) -> None:
    """Make the steps of a GPTConfig pick the tokens with a loss. Requires TP = PP = CP = 1."""
    from megatron.core.models.gpt import GPTModel

    config.data_step_fn = data_step
    config.forward_step_fn = forward_step
    GPTModel._postprocess = _postprocess_with(GPTModel._postprocess)


def data_step(dataloader_iter: Iterator[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """NeMo's data step. Adds `loss_rows` [n] to the batch: flat indices into [batch, sequence], padded; and `loss_count`."""
    from nemo.collections.llm.gpt.model.base import gpt_data_step

    batch = next(dataloader_iter)
    rows = (batch[0] if isinstance(batch, tuple) else batch)["loss_mask"].flatten().nonzero().flatten()
    step: dict[str, Any] = gpt_data_step(iter([batch]), *args, **kwargs)
    height = max(1, -(-len(rows) // ROWS)) * ROWS
    padded = torch.zeros(height, dtype=torch.long, pin_memory=torch.cuda.is_available())
    padded[: len(rows)] = rows
    return step | {"loss_rows": padded.cuda(non_blocking=True), "loss_count": len(rows)}


def forward_step(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """NeMo's forward step, after giving the model the rows with a loss."""
    from nemo.collections.llm.gpt.model.base import gpt_forward_step

    head = model
    while hasattr(head, "module"):
        head = head.module
    head.loss_rows, head.loss_count = batch["loss_rows"], batch["loss_count"]
    return gpt_forward_step(model, batch)


def _postprocess_with(whole: Any) -> Any:
    def postprocess(self: Any, hidden_states: torch.Tensor, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """Loss [batch, sequence], zero for tokens without a loss, from hidden states [sequence, batch, hidden]."""
        rows = getattr(self, "loss_rows", None)
        if labels is None or rows is None or not self.post_process:
            return whole(self, hidden_states, *args, labels=labels, **kwargs)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        picked = hidden_states.transpose(0, 1).flatten(0, 1).index_select(0, rows).unsqueeze(1)
        logits, _ = self.output_layer(picked, weight=weight)
        loss = self.compute_language_model_loss(labels.flatten().index_select(0, rows).unsqueeze(0), logits).flatten()
        count = self.loss_count
        return loss.new_zeros(labels.numel()).index_copy(0, rows[:count], loss[:count]).view_as(labels)

    return postprocess
