"""The optimization fp8_swiglu on a stand-in for Transformer Engine, with the names that it uses. In: TRITON_INTERPRET=1.

Out: JSON, what the patched functions return for each quantizer and tensor: "stock", or the parts of the FP8 tensor.
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[2]))
from runtime.engines import swiglu
from runtime.engines.nemo.optimizations import fp8_swiglu

swiglu._sigmoid = lambda x: tl.div_rn(1.0, 1.0 + tl.exp(-1.0 * x))  # the interpreter runs no PTX


class OnGpu(torch.Tensor):
    is_cuda = True  # type: ignore[assignment]


class SwiGLU:
    def _activation_forward_impl(self, *_inputs: Any) -> str:
        return "stock"

    def _activation_backward_impl(self, *_inputs: Any) -> str:
        return "stock"


class Parts:
    def __init__(self, **parts: Any) -> None:
        self.parts = parts


class Float8TensorStorage(Parts): ...


class Float8Tensor(Parts): ...


class Float8Quantizer:
    internal: bool

    def __init__(self, dtype: str, *, columnwise: bool = False, internal: bool = True) -> None:
        self.scale, self.amax, self.dtype = torch.tensor([2.0]), torch.zeros(1), dtype
        self.rowwise_usage, self.columnwise_usage, self.internal = True, columnwise, internal

    amax = columnwise_usage = True  # so that `missing` finds them


NAMES: dict[str, dict[str, Any]] = {
    "transformer_engine.pytorch.ops.basic.activation": {"SwiGLU": SwiGLU},
    "transformer_engine.pytorch.constants": {"TE_DType_To_Torch": {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}},
    "transformer_engine.pytorch.tensor.float8_tensor": {"Float8Quantizer": Float8Quantizer, "Float8Tensor": Float8Tensor},
    "transformer_engine.pytorch.tensor.storage.float8_tensor_storage": {"Float8TensorStorage": Float8TensorStorage},
}
for path, names in NAMES.items():
    parents = path.split(".")
    for end in range(1, len(parents) + 1):
        sys.modules.setdefault(".".join(parents[:end]), ModuleType(parents[end - 1]))
    vars(sys.modules[path]).update(names)


def told(written: Any) -> Any:
    """The parts of an FP8 tensor, as JSON can say them."""
    if written == "stock":
        return written
    parts = written.parts
    scale_inv, quantizer = parts["fp8_scale_inv"].item(), parts["quantizer"]
    stands_for = str(parts["dtype"]) if "dtype" in parts else None
    values = parts["data"].view(NAMES["transformer_engine.pytorch.constants"]["TE_DType_To_Torch"][quantizer.dtype]).float()
    return {
        "class": type(written).__name__,
        "shape": list(parts["data"].shape),
        "stands_for": stands_for,
        "fp8_dtype": parts["fp8_dtype"],
        "transpose": parts["data_transpose"],
        "largest": values.abs().max().item() * scale_inv,
        "amax": quantizer.amax.item(),
        "scale_inv": scale_inv,
    }


assert not fp8_swiglu.missing(None, {})
fp8_swiglu.apply(None, {})
torch.manual_seed(0)
mixed = torch.randn(6, 1, 80, dtype=torch.bfloat16).as_subclass(OnGpu)
gradient = torch.randn(6, 1, 40, dtype=torch.bfloat16).as_subclass(OnGpu)
forward, backward = SwiGLU()._activation_forward_impl, SwiGLU()._activation_backward_impl
print(
    json.dumps(
        {
            "no quantizer": forward(mixed, None),
            "with transpose": forward(mixed, Float8Quantizer("E4M3", columnwise=True)),
            "gradient with transpose": backward(gradient, mixed, Float8Quantizer("E5M2", columnwise=True)),
            "on the CPU": forward(torch.ones(2, 4, dtype=torch.bfloat16), Float8Quantizer("E4M3")),
            "in float32": forward(mixed.float(), Float8Quantizer("E4M3")),
            "result": told(forward(mixed, Float8Quantizer("E4M3"))),
            "public result": told(forward(mixed, Float8Quantizer("E4M3", internal=False))),
            "gradient": told(backward(gradient, mixed, Float8Quantizer("E5M2"))),
        }
    )
)
