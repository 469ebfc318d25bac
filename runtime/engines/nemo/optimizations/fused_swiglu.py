"""Use Transformer Engine's fused SwiGLU, which in FP8 includes the cast, and correct two errors of it that SFT meets.

In: a recipe. Out: the recipe with the op fuser on for the MLP; for SFT in FP8 also Transformer Engine, changed for this
process.

1. Transposes that nobody wrote. To compute the gradient of a weight, Transformer Engine needs the transpose of the FP8
input and of the FP8 gradient. On Hopper, the kernels of SwiGLU write no transpose (before Transformer Engine 2.12), but
their result says that it has one: the gradients of both weights came from memory that contained anything. Here SwiGLU is
not asked for a transpose, so the linear layer makes it. LoRA freezes these weights and needs no transpose. The norm does
write one, but the linear layer does not see it and makes another. So the norm is not asked for one either.

2. Scales of FP8 weights. The fused MLP has scales of its own. They begin with 1 and know no largest value of the weights
before the optimizer's first step, which would round the weights to a few bits. Here they continue those of the weights.
"""

from typing import Any

from runtime.engines.nemo.optimizations import needs, op_fuser


def missing(recipe: Any, plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing. For SFT in FP8, also what the corrections change."""
    corrected = (
        "transformer_engine.pytorch.ops.basic.activation:SwiGLU._activation_forward_impl",
        "transformer_engine.pytorch.ops.basic.activation:SwiGLU._activation_backward_impl",
        "transformer_engine.pytorch.ops.basic.rmsnorm:rmsnorm_fwd",
        "transformer_engine.pytorch.ops:BasicLinear.reset_recipe_state(recipe)",
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Quantizer.set_usage(columnwise)",
    )
    return op_fuser.missing(recipe, plan) or needs.missing(*(corrected if _trains_fp8_weights(plan) else ()))


def apply(recipe: Any, plan: dict[str, Any]) -> None:
    """Switch the op fuser on for the MLP. Adapters are not fused, unless the plan also has op_fuser on."""
    recipe.model.config.use_transformer_engine_op_fuser = True
    if _trains_fp8_weights(plan):
        transpose_in_linear()
        keep_weight_scales()
    if plan["scheme"] == "lora" and not plan["optimizations"]["op_fuser"]:
        from nemo.collections.llm.peft import lora

        lora.HAVE_TE_FUSED_LORA = False  # otherwise the setting would also fuse the adapters, which rounds their input


def _trains_fp8_weights(plan: dict[str, Any]) -> bool:
    return (plan["scheme"], plan["precision"]) == ("sft", "fp8")


def transpose_in_linear() -> None:
    """Let SwiGLU and the norm write no transposes of what they write in FP8. Call it once, before the first step."""
    from transformer_engine.pytorch.ops.basic import rmsnorm
    from transformer_engine.pytorch.ops.basic.activation import SwiGLU

    rmsnorm.rmsnorm_fwd = _rows_only(rmsnorm.rmsnorm_fwd)
    SwiGLU._activation_forward_impl = _rows_only(SwiGLU._activation_forward_impl)
    SwiGLU._activation_backward_impl = _rows_only(SwiGLU._activation_backward_impl)


def _rows_only(kernel: Any) -> Any:
    """The kernel, called with a quantizer that asks for no transpose. One of its arguments is the quantizer, or none is."""

    def write_rows(*arguments: Any) -> Any:
        quantizer = next((argument for argument in arguments if hasattr(argument, "columnwise_usage")), None)
        if quantizer is None:
            return kernel(*arguments)
        wanted = quantizer.columnwise_usage
        quantizer.set_usage(columnwise=False)
        written = kernel(*arguments)
        quantizer.set_usage(columnwise=wanted)
        return written

    return write_rows


def keep_weight_scales() -> None:
    """Let a fused linear layer continue the scale and the largest value of its FP8 weight. Call it once."""
    from transformer_engine.pytorch.ops import BasicLinear

    BasicLinear.reset_recipe_state = _with_weight_scale(BasicLinear.reset_recipe_state)


def _with_weight_scale(reset: Any) -> Any:
    def reset_and_continue(self: Any, *, recipe: Any) -> None:
        before = _quantizer(self)
        reset(self, recipe=recipe)
        after = _quantizer(self)
        if hasattr(before, "amax") and hasattr(after, "amax") and before.amax.data_ptr() != after.amax.data_ptr():
            after.scale.copy_(before.scale)
            after.amax.copy_(before.amax)

    return reset_and_continue


def _quantizer(linear: Any) -> Any:
    """Of the layer's weight; None if it has no weight yet, or none in FP8."""
    return getattr(getattr(linear, "weight", None), "_quantizer", None)
