"""Attend with the kernels of runtime/engines/short_attention.py, and as the definition says. In: TRITON_INTERPRET=1.

Out: JSON, the largest differences of the result and of the gradients of queries, keys and values, for each case.
"""

import itertools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from runtime.engines.short_attention import Attend

SEQUENCES = {
    "one": [0, 150],
    "ragged, empty ones, and bounds that are padded": [0, 3, 3, 10, 90, 91, 150, 150, 150],
    "of one token": list(range(41)),
    "a multiple of the blocks": [0, 64, 128],
}
HEADS = [(1, 1), (2, 4), (1, 8)]  # groups, and queries in each
SIZE = 32
SCALE = SIZE**-0.5


def wanted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """In float64, sequence by sequence."""
    each = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(each, 1) for part in (k, v))
    parts = []
    for begin, end in itertools.pairwise(bounds):
        scores = torch.einsum("ihd,jhd->hij", q[begin:end], k[begin:end]) * SCALE
        hidden = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        parts.append(torch.einsum("hij,jhd->ihd", weights, v[begin:end]))
    return torch.cat(parts)


def case(dtype: torch.dtype, groups: int, queries: int, bounds: list[int]) -> list[float]:
    torch.manual_seed(0)
    tokens = bounds[-1]
    inputs = [torch.randn(tokens, heads, SIZE).to(dtype) for heads in (groups * queries, groups, groups)]
    found = [each.clone().requires_grad_() for each in inputs]
    out = Attend.apply(*found, torch.tensor(bounds, dtype=torch.int32), SCALE)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    exact = [each.double().requires_grad_() for each in inputs]
    right = wanted(*exact, bounds)
    right.backward(gradient.double())
    pairs = [(out, right), *((a.grad, b.grad) for a, b in zip(found, exact, strict=True))]
    return [float((a.double() - b).abs().max()) for a, b in pairs]


print(
    json.dumps(
        {
            f"{str(dtype).removeprefix('torch.')}, {groups} groups of {queries}, {name}": case(
                dtype, groups, queries, bounds
            )
            for dtype in (torch.float32, torch.float16)
            for groups, queries in HEADS
            for name, bounds in SEQUENCES.items()
        }
    )
)
