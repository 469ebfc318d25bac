"""Causal attention of short packed sequences: three Triton kernels.

In: queries, keys and values of packed sequences. Out: for each query, the values weighted by the softmax over the keys of
its own sequence up to itself. With autograd.

The kernels look at a pack as one row of tokens. A program takes a block of tokens, with all heads of queries that share a
key, and walks over the keys from the beginning of the first token's sequence to the last token: a mask hides the keys of
other sequences. So the work does not depend on the longest sequence, and each key is read once for all its heads. In the
backward pass, one kernel computes the gradients of the queries, and another those of the keys and values: nothing is
added atomically, so the result is the same each time. Measured in docs/performance.md.

This module imports Triton, so only a training on a GPU imports it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]
# rows: tokens times heads of a block of queries; keys: tokens of a block of keys
FORWARD = {"rows": 64, "keys": 32, "num_warps": 4, "num_stages": 3}
QUERIES = {"rows": 64, "keys": 32, "num_warps": 4, "num_stages": 3}
KEYS = {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2}


class Attend(torch.autograd.Function):  # type: ignore[misc]
    """attend(q [tokens, heads, size], k and v [tokens, groups, size], cu_seqlens [sequences + 1], scale) -> like q.

    The number of heads in a group and the size are powers of two; cu_seqlens is int32.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend. What the backward pass needs of the softmax is its logarithm to base 2: [tokens, heads], float32."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        edges = _edges_of(cu_seqlens, len(q))
        out = torch.empty_like(q)
        logs = q.new_empty(q.shape[:2], dtype=torch.float32)
        _launch(_forward, FORWARD, "rows", (q, k, v, out, logs, edges), scale)
        ctx.save_for_backward(q, k, v, out, logs, edges)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Grads:
        """The gradients of queries, keys and values."""
        q, k, v, out, logs, edges = ctx.saved_tensors
        gradient = gradient.contiguous()
        sums = torch.empty_like(logs)  # of the gradient times the output, over each head
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _launch(_backward_queries, QUERIES, "rows", (q, k, v, out, gradient, logs, sums, edges, dq), ctx.scale)
        _launch(_backward_keys, KEYS, "keys", (q, k, v, gradient, logs, sums, edges, dk, dv), ctx.scale)
        return dq, dk, dv, None, None


def _launch(kernel: Any, how: dict[str, int], blocks: str, tensors: tuple[torch.Tensor, ...], scale: float) -> None:
    q, k = tensors[:2]
    tokens, heads, size = q.shape
    groups = k.shape[1]
    block = how["keys"] if blocks == "keys" else how["rows"] * groups // heads
    kernel[(triton.cdiv(tokens, block), groups)](*tensors, tokens, scale, heads=heads, groups=groups, size=size, **how)


def _edges_of(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """The beginning and the end of each token's sequence: int32 [2, tokens]."""
    edges = torch.empty(2, tokens, dtype=torch.int32, device=cu_seqlens.device)
    _edges[(triton.cdiv(tokens, 256),)](cu_seqlens, edges, tokens, cu_seqlens.numel(), block=256)
    return edges


@triton.jit  # type: ignore[untyped-decorator]
def _edges(bounds, edges, tokens, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0) * block + tl.arange(0, block)
    begin = tl.zeros([block], tl.int32)
    end = tl.zeros([block], tl.int32) + tokens
    for number in range(count):
        bound = tl.load(bounds + number)
        begin = tl.where(bound <= token, tl.maximum(begin, bound), begin)
        end = tl.where(bound > token, tl.minimum(end, bound), end)
    tl.store(edges + token, begin, mask=token < tokens)
    tl.store(edges + tokens + token, end, mask=token < tokens)


@triton.jit  # type: ignore[untyped-decorator]
def _row_places(first, group, tokens, heads: tl.constexpr, groups: tl.constexpr, rows: tl.constexpr):  # type: ignore[no-untyped-def]
    """The token of each row, the row's place in [tokens, heads], and whether there is such a token."""
    row = tl.arange(0, rows)
    token = first + row // (heads // groups)
    return token, token * heads + group * (heads // groups) + row % (heads // groups), token < tokens


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, out, logs, edges, tokens, scale,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    first, group = tl.program_id(0) * (rows * groups // heads), tl.program_id(1)
    token, row, there = _row_places(first, group, tokens, heads, groups, rows)
    feature = tl.arange(0, size)
    at = row.to(tl.int64)[:, None] * size + feature[None, :]
    query = tl.load(q + at, mask=there[:, None], other=0.0)
    begin = tl.load(edges + token, mask=there, other=0)
    highest = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    mean = tl.zeros([rows, size], tl.float32)
    low = tl.load(edges + first) // keys * keys
    for start in range(low, tl.minimum(first + rows * groups // heads, tokens), keys):
        key_token = start + tl.arange(0, keys)
        of_key = (key_token.to(tl.int64) * groups + group)[:, None] * size + feature[None, :]
        exists = (key_token < tokens)[:, None]
        key = tl.load(k + of_key, mask=exists, other=0.0)
        value = tl.load(v + of_key, mask=exists, other=0.0)
        seen = (key_token[None, :] <= token[:, None]) & (key_token[None, :] >= begin[:, None])
        score = tl.where(seen, tl.dot(query, tl.trans(key)) * (scale * LOG2_E), float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - shift[:, None])
        shrink = tl.exp2(highest - shift)
        total = total * shrink + tl.sum(weight, 1)
        mean = mean * shrink[:, None] + tl.dot(weight.to(value.dtype), value)
        highest = higher
    tl.store(out + at, (mean / total[:, None]).to(query.dtype), mask=there[:, None])
    tl.store(logs + row, highest + tl.log2(total), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_queries(  # type: ignore[no-untyped-def]
    q, k, v, out, gradient, logs, sums, edges, dq, tokens, scale,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    first, group = tl.program_id(0) * (rows * groups // heads), tl.program_id(1)
    token, row, there = _row_places(first, group, tokens, heads, groups, rows)
    feature = tl.arange(0, size)
    at = row.to(tl.int64)[:, None] * size + feature[None, :]
    query = tl.load(q + at, mask=there[:, None], other=0.0)
    towards = tl.load(gradient + at, mask=there[:, None], other=0.0)
    result = tl.load(out + at, mask=there[:, None], other=0.0)
    sum_of = tl.sum(towards.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(sums + row, sum_of, mask=there)
    log = tl.load(logs + row, mask=there, other=0.0)
    begin = tl.load(edges + token, mask=there, other=0)
    moved = tl.zeros([rows, size], tl.float32)
    low = tl.load(edges + first) // keys * keys
    for start in range(low, tl.minimum(first + rows * groups // heads, tokens), keys):
        key_token = start + tl.arange(0, keys)
        of_key = (key_token.to(tl.int64) * groups + group)[:, None] * size + feature[None, :]
        exists = (key_token < tokens)[:, None]
        key = tl.load(k + of_key, mask=exists, other=0.0)
        value = tl.load(v + of_key, mask=exists, other=0.0)
        seen = (key_token[None, :] <= token[:, None]) & (key_token[None, :] >= begin[:, None])
        score = tl.dot(query, tl.trans(key)) * (scale * LOG2_E)
        weight = tl.where(seen, tl.exp2(score - log[:, None]), 0.0)
        change = weight * (tl.dot(towards, tl.trans(value)) - sum_of[:, None])
        moved += tl.dot(change.to(key.dtype), key)
    tl.store(dq + at, (moved * scale).to(query.dtype), mask=there[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _backward_keys(  # type: ignore[no-untyped-def]
    q, k, v, gradient, logs, sums, edges, dk, dv, tokens, scale,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    start, group = tl.program_id(0) * keys, tl.program_id(1)
    feature = tl.arange(0, size)
    key_token = start + tl.arange(0, keys)
    at = (key_token.to(tl.int64) * groups + group)[:, None] * size + feature[None, :]
    exists = (key_token < tokens)[:, None]
    key = tl.load(k + at, mask=exists, other=0.0)
    value = tl.load(v + at, mask=exists, other=0.0)
    moved_key = tl.zeros([keys, size], tl.float32)
    moved_value = tl.zeros([keys, size], tl.float32)
    block: tl.constexpr = rows * groups // heads
    high = tl.load(edges + tokens + tl.minimum(start + keys, tokens) - 1)
    for first in range(start // block * block, high, block):
        token, row, there = _row_places(first, group, tokens, heads, groups, rows)
        of_row = row.to(tl.int64)[:, None] * size + feature[None, :]
        query = tl.load(q + of_row, mask=there[:, None], other=0.0)
        towards = tl.load(gradient + of_row, mask=there[:, None], other=0.0)
        log = tl.load(logs + row, mask=there, other=0.0)
        sum_of = tl.load(sums + row, mask=there, other=0.0)
        begin = tl.load(edges + token, mask=there, other=tokens)
        seen = (key_token[:, None] <= token[None, :]) & (key_token[:, None] >= begin[None, :])
        score = tl.dot(key, tl.trans(query)) * (scale * LOG2_E)
        weight = tl.where(seen, tl.exp2(score - log[None, :]), 0.0)
        moved_value += tl.dot(weight.to(towards.dtype), towards)
        change = weight * (tl.dot(value, tl.trans(towards)) - sum_of[None, :])
        moved_key += tl.dot(change.to(query.dtype), query)
    tl.store(dk + at, (moved_key * scale).to(key.dtype), mask=exists)
    tl.store(dv + at, moved_value.to(value.dtype), mask=exists)
