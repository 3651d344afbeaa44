"""One tile of the projected losses' backward pass: what dy of the hidden features means for the rows and the sums."""

from __future__ import annotations

import triton
import triton.language as tl

from fastjepa.kernels.launch import dot, load_rows, round_to
from fastjepa.kernels.projected_losses.parts import dot_matrix, dot_rows, parts_of_rows, sum_of


@triton.jit
def zero_sums(BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σdy of no tile: 16 equal columns, or rows, of a product with ones, which is cheaper than a reduction per tile.

    Columns share the other product's left operand, dyᵀ, if there are rows enough for the large matrix instructions.
    """
    return tl.zeros([BLOCK_H, 16] if BLOCK_N >= 64 else [16, BLOCK_H], dtype=tl.float32)


@triton.jit
def add_sums(high, low, sum_dy, HALF: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """`zero_sums` with a tile's dy added; in fp32 subtracted, as by `dot_rows`."""
    COLUMNS: tl.constexpr = BLOCK_N >= 64
    ones = tl.full([BLOCK_N, 16] if COLUMNS else [16, BLOCK_N], 1.0, high.dtype)
    if HALF:
        sum_dy = dot(tl.trans(high), ones, sum_dy, "ieee") if COLUMNS else dot(ones, high, sum_dy, "ieee")
    else:
        zeros = tl.zeros_like(sum_dy)
        rest = dot(tl.trans(low), ones, zeros, "tf32") if COLUMNS else dot(ones, low, zeros, "tf32")
        sum_dy -= dot(tl.trans(high), ones, rest, "tf32") if COLUMNS else dot(ones, high, rest, "tf32")
    return sum_dy


@triton.jit
def total_sums(sum_dy, HALF: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σdy (BLOCK_H,) of 16 equal columns or rows."""
    return tl.sum(sum_of(sum_dy, HALF), 1 if BLOCK_N >= 64 else 0) * 0.0625


@triton.jit
def reduce_slope(  # type: ignore[no-untyped-def]
    dy,  # (BLOCK_N, BLOCK_H) fp32, 0 where there is no row
    x_high,  # (BLOCK_N, BLOCK_D), like the next: x − μ
    x_low,
    slope_ptr,  # (2, BLOCK_D, BLOCK_H): Aᵀ as a sum of two
    out_ptr,  # (n_rows, D): written, or added to
    sum_dy,  # as `zero_sums`
    dy_x,  # (BLOCK_H, BLOCK_D): Σdy(x−μ)ᵀ so far; BLOCK_H first, because wgmma makes at least 64 rows
    offs_n,
    n_rows,
    D: tl.constexpr,
    EVEN_N: tl.constexpr,
    HALF: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Write (or ADD) v = Aᵀdy for a tile, with bf16 A₁ᵀdy; return the two sums with the tile added."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_h = tl.arange(0, BLOCK_H)
    high, low = parts_of_rows(dy, slope_ptr.dtype.element_ty)
    slope_ptrs = slope_ptr + offs_d[None, :] * BLOCK_H + offs_h[:, None]  # (BLOCK_H, BLOCK_D)
    v = dot_matrix(high, low, slope_ptrs, BLOCK_D * BLOCK_H, tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32), HALF)
    if ADD:
        v += load_rows(out_ptr, offs_n, offs_d, n_rows, D, EVEN_N, D == BLOCK_D).to(tl.float32)
    v = round_to(v, out_ptr.dtype.element_ty)
    ptrs = out_ptr + offs_n[:, None] * D + offs_d[None, :]
    if EVEN_N and D == BLOCK_D:
        tl.store(ptrs, v)
    else:
        tl.store(ptrs, v, mask=(offs_n[:, None] < n_rows) & (offs_d[None, :] < D))
    dy_x = dot_rows(high, low, x_high, x_low, dy_x, HALF)
    return add_sums(high, low, sum_dy, HALF, BLOCK_N), dy_x
