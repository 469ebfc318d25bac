"""Split and rotate random heads with the kernels of runtime/engines/rotary.py, and as the definition says.

In: TRITON_INTERPRET=1. Out: JSON, the largest differences of results and gradients for each case: type, heads, sequences.
"""

import itertools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from runtime.engines.rotary import SplitAndRotate

SIZE = 32
SEQUENCES = {
    "one": [0, 40],
    "ragged, empty ones, and bounds that are padded": [0, 3, 3, 10, 11, 40, 40, 40],
    "of one token": list(range(41)),
}
HEADS = [(1, 1), (2, 4), (3, 2)]  # groups, and queries in each


def angles() -> torch.Tensor:
    """Those of Llama-3, as Megatron-Core hands them on: [positions, 1, 1, size]."""
    frequencies = 500_000 ** (-torch.arange(0, SIZE, 2).double() / SIZE)
    half = torch.outer(torch.arange(64).double(), frequencies)
    return torch.cat((half, half), -1)[:, None, None, :].float()


def rotated(heads: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """In float64: each pair of coordinates, as a complex number, times e^(i angle)."""
    position = torch.cat([torch.arange(end - begin) for begin, end in itertools.pairwise(bounds)])
    angle = angles()[position, 0, :, : SIZE // 2].double()
    first, second = heads.chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), -1)


def wanted(mixed: torch.Tensor, bounds: list[int]) -> list[torch.Tensor]:
    """Queries, keys and values, split as Megatron-Core splits them."""
    tokens, _, width = mixed.shape
    queries, keys, values = mixed.split([width - 2 * SIZE, SIZE, SIZE], 2)
    return [rotated(queries.reshape(tokens, -1, SIZE), bounds), rotated(keys, bounds), values]


def case(dtype: torch.dtype, groups: int, queries: int, bounds: list[int]) -> list[float]:
    torch.manual_seed(0)
    mixed = torch.randn(bounds[-1], groups, (queries + 2) * SIZE).to(dtype).requires_grad_()
    found = SplitAndRotate.apply(mixed, torch.tensor(bounds, dtype=torch.int32), angles())
    gradients = [torch.randn_like(part) for part in found]
    torch.autograd.backward(found, gradients)
    exact = mixed.detach().double().requires_grad_()
    right = wanted(exact, bounds)
    torch.autograd.backward(right, [gradient.double() for gradient in gradients])
    assert mixed.grad is not None
    assert exact.grad is not None
    return [float((a.double() - b).abs().max()) for a, b in zip((*found, mixed.grad), (*right, exact.grad), strict=True)]


print(
    json.dumps(
        {
            f"{str(dtype).removeprefix('torch.')}, {groups} groups of {queries}, {name}": case(
                dtype, groups, queries, bounds
            )
            for dtype in (torch.float32, torch.bfloat16)
            for groups, queries in HEADS
            for name, bounds in SEQUENCES.items()
        }
    )
)
