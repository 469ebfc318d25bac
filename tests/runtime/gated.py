"""Write SwiGLU and its gradient with the kernels of runtime/engines/swiglu.py, and as the definition says.

In: TRITON_INTERPRET=1. Out: JSON, for each case of rows and width the largest differences, relative to the largest value,
of the result, its largest value, the inverse of the scale, and the same of the gradient.

The interpreter neither runs PTX nor rounds to FP8 as a GPU does. So the sigmoid is Triton's, and the results are float32.
"""

import json
import sys
from pathlib import Path

import torch
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[2]))
from runtime.engines import swiglu

SCALE = 24.0
CASES = [(1, 1), (3, 40), (5, 2048), (2, 3000), (7, 14336)]  # rows and width


def own(write: object, shape: list[int], *inputs: torch.Tensor, before: float = 0.0) -> tuple[torch.Tensor, ...]:
    """What the kernel writes, the largest value if `before` is there, and the inverse of the scale."""
    out = torch.full((shape[0] + 2, shape[1]), 7.0)
    amax, scale_inv = torch.tensor([before]), torch.empty(1)
    write(*inputs, out[1:-1], torch.tensor([SCALE]), amax, scale_inv)  # type: ignore[operator]
    assert bool((out[[0, -1]] == 7.0).all()), "the kernel wrote outside of its result"
    return out[1:-1], amax, scale_inv


def differences(written: tuple[torch.Tensor, ...], right: torch.Tensor) -> list[float]:
    out, amax, scale_inv = (part.double() for part in written)
    largest = right.abs().max()
    return [
        float((out / SCALE - right).abs().max() / largest),
        float((amax - largest).abs() / largest),
        float((scale_inv * SCALE - 1).abs()),
    ]


def case(rows: int, width: int) -> list[float]:
    torch.manual_seed(0)
    mixed, gradient = (3 * torch.randn(rows, n * width, dtype=torch.bfloat16) for n in (2, 1))
    exact = mixed.double().requires_grad_()
    a, b = exact.chunk(2, -1)
    result = torch.nn.functional.silu(a) * b
    result.backward(gradient.double())
    assert exact.grad is not None
    found = own(swiglu.write_result, [rows, width], mixed)
    of_mixed = own(swiglu.write_gradient, [rows, 2 * width], gradient, mixed)
    return differences(found, result.detach()) + differences(of_mixed, exact.grad)


swiglu._sigmoid = lambda x: tl.div_rn(1.0, 1.0 + tl.exp(-1.0 * x))
swiglu.PROGRAMS = 4  # each with several tiles
row = torch.tensor([[float("nan"), -1e30, 2.0, 1.0, 1.0, 3.0]], dtype=torch.bfloat16)  # three gates, three values
written, above, _ = own(swiglu.write_result, [1, 3], row)
_, kept, _ = own(swiglu.write_result, [1, 3], row, before=9.0)
edges = {"written": str((written / SCALE).tolist()), "amax": [above.item(), kept.item()]}
print(json.dumps({"edges": edges, **{f"{rows} rows of {width}": case(rows, width) for rows, width in CASES}}))
