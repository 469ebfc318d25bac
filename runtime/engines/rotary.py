"""Split queries, keys and values, and rotate the queries and keys of packed sequences: two Triton kernels.

In: the output of the layer that projects to queries, keys and values, and the angles of each position. Out: queries, keys
and values, each contiguous, as attention reads them. With autograd.

A program of a kernel moves all heads of one token. It computes the sines and cosines of the token once, in float32, as
Transformer Engine's kernel does. Measured in docs/performance.md.

This module imports Triton, so only a training on a GPU imports it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class SplitAndRotate(torch.autograd.Function):  # type: ignore[misc]
    """split(mixed [tokens, groups, (n + 2) * size], cu_seqlens [sequences + 1], angles [positions, ..., size]) -> q, k, v.

    A group has the n heads of its queries, then its key, then its value. Queries: [tokens, groups * n, size]; keys and
    values: [tokens, groups, size].
    """

    @staticmethod
    def forward(ctx: Any, mixed: torch.Tensor, cu_seqlens: torch.Tensor, angles: torch.Tensor) -> Parts:
        """Split, and rotate by the angle of the position in the own sequence."""
        mixed = mixed.contiguous()
        tokens, groups, width = mixed.shape
        size = angles.shape[-1]
        ctx.save_for_backward(cu_seqlens, angles)
        queries = mixed.new_empty(tokens, groups * (width // size - 2), size)
        keys, values = mixed.new_empty(tokens, groups, size), mixed.new_empty(tokens, groups, size)
        _launch(_split, mixed, (queries, keys, values), cu_seqlens, angles)
        return queries, keys, values

    @staticmethod
    def backward(
        ctx: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        """Rotate the gradients back, and join them: the inverse of a rotation is its transpose."""
        cu_seqlens, angles = ctx.saved_tensors
        tokens, groups, size = keys.shape
        mixed = keys.new_empty(tokens, groups, (queries.shape[1] // groups + 2) * size)
        _launch(_join, mixed, (queries.contiguous(), keys.contiguous(), values.contiguous()), cu_seqlens, angles)
        return mixed, None, None


def _launch(kernel: Any, mixed: torch.Tensor, parts: Parts, cu_seqlens: torch.Tensor, angles: torch.Tensor) -> None:
    tokens, groups, width = mixed.shape
    slots = width // angles.shape[-1]
    kernel[(tokens,)](
        mixed,
        *parts,
        cu_seqlens,
        angles,
        angles.stride(0),
        cu_seqlens.numel(),
        groups=groups,
        slots=slots,
        half=angles.shape[-1] // 2,
        padded_heads=triton.next_power_of_2(groups * slots),
        padded_bounds=triton.next_power_of_2(cu_seqlens.numel()),
        num_warps=8,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _angle(token, cu_seqlens, angles, position_stride, bounds, half: tl.constexpr, padded_bounds: tl.constexpr):  # type: ignore[no-untyped-def]
    """The angles [half] of a token: those of its position in its own sequence."""
    bound = tl.arange(0, padded_bounds)
    begins = tl.load(cu_seqlens + bound, mask=bound < bounds, other=0)
    begin = tl.max(tl.where(begins <= token, begins, 0), axis=0)
    return tl.load(angles + (token - begin) * position_stride + tl.arange(0, half))


@triton.jit  # type: ignore[untyped-decorator]
def _places(token, groups: tl.constexpr, slots: tl.constexpr, half: tl.constexpr, padded_heads: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the heads of a token are: of each slot [heads, 1], what it holds; and offsets [heads, half] into the tensors."""
    head = tl.arange(0, padded_heads)[:, None]
    pair = tl.arange(0, half)[None, :]
    group, slot = head // slots, head % slots
    inside = head < groups * slots
    wide = token.to(tl.int64)
    mixed = (wide * (groups * slots) + head) * (2 * half) + pair
    query = (wide * (groups * (slots - 2)) + group * (slots - 2) + slot) * (2 * half) + pair
    other = (wide * groups + group) * (2 * half) + pair
    return inside & (slot < slots - 2), inside & (slot == slots - 2), inside & (slot == slots - 1), mixed, query, other


@triton.jit  # type: ignore[untyped-decorator]
def _split(  # type: ignore[no-untyped-def]
    mixed,
    queries,
    keys,
    values,
    cu_seqlens,
    angles,
    position_stride,
    bounds,
    groups: tl.constexpr,
    slots: tl.constexpr,
    half: tl.constexpr,
    padded_heads: tl.constexpr,
    padded_bounds: tl.constexpr,
):
    """Program t splits and rotates token t. The two halves of a head are the two coordinates of each rotation."""
    token = tl.program_id(0)
    angle = _angle(token, cu_seqlens, angles, position_stride, bounds, half, padded_bounds)
    cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    is_query, is_key, is_value, at, of_query, of_other = _places(token, groups, slots, half, padded_heads)
    inside = is_query | is_key | is_value
    first = tl.load(mixed + at, mask=inside, other=0.0)
    second = tl.load(mixed + at + half, mask=inside, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    low, high = (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)
    tl.store(queries + of_query, low, mask=is_query)
    tl.store(queries + of_query + half, high, mask=is_query)
    tl.store(keys + of_other, low, mask=is_key)
    tl.store(keys + of_other + half, high, mask=is_key)
    tl.store(values + of_other, first, mask=is_value)
    tl.store(values + of_other + half, second, mask=is_value)


@triton.jit  # type: ignore[untyped-decorator]
def _join(  # type: ignore[no-untyped-def]
    mixed,
    queries,
    keys,
    values,
    cu_seqlens,
    angles,
    position_stride,
    bounds,
    groups: tl.constexpr,
    slots: tl.constexpr,
    half: tl.constexpr,
    padded_heads: tl.constexpr,
    padded_bounds: tl.constexpr,
):
    """Program t rotates the gradients of token t back, and joins them: what `_split` does, the other way."""
    token = tl.program_id(0)
    angle = _angle(token, cu_seqlens, angles, position_stride, bounds, half, padded_bounds)
    cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    is_query, is_key, is_value, at, of_query, of_other = _places(token, groups, slots, half, padded_heads)
    rotated = is_query | is_key
    first = tl.load(queries + of_query, mask=is_query, other=0.0)
    first += tl.load(keys + of_other, mask=is_key, other=0.0)
    first += tl.load(values + of_other, mask=is_value, other=0.0)
    second = tl.load(queries + of_query + half, mask=is_query, other=0.0)
    second += tl.load(keys + of_other + half, mask=is_key, other=0.0)
    second += tl.load(values + of_other + half, mask=is_value, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    low = tl.where(rotated, (a * cos + b * sin).to(first.dtype), first)
    high = tl.where(rotated, (b * cos - a * sin).to(first.dtype), second)
    tl.store(mixed + at, low, mask=rotated | is_value)
    tl.store(mixed + at + half, high, mask=rotated | is_value)
