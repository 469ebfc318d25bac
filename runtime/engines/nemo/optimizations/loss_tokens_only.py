"""Compute the LM head and the loss only for tokens that have a loss.

In: a recipe. Out: the recipe, with steps that pick those tokens.

In a fine-tune, only the tokens of the answers have a loss. For every other token, the stock recipe computes the LM
head and the cross entropy and multiplies the result by zero. Here the loss mask is read while the batch is still on
the CPU. runtime/engines/loss_rows.py has the rest.
"""

from collections.abc import Iterator
from typing import Any

import torch

from runtime.engines import loss_rows
from runtime.engines.nemo.optimizations import needs


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
    config.data_step_fn = data_step
    config.forward_step_fn = forward_step
    loss_rows.install()


def data_step(dataloader_iter: Iterator[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """NeMo's data step. Adds `loss_rows` [n] to the batch: flat indices into [batch, sequence], padded; and `loss_count`."""
    from nemo.collections.llm.gpt.model.base import gpt_data_step

    batch = next(dataloader_iter)
    rows, count = loss_rows.rows_of((batch[0] if isinstance(batch, tuple) else batch)["loss_mask"])
    step: dict[str, Any] = gpt_data_step(iter([batch]), *args, **kwargs)
    return step | {"loss_rows": rows, "loss_count": count}


def forward_step(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """NeMo's forward step, after giving the model the rows with a loss."""
    from nemo.collections.llm.gpt.model.base import gpt_forward_step

    loss_rows.give(model, batch["loss_rows"], batch["loss_count"])
    return gpt_forward_step(model, batch)
