"""Rotate random heads with the kernel of runtime/engines/rotary.py, and as the definition says. In: TRITON_INTERPRET=1.

Out: JSON, a list with the largest differences of results and gradients for each case: type, heads, and sequences.
"""

import itertools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from runtime.engines.rotary import Rotate

SIZE = 32
SEQUENCES = {
    "one": [0, 40],
    "ragged, empty ones, and bounds that are padded": [0, 3, 3, 10, 11, 40, 40, 40],
    "of one token": list(range(41)),
}


def angles() -> torch.Tensor:
    """Those of Llama-3, as Megatron-Core hands them on: [positions, 1, 1, size]."""
    frequencies = 500_000 ** (-torch.arange(0, SIZE, 2).double() / SIZE)
    half = torch.outer(torch.arange(64).double(), frequencies)
    return torch.cat((half, half), -1)[:, None, None, :].float()


def rotated(heads: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """In float64: each pair of coordinates, as a complex number, times e^(i angle)."""
    position = torch.cat([torch.arange(end - begin) for begin, end in itertools.pairwise(bounds)])
    angle = angles()[position, 0, :, : SIZE // 2].double()
    first, second = heads.double().chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def case(dtype: torch.dtype, count: int, bounds: list[int]) -> list[float]:
    torch.manual_seed(0)
    heads = torch.randn(bounds[-1], count, 3 * SIZE).to(dtype)[..., SIZE : 2 * SIZE].detach().requires_grad_()
    out = Rotate.apply(heads, torch.tensor(bounds, dtype=torch.int32), angles())
    gradient = torch.randn_like(out)
    out.backward(gradient)
    exact = heads.detach().double().requires_grad_()
    wanted = rotated(exact, bounds)
    wanted.backward(gradient.double())
    assert heads.grad is not None
    assert exact.grad is not None
    return [float((a.double() - b).abs().max()) for a, b in ((out, wanted), (heads.grad, exact.grad))]


print(
    json.dumps(
        {
            f"{str(dtype).removeprefix('torch.')}, {count} heads, {name}": case(dtype, count, bounds)
            for dtype in (torch.float32, torch.bfloat16)
            for count in (1, 3, 8)
            for name, bounds in SEQUENCES.items()
        }
    )
)
