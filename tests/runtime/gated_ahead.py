"""Compile the kernels of runtime/engines/swiglu.py for an H100, without a GPU. Out: JSON, PTX of each kernel."""

import json
import sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[2]))
from runtime.engines import swiglu

TYPES = {"mixed": "*bf16", "gradient": "*bf16", "tiles": "i32"}  # the others are scalars in memory


def ptx(kernel: triton.JITFunction, tile: int, to: str) -> str:
    sizes = {"width": 14336, "tile": tile, "stages": swiglu.STAGES}
    types = {name: TYPES.get(name, "*fp32") for name in kernel.arg_names} | {"out": to} | dict.fromkeys(sizes, "constexpr")
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in ("mixed", "gradient", "out")
    }
    source = ASTSource(kernel, types, constexprs=sizes, attrs=aligned)
    return str(triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": swiglu.WARPS}).asm["ptx"])


print(
    json.dumps(
        {
            "result": ptx(swiglu._write_result, swiglu.RESULT_TILE, "*fp8e4nv"),
            "gradient": ptx(swiglu._write_gradient, swiglu.GRADIENT_TILE, "*fp8e5"),
        }
    )
)
