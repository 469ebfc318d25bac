"""Rotary embedding of packed sequences: a Triton kernel.

In: queries or keys of packed sequences, and the angles of each position. Out: the same, rotated. With autograd.

A program of the kernel rotates all heads of one token. It computes the sines and cosines of the token once, in float32, as
Transformer Engine's kernel does. Measured in docs/performance.md.

This module imports Triton, so only a training on a GPU imports it.
"""

from typing import Any

import torch
import triton
import triton.language as tl


class Rotate(torch.autograd.Function):  # type: ignore[misc]
    """rotate(heads [tokens, heads, size], cu_seqlens [sequences + 1], angles [positions, ..., size]) -> like heads."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cu_seqlens: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """Rotate by the angle of the position in the own sequence."""
        ctx.save_for_backward(cu_seqlens, angles)
        return _launch(heads, cu_seqlens, angles, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Rotate back: the inverse of a rotation is its transpose."""
        cu_seqlens, angles = ctx.saved_tensors
        return _launch(gradient, cu_seqlens, angles, -1.0), None, None


def _launch(heads: torch.Tensor, cu_seqlens: torch.Tensor, angles: torch.Tensor, sign: float) -> torch.Tensor:
    if heads.stride(-1) != 1:
        heads = heads.contiguous()
    tokens, count, size = heads.shape
    out = torch.empty((tokens, count, size), dtype=heads.dtype, device=heads.device)
    _rotate[(tokens,)](
        heads,
        out,
        cu_seqlens,
        angles,
        heads.stride(0),
        heads.stride(1),
        angles.stride(0),
        count,
        cu_seqlens.numel(),
        sign,
        half=size // 2,
        padded_count=triton.next_power_of_2(count),
        padded_bounds=triton.next_power_of_2(cu_seqlens.numel()),
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    heads,
    out,
    cu_seqlens,
    angles,
    token_stride,
    head_stride,
    position_stride,
    count,
    bounds,
    sign,
    half: tl.constexpr,
    padded_count: tl.constexpr,
    padded_bounds: tl.constexpr,
):
    """Program t rotates token t. The two halves of a head are the two coordinates of each rotation."""
    token = tl.program_id(0)
    bound = tl.arange(0, padded_bounds)
    begins = tl.load(cu_seqlens + bound, mask=bound < bounds, other=0)
    begin = tl.max(tl.where(begins <= token, begins, 0), axis=0)  # of the token's own sequence
    pair = tl.arange(0, half)
    angle = tl.load(angles + (token - begin) * position_stride + pair)
    cos = tl.cos(angle)[None, :]
    sin = (tl.sin(angle) * sign)[None, :]
    head = tl.arange(0, padded_count)[:, None]
    inside = head < count
    at = heads + token.to(tl.int64) * token_stride + head * head_stride + pair[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    to = out + token.to(tl.int64) * (count * 2 * half) + head * (2 * half) + pair[None, :]
    tl.store(to, (first * cos - second * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, (second * cos + first * sin).to(out.dtype.element_ty), mask=inside)
