"""Values of the plan that both engines set in their recipe.

In: a plan. Out: the adapter's values in a recipe, the number of warmup steps.
"""

from typing import Any

from runtime.job.progress import say

Plan = dict[str, Any]


def set_lora(peft: Any, plan: Plan) -> None:
    """Set rank, alpha, dropout and targets; both engines name them alike."""
    peft.dim = plan["lora"]["rank"]
    peft.alpha = plan["lora"]["alpha"]
    peft.dropout = plan["lora"]["dropout"]
    peft.target_modules = plan["lora"]["targets"]


def warmup_steps(plan: Plan) -> int:
    """The plan's warmup steps, but fewer than the steps: Megatron-Core's scheduler requires that."""
    warmup: int = min(plan["optimizer"]["warmup_steps"], plan["max_steps"] - 1)
    if warmup != plan["optimizer"]["warmup_steps"]:
        say(f"warmup is shortened to {warmup} steps, because max_steps = {plan['max_steps']}")
    return warmup
