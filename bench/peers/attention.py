"""Causal attention within each sequence of a pack.

In: query [tokens, heads, size], key and value [tokens, groups, size], and where the sequences end. Out: [tokens, heads * size].

On a GPU this is PyTorch's varlen_attn, which is Flash Attention 2. The package flash-attn, which Transformers would use, is
on PyPI as source alone: it compiles CUDA code for a long time. On a CPU it is one plain attention for each sequence.
"""

import sys
from functools import lru_cache

import torch

from runtime.engines import packed_attention


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """The attention."""
    if not query.is_cuda:
        return packed_attention.attention(query, key, value, ends.tolist(), scale)
    if query.shape[1] != key.shape[1] and must_repeat():
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    return _varlen(query, key, value, ends, longest, scale)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    done = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, window_size=(-1, 0))
    return done.flatten(1)  # type: ignore[no-any-return]


@lru_cache
def must_repeat() -> bool:
    """Whether this PyTorch does not take several heads of the query for one of the key. Ask before torch.compile."""
    shapes = ((96, 8, 64), (96, 2, 64), (96, 2, 64))
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    ends = torch.tensor([0, 30, 96], device="cuda", dtype=torch.int32)
    expected = packed_attention.attention(*inputs, ends.tolist(), 0.125)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    try:
        done = _varlen(*inputs, ends, 96, 0.125)
        found = torch.autograd.grad(done.square().sum(), inputs)
    except RuntimeError as error:
        print(f"peers: keys and values are repeated, because varlen_attn says: {error}", file=sys.stderr, flush=True)
        return True
    for one, other in zip((done, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    return False
