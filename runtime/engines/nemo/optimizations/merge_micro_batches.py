"""Run all packs of a step as one micro-batch.

In: a recipe with packed data. Out: the recipe, with a data module that gives a step's whole batch and a data step
that merges it.

The stock recipe runs one micro-batch after the other, each with one pack. Here the batch of a step, [packs, length],
is reshaped to [1, packs * length]. The boundaries of the examples (cu_seqlens) are kept, so attention stays inside
each example. The gradient equals the stock gradient, which averages the mean losses of the packs: the loss of each
token gets a weight to that end. The logged loss is the mean over all tokens, as before.
"""

import inspect
from typing import Any, get_args

import torch

from runtime.engines.nemo.optimizations import needs
from runtime.engines.nemo.optimizations.packs import ChangedStep, cu_seqlens, ends_of


def missing(recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    lacking = needs.missing_in_config(recipe, "data_step_fn") or needs.missing(
        "nemo.collections.llm.gpt.data.fine_tuning:FineTuningDataModule.validate_batch_size_for_packed_sequence",
        "nemo.lightning.megatron_parallel:MaskedTokenLossReduction.forward",
    )
    if lacking:
        return lacking
    from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

    returned = get_args(inspect.signature(MaskedTokenLossReduction.forward).return_annotation)
    return "" if len(returned) == 3 else "NeMo's loss does not come with its number of tokens"


def apply(recipe: Any, plan: dict[str, Any]) -> None:
    """Merge the micro-batches of a step. Requires packed data and CP = PP = 1."""
    packs = plan["global_batch_size"] // plan["parallelism"]["data_parallel_size"]
    install(recipe.data, recipe.model.config, packs)


def install(data: Any, config: Any, packs: int) -> None:
    """Make NeMo's data module give `packs` packs at a time, and the data step of a GPTConfig merge them."""
    from nemo.collections.llm.gpt.data.fine_tuning import FineTuningDataModule
    from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

    FineTuningDataModule.validate_batch_size_for_packed_sequence = lambda _self: None  # NeMo allows one pack only
    data.micro_batch_size = packs
    config.data_step_fn = ChangedStep(config.data_step_fn, merge)
    MaskedTokenLossReduction.forward = _weighted(MaskedTokenLossReduction.forward)


def merge(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch [packs, length] of NeMo's packed dataset, reshaped to [1, packs * length], and with `loss_weights`."""
    _, length = batch["tokens"].shape
    rows = ends_of(batch)
    ends = sorted({0} | {pack * length + end for pack, row in enumerate(rows) for end in row})
    count = sum(len(row) - 1 for row in rows) + 1  # the same for every batch if NeMo pads cu_seqlens
    ends += [ends[-1]] * (count - len(ends))
    flat = {key: batch[key].reshape(1, -1) for key in ("tokens", "labels", "loss_mask", "position_ids")}
    return {
        **flat,
        **cu_seqlens(ends),
        "attention_mask": batch["attention_mask"][:1],
        "max_seqlen": batch["max_seqlen"].max().reshape(1, 1),
        "loss_weights": _loss_weights(batch["loss_mask"]).reshape(1, -1),
    }


def _loss_weights(loss_mask: torch.Tensor) -> torch.Tensor:
    """Weights [packs, length], float32, which make the mean of all tokens' losses the mean of the packs' mean losses."""
    tokens = loss_mask.sum(dim=1, keepdim=True, dtype=torch.float32)
    return (tokens.sum() / (len(loss_mask) * tokens.clamp(min=1))).expand(loss_mask.shape)


def _weighted(stock: Any) -> Any:
    def forward(self: Any, batch: dict[str, Any], loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """NeMo's reduction, with a weighted sum of the losses for the gradient. The logged loss is not weighted."""
        total, tokens, logged = stock(self, batch, loss)
        if batch.get("loss_weights") is not None:
            total = (loss.float() * batch["loss_mask"] * batch["loss_weights"]).sum()
        return total, tokens, logged

    return forward
