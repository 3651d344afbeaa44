"""One tile of the projected losses' backward pass: what dy of the hidden features means for the rows and the sums."""

from __future__ import annotations

import triton
import triton.language as tl

from fastjepa.kernels.launch import add_dot, dot, load_rows, round_to


@triton.jit
def reduce_slope(  # type: ignore[no-untyped-def]
    dy,  # (BLOCK_N, BLOCK_H) fp32, 0 where there is no row
    centred,  # (BLOCK_N, BLOCK_D): x − μ, a dot operand
    slope_ptr,  # (BLOCK_D, BLOCK_H): Aᵀ
    out_ptr,  # (n_rows, D): written, or added to
    sum_dy,  # (16, BLOCK_H): equal rows, each Σdy so far
    dy_x,  # (BLOCK_H, BLOCK_D): Σdy(x−μ)ᵀ so far; BLOCK_H first, because wgmma makes at least 64 rows
    slope_sum,  # (BLOCK_D,): ΣAᵀdy so far
    offs_n,
    n_rows,
    D: tl.constexpr,
    EVEN_N: tl.constexpr,
    HALF: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Write (or ADD) Aᵀdy for a tile; return the three sums with the tile added."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_h = tl.arange(0, BLOCK_H)
    operand = round_to(dy, slope_ptr.dtype.element_ty)
    slope = tl.load(slope_ptr + offs_d[None, :] * BLOCK_H + offs_h[:, None])  # (BLOCK_H, BLOCK_D)
    v = dot(operand, slope, tl.zeros_like(centred).to(tl.float32), PRECISION)
    slope_sum += tl.sum(v, 0)
    if ADD:
        v += load_rows(out_ptr, offs_n, offs_d, n_rows, D, EVEN_N, D == BLOCK_D).to(tl.float32)
    v = round_to(v, out_ptr.dtype.element_ty)
    ptrs = out_ptr + offs_n[:, None] * D + offs_d[None, :]
    if EVEN_N and D == BLOCK_D:
        tl.store(ptrs, v)
    else:
        tl.store(ptrs, v, mask=(offs_n[:, None] < n_rows) & (offs_d[None, :] < D))
    dy_x = add_dot(dy_x, tl.trans(operand), centred, PRECISION, not HALF)
    sum_dy = add_dot(sum_dy, tl.full([16, BLOCK_N], 1.0, operand.dtype), operand, PRECISION, not HALF)
    return sum_dy, dy_x, slope_sum
