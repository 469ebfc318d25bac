"""Add the gradient of the residual in the kernel of the norm's backward pass.

In: a recipe, which stays as it is. Out: Megatron-Core and Transformer Engine, changed for this process.

The input of a block goes two ways: into the norm, and, as the residual, into the sum after the block. In the backward pass
PyTorch adds the two gradients in a kernel of its own. Transformer Engine has a kernel that adds while it computes the norm's
gradient. Here the residual's gradient waits for that kernel: it is known long before, because the backward pass of the sum
comes before that of the block.
"""

import functools
from typing import Any

import torch

from runtime.engines.nemo.optimizations import needs

WAITING: dict[int, torch.Tensor] = {}  # at most one gradient of a residual, by the address of the norm's input


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "transformer_engine_torch:rmsnorm_bwd_add",
        "transformer_engine.pytorch.module.layernorm_linear:tex",
        "transformer_engine.pytorch.ops.basic.rmsnorm:rmsnorm_bwd",
        "megatron.core.models.gpt.gpt_layer_specs:get_bias_dropout_add",
    )


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Let the norms add. Call it once, before the model is built. Requires RMSNorm, and blocks that begin with the norm."""
    import transformer_engine_torch as kernels
    from megatron.core.models.gpt import gpt_layer_specs
    from transformer_engine.pytorch.ops.basic import rmsnorm

    gpt_layer_specs.get_bias_dropout_add = with_waiting_residual(gpt_layer_specs.get_bias_dropout_add)
    kernels.rmsnorm_bwd = rmsnorm.rmsnorm_bwd = adding(kernels.rmsnorm_bwd, kernels.rmsnorm_bwd_add)


def with_waiting_residual(stock: Any) -> Any:
    """Megatron-Core's `get_bias_dropout_add`, with residuals whose gradients wait."""

    @functools.wraps(stock)
    def get(*args: Any) -> Any:
        add = stock(*args)

        @functools.wraps(add)
        def add_waiting(output: Any, residual: torch.Tensor, probability: float) -> Any:
            return add(output, Wait.apply(residual), probability)

        return add_waiting

    return get


class Wait(torch.autograd.Function):  # type: ignore[misc]
    """wait(residual) -> residual. Its gradient does not go on to the residual: it waits until the norm takes it."""

    @staticmethod
    def forward(ctx: Any, residual: torch.Tensor) -> torch.Tensor:
        """Remember where the residual is, which is where the norm's input is."""
        ctx.place = residual.data_ptr()
        return residual.view_as(residual)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        """RuntimeError: the norm before has not taken the gradient that waited for it."""
        if WAITING:
            raise RuntimeError(
                "fused_residual_add: no norm has taken a residual's gradient; set optimizations.fused_residual_add = false"
            )
        WAITING[ctx.place] = gradient


def adding(backward: Any, backward_add: Any) -> Any:
    """The norm's backward pass, which adds the gradient that waits for its input."""

    @functools.wraps(backward)
    def run(gradient: torch.Tensor, normed: torch.Tensor, *args: Any) -> Any:
        waiting = WAITING.pop(normed.data_ptr(), None)
        if waiting is None:
            return backward(gradient, normed, *args)
        return backward_add(gradient, normed, waiting.contiguous().view(normed.shape), *args)

    return run
