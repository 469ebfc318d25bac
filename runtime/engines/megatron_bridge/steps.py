"""The forward step of a training: Megatron-Bridge's own, after the recipe's changes to the batch.

In: the changes of a recipe. Out: a function for `megatron.bridge.training.finetune.finetune`.

This module imports Megatron-Bridge, so only a training imports it.
"""

from collections.abc import Iterable
from typing import Any

from megatron.bridge.training import gpt_step
from megatron.bridge.training.state import GlobalState

from runtime.engines.megatron_bridge.recipe import Recipe


def forward_step_of(recipe: Recipe) -> Any:
    """Megatron-Bridge's forward step, if nothing is changed. It finds its arguments by their annotations and names."""
    if not recipe.changes:
        return gpt_step.forward_step

    def forward_step(
        state: GlobalState, data_iterator: Iterable[Any], model: Any, return_schedule_plan: bool = False
    ) -> Any:
        """The output of the model for the next batch, and the function that computes its loss."""
        batch = next(iter(data_iterator))
        for change in recipe.changes:
            batch = change(model, batch)
        return gpt_step.forward_step(state, iter([batch]), model, return_schedule_plan)

    return forward_step
