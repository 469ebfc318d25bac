"""Compute SwiGLU and its gradient, and write them in FP8 with delayed scaling: two Triton kernels.

In: the output of the layer before SwiGLU, [rows, 2 * width]: in each row the gates a, then the values b; for the gradient
also that of the result. Out: silu(a) * b, or the gradients of a and b, times a scale, in FP8; the largest absolute value
before the scale, combined with the one that is there; and the inverse of the scale.

Both compute in float32 with the steps and roundings of Transformer Engine's kernels on Hopper, so that the bytes are the
same. A program works on many tiles, each a part of a row: it loads the next ones while it computes one, and combines its
largest value once.

This module imports Triton, so only a training on a GPU imports it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

RESULT_TILE, GRADIENT_TILE = 2048, 1024  # columns of a tile
WARPS, STAGES = 4, 3  # of a program
PROGRAMS = 132 * 4  # the fastest on an H200; it has 132 multiprocessors
UNALIGNED = ("scale", "amax", "scale_inv", "tiles")  # one program for any addresses of these


def write_result(
    mixed: torch.Tensor, out: torch.Tensor, scale: torch.Tensor, amax: torch.Tensor, scale_inv: torch.Tensor
) -> None:
    """Write the result of mixed [..., 2 * width] into out [..., width], of an FP8 type. All are contiguous."""
    _launch(_write_result, RESULT_TILE, (mixed,), out, scale, amax, scale_inv)


def write_gradient(
    gradient: torch.Tensor,
    mixed: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    amax: torch.Tensor,
    scale_inv: torch.Tensor,
) -> None:
    """Write the gradient of mixed into out, of its shape; gradient [..., width] is that of the result."""
    _launch(_write_gradient, GRADIENT_TILE, (gradient, mixed), out, scale, amax, scale_inv)


def _launch(kernel: Any, tile: int, inputs: tuple[torch.Tensor, ...], out: torch.Tensor, *scaling: torch.Tensor) -> None:
    width = inputs[-1].shape[-1] // 2
    tile = min(tile, triton.next_power_of_2(width))
    tiles = inputs[-1].numel() // (2 * width) * triton.cdiv(width, tile)
    kernel[(min(tiles, PROGRAMS),)](*inputs, out, *scaling, tiles, width=width, tile=tile, stages=STAGES, num_warps=WARPS)


# 1 / (1 + e^-x) in the steps that CUDA's compiler makes of it. e^-x is 2^k * 2^r, with k a whole number and r small. An
# approximate reciprocal and one step of Newton's round like a division. The minimum keeps infinity out of that step.
SIGMOID = tl.constexpr("""{
    .reg .f32 k, r, d, e;
    fma.rn.ftz.sat.f32 k, $1, 0fBBBB989D, 0f3F000000;
    fma.rm.ftz.f32 k, k, 0f437C0000, 0f4B400001;
    sub.f32 r, 0f4B40007F, k;
    fma.rn.ftz.f32 r, $1, 0fBFB8AA3B, r;
    fma.rn.ftz.f32 r, $1, 0fB2A57060, r;
    ex2.approx.ftz.f32 r, r;
    shl.b32 k, k, 23;
    fma.rn.f32 d, r, k, 0f3F800000;
    min.f32 d, d, 0f7F000000;
    rcp.approx.ftz.f32 r, d;
    fma.rn.f32 e, d, r, 0fBF800000;
    neg.f32 e, e;
    fma.rn.f32 $0, r, e, r;
}""")


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise(SIGMOID, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit  # type: ignore[untyped-decorator]
def _place(index, width: tl.constexpr, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a tile: its row, its columns [tile], and which of them exist."""
    tiles: tl.constexpr = (width + tile - 1) // tile
    # A thread reads 16 bytes at once and writes 8. If it wrote 16, neighbours would not read side by side.
    column = tl.max_contiguous(index % tiles * tile + tl.arange(0, tile), 8)
    return tl.cast(index // tiles, tl.int64), column, column < width


@triton.jit
def _read(pointers, inside):  # type: ignore[no-untyped-def]
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _finish(largest, amax, scale, scale_inv):  # type: ignore[no-untyped-def]
    """Combine the largest value with amax. The first program also writes the inverse of the scale."""
    bits = tl.max(largest, axis=0).to(tl.int32, bitcast=True)  # in the order of the values, none of which is negative
    tl.atomic_max(amax.to(tl.pointer_type(tl.int32)), bits, sem="relaxed")
    if tl.program_id(0) == 0:
        tl.store(scale_inv, tl.div_rn(1.0, scale))


@triton.jit(do_not_specialize=UNALIGNED)  # type: ignore[untyped-decorator]
def _write_result(  # type: ignore[no-untyped-def]
    mixed, out, scale, amax, scale_inv, tiles, width: tl.constexpr, tile: tl.constexpr, stages: tl.constexpr
):
    """A program writes some tiles of the result."""
    factor = tl.load(scale)
    largest = tl.zeros([tile], tl.float32)  # a NaN does not count
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=stages):
        row, column, inside = _place(index, width, tile)
        at = mixed + row * (2 * width) + column
        a, b = _read(at, inside), _read(at + width, inside)
        result = a * _sigmoid(a) * b
        tl.store(out + row * width + column, (result * factor).to(out.dtype.element_ty), mask=inside)
        largest = tl.maximum(largest, tl.abs(result))
    _finish(largest, amax, factor, scale_inv)


@triton.jit(do_not_specialize=UNALIGNED)  # type: ignore[untyped-decorator]
def _write_gradient(  # type: ignore[no-untyped-def]
    gradient, mixed, out, scale, amax, scale_inv, tiles, width: tl.constexpr, tile: tl.constexpr, stages: tl.constexpr
):
    """A program writes some tiles of the gradient of a, and the same tiles of that of b."""
    factor = tl.load(scale)
    largest = tl.zeros([tile], tl.float32)  # a NaN does not count
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=stages):
        row, column, inside = _place(index, width, tile)
        at = row * (2 * width) + column
        g = _read(gradient + row * width + column, inside)
        a, b = _read(mixed + at, inside), _read(mixed + at + width, inside)
        sigmoid = _sigmoid(a)
        of_a = tl.fma(a, sigmoid * (1.0 - sigmoid), sigmoid) * g * b
        of_b = g * (a * sigmoid)
        tl.store(out + at, (of_a * factor).to(out.dtype.element_ty), mask=inside)
        tl.store(out + at + width, (of_b * factor).to(out.dtype.element_ty), mask=inside)
        largest = tl.maximum(largest, tl.maximum(tl.abs(of_a), tl.abs(of_b)))
    _finish(largest, amax, factor, scale_inv)
