"""Apply LoRA's scale to the small tensor between the adapter's two matrices.

In: a recipe, which stays as it is. Out: Megatron-Bridge's adapter class, changed for this process.
"""

from typing import Any

from runtime.engines import adapters, needs
from runtime.engines.megatron_bridge.recipe import Recipe


def missing(_recipe: Recipe, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing("megatron.bridge.peft.utils:ParallelLinearAdapter.forward")


def apply(_recipe: Recipe, _plan: dict[str, Any]) -> None:
    """Scale the small tensor in this process. Requires TP = 1 and no dropout."""
    from megatron.bridge.peft.utils import ParallelLinearAdapter

    ParallelLinearAdapter.forward = adapters.forward
