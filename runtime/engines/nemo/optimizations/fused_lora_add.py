"""Add LoRA's branch to the output of the frozen layer in the GEMM that computes the branch.

In: a recipe, which stays as it is. Out: NeMo's class of layers with adapters, changed for this process.

The stock recipe writes the branch [tokens, features], multiplies it by alpha / rank, and adds it to the frozen layer's
output, which reads and writes the widest tensors three times more. As with scale_small_tensor, the scale is applied to the
small tensor.
"""

from typing import Any

from runtime.engines import adapters
from runtime.engines.nemo.optimizations import needs


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "nemo.collections.llm.peft.lora:LoRALinear.base_linear_forward", "nemo.collections.llm.peft.lora:LoRALinear.forward"
    )


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Add in the GEMM in this process. Requires TP = 1 and no dropout."""
    from nemo.collections.llm.peft.lora import LoRALinear

    LoRALinear.forward = forward


def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The sum of the frozen layer's output and of its adapter's, and the bias."""
    output, bias, normed = self.base_linear_forward(x, *args, **kwargs)
    small = adapters.small(self.adapter, normed.contiguous())
    return adapters.AddProduct.apply(output, small, self.adapter.linear_out.weight), bias
