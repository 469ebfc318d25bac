"""Write SwiGLU's FP8 result and gradient with kernels of ftgen, in Triton.

In: a recipe with fused_swiglu on, in FP8 with delayed scaling. Out: the recipe; Transformer Engine is changed for this
process.

The results are those of Transformer Engine's kernels for Hopper: the same bytes, scales and largest values. Its own
kernels still work where it also asks for a transpose, or for anything but FP8 with delayed scaling. The catalogue names
this optimization before fused_swiglu, so that it comes first: what fused_swiglu puts around the kernels stays around these.
"""

import functools
from typing import Any

from runtime.engines.nemo.optimizations import needs


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "triton:jit",
        "transformer_engine.pytorch.ops.basic.activation:SwiGLU._activation_forward_impl",
        "transformer_engine.pytorch.ops.basic.activation:SwiGLU._activation_backward_impl",
        "transformer_engine.pytorch.constants:TE_DType_To_Torch",
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Tensor",
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Quantizer.amax",
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Quantizer.columnwise_usage",
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Quantizer.internal",
        "transformer_engine.pytorch.tensor.storage.float8_tensor_storage:Float8TensorStorage",
    )


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Put the kernels in the place of Transformer Engine's. Call it once, before the first step."""
    from transformer_engine.pytorch.ops.basic.activation import SwiGLU

    SwiGLU._activation_forward_impl = _result(SwiGLU._activation_forward_impl)
    SwiGLU._activation_backward_impl = _gradient(SwiGLU._activation_backward_impl)


def _result(stock: Any) -> Any:
    from runtime.engines.swiglu import write_result

    @functools.wraps(stock)
    def result(self: Any, mixed: Any, quantizer: Any) -> Any:
        if not _is_ours(mixed, quantizer):
            return stock(self, mixed, quantizer)
        shape = (*mixed.shape[:-1], mixed.shape[-1] // 2)
        return _written(quantizer, shape, mixed.dtype, write_result, mixed)

    return result


def _gradient(stock: Any) -> Any:
    from runtime.engines.swiglu import write_gradient

    @functools.wraps(stock)
    def gradient(self: Any, of_result: Any, mixed: Any, quantizer: Any) -> Any:
        if not _is_ours(mixed, quantizer):
            return stock(self, of_result, mixed, quantizer)
        return _written(quantizer, tuple(mixed.shape), mixed.dtype, write_gradient, of_result, mixed)

    return gradient


def _is_ours(mixed: Any, quantizer: Any) -> bool:
    """Whether a GPU shall write rows in FP8 with delayed scaling, without a transpose, from BF16."""
    import torch
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    return (
        isinstance(quantizer, Float8Quantizer)
        and quantizer.rowwise_usage
        and not quantizer.columnwise_usage
        and mixed.is_cuda
        and mixed.dtype == torch.bfloat16
    )


def _written(quantizer: Any, shape: tuple[int, ...], dtype: Any, write: Any, *inputs: Any) -> Any:
    """A new FP8 tensor, of the class that the quantizer asks for, filled by `write`."""
    import torch
    from transformer_engine.pytorch.constants import TE_DType_To_Torch
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    data = torch.empty(shape, dtype=torch.uint8, device=inputs[0].device)
    scale_inv = torch.empty(1, dtype=torch.float32, device=inputs[0].device)
    inputs = tuple(tensor.contiguous() for tensor in inputs)
    write(*inputs, data.view(TE_DType_To_Torch[quantizer.dtype]), quantizer.scale, quantizer.amax, scale_inv)
    parts = {
        "data": data,
        "fp8_scale_inv": scale_inv,
        "fp8_dtype": quantizer.dtype,
        "data_transpose": None,
        "quantizer": quantizer,
    }
    return Float8TensorStorage(**parts) if quantizer.internal else Float8Tensor(shape=shape, dtype=dtype, **parts)
