"""The kernels of the optimization fp8_swiglu beside Transformer Engine's. Needs a GPU and Transformer Engine. Out: JSON.

    python bench/swiglu.py [--tokens 4096] [--width 14336] [--repeats 200]

SwiGLU of Llama-3 8B: the result in E4M3 from BF16 [tokens, 2 * width], and the gradient in E5M2. Of each, for both:
microseconds of a call in a CUDA graph, and the bytes that it must read and write, as GB/s. Then how many bytes of the two
differ, and whether the largest values and the inverses of the scale are equal. Some values saturate.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu_time import microseconds

from runtime.engines.nemo.optimizations import fp8_swiglu


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=14336)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    from transformer_engine.pytorch.ops.basic.activation import SwiGLU
    from transformer_engine.pytorch.tensor.float8_tensor import TE_DType

    torch.manual_seed(0)
    mixed = 3 * torch.randn(options.tokens, 2 * options.width, dtype=torch.bfloat16, device="cuda")
    gradient = torch.randn(options.tokens, options.width, dtype=torch.bfloat16, device="cuda")
    mixed[0, :4] = torch.tensor([float("nan"), float("inf"), -1e30, -88.5])  # gates
    swiglu = SwiGLU()
    work: dict[str, Callable[[Any], Any]] = {
        "result": lambda quantizer: swiglu._activation_forward_impl(mixed, quantizer),
        "gradient": lambda quantizer: swiglu._activation_backward_impl(gradient, mixed, quantizer),
    }
    types = {"result": TE_DType.kFloat8E4M3, "gradient": TE_DType.kFloat8E5M2}
    with torch.cuda.stream(torch.cuda.Stream()):  # a graph cannot be captured on the default stream
        stock = {name: _measured(work[name], types[name], options.repeats) for name in work}
        if lacking := fp8_swiglu.missing(None, {}):
            sys.exit(lacking)
        fp8_swiglu.apply(None, {})
        own = {name: _measured(work[name], types[name], options.repeats) for name in work}
    values = options.tokens * options.width
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "tokens": options.tokens, "width": options.width}
    for name, moved in (("result", 5 * values), ("gradient", 8 * values)):
        (theirs, their_amax, their_us), (ours, our_amax, our_us) = stock[name], own[name]
        found[name] = {
            "stock_us": round(their_us, 1),
            "own_us": round(our_us, 1),
            "stock_gb_per_s": round(moved / their_us / 1e3),
            "own_gb_per_s": round(moved / our_us / 1e3),
            "bytes": theirs._data.numel(),
            "different_bytes": int((theirs._data != ours._data).sum()),
            "amax": [their_amax, our_amax],
            "scale_inv_equal": bool(torch.equal(theirs._scale_inv, ours._scale_inv)),
            "transpose": [theirs._transpose is not None, ours._transpose is not None],
        }
    print(json.dumps(found, indent=1))


def _measured(call: Callable[[Any], Any], dtype: Any, repeats: int) -> tuple[Any, float, float]:
    """The FP8 tensor, the largest value, and the microseconds of a call."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    scale, amax = torch.full((1,), 37.0, device="cuda"), torch.zeros(1, device="cuda")
    quantizer = Float8Quantizer(scale, amax, dtype, columnwise=False)
    quantizer.internal = True  # as the op fuser sets it
    written = call(quantizer)
    return written, float(amax), microseconds(lambda: call(quantizer), repeats)


if __name__ == "__main__":
    main()
