"""Compute the LM head and the loss only for tokens that have a loss. See runtime/engines/loss_rows.py.

In: a recipe. Out: the recipe, which picks those tokens in each batch.
"""

from typing import Any

from runtime.engines import loss_rows, needs
from runtime.engines.megatron_bridge.recipe import Batch, Recipe


def missing(_recipe: Recipe, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "megatron.core.models.gpt:GPTModel._postprocess(labels)",
        "megatron.core.models.gpt:GPTModel.compute_language_model_loss",
        "megatron.core.models.gpt:GPTModel.shared_embedding_or_output_weight",
    )


def apply(recipe: Recipe, _plan: dict[str, Any]) -> None:
    """Pick the tokens with a loss. Requires TP = PP = CP = 1."""
    loss_rows.install()
    recipe.changes.append(pick)


def pick(model: Any, batch: Batch) -> Batch:
    """The batch, after its rows with a loss were given to the model."""
    loss_rows.give(model, *loss_rows.rows_of(batch["loss_mask"]))
    return batch
