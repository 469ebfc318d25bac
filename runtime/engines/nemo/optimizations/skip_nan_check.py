"""Do not check the gradients of each step for NaN.

In: a recipe. Out: the recipe with other data-parallel settings.
"""

from typing import Any

from runtime.engines.nemo.optimizations import needs
from runtime.engines.nemo.recipe import ddp


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing("megatron.core.distributed:DistributedDataParallelConfig.check_for_nan_in_grad")


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch the check off."""
    recipe.trainer.strategy.ddp = ddp(recipe, check_for_nan_in_grad=False)
