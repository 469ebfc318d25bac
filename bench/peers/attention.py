"""Causal attention within each sequence of a pack.

In: query [tokens, heads, size], key and value [tokens, groups, size], and where the sequences end.
Out: [tokens, heads * size].

On a GPU this is PyTorch's varlen_attn, which is Flash Attention 2. The package flash-attn, which Transformers would use, is
on PyPI as source alone: it compiles CUDA code for a long time. On a CPU it is one plain attention for each sequence.
"""

import sys

import torch

from runtime.engines import packed_attention

BF16 = 0.02  # the error of sums in BF16, as a part of the result
_choice = {"repeats": False}  # keys and values


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """The attention."""
    if not query.is_cuda:
        return packed_attention.attention(query, key, value, ends.tolist(), scale)
    if query.shape[1] != key.shape[1] and _choice["repeats"]:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    return _varlen(query, key, value, ends, longest, scale)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    done = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, window_size=(-1, 0))
    return done.flatten(1)


def choose() -> None:
    """See whether this PyTorch takes several heads of the query for one of the key, and computes right."""
    shapes = ((96, 8, 64), (96, 2, 64), (96, 2, 64))
    query, key, value = inputs = [_random(shape) for shape in shapes]
    ends = torch.tensor([0, 30, 96, 96], device="cuda", dtype=torch.int32)
    try:
        done = _varlen(query, key, value, ends, 96, 0.125)
        found = torch.autograd.grad(done.square().sum(), inputs)
    except RuntimeError as error:
        print(f"peers: keys and values are repeated, because varlen_attn says: {error}", file=sys.stderr, flush=True)
        _choice["repeats"] = True
        return
    expected = packed_attention.attention(query, key, value, ends.tolist(), 0.125)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    for one, other in zip((done, *found), (expected, *wanted), strict=True):
        apart = float((one - other).float().norm() / other.float().norm())
        if not apart < BF16:
            raise SystemExit(
                f"peers: error: varlen_attn differs by {apart:.2g} from the attention of each sequence by itself"
            )


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
