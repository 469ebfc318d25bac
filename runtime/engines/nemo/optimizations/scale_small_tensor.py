"""Apply LoRA's scale to the small tensor between the adapter's two matrices.

In: a recipe, which stays as it is. Out: NeMo's adapter class, changed for this process.
"""

from typing import Any

from runtime.engines import adapters
from runtime.engines.nemo.optimizations import needs


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing("nemo.collections.llm.peft.utils:ParallelLinearAdapter.forward")


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Scale the small tensor in this process. Requires TP = 1 and no dropout."""
    from nemo.collections.llm.peft.utils import ParallelLinearAdapter

    ParallelLinearAdapter.forward = adapters.forward
