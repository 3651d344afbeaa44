"""What the passes over the activations multiply, as sums of two numbers that matrix instructions take.

    HALF, rows in bf16: a factor made of rows is one bf16 number; of the matrices, A is the sum of two.
    Rows in fp32: every factor is the sum of an 11-bit number and what is left ("tf32x3", see `kernels.tf32`).

The parts of a matrix lie one behind the other, the large one first, as the kernels between the passes left them. So no
tile splits it again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastjepa.kernels.launch import dot, round_to
from fastjepa.kernels.tf32 import dot_tf32x3, split_tf32


def n_parts(dtype: torch.dtype) -> int:
    """How many parts G and M have for rows of `dtype`; A has two always."""
    return 2 if dtype == torch.float32 else 1


@triton.jit
def parts_of_matrix(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp64 x → (first, second) of DTYPE, whose sum is x but for the rounding of the second."""
    if DTYPE == tl.float32:  # noqa: SIM300
        first, _rest = split_tf32(x.to(tl.float32))
    else:
        first = round_to(x.to(tl.float32), DTYPE)
    second = round_to((x - first.to(tl.float32).to(tl.float64)).to(tl.float32), DTYPE)
    return first, second


@triton.jit
def parts_of_rows(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """fp32 x → (high, low), operands of a dot; with bf16 rows the rounded x, and low is not used."""
    if DTYPE == tl.float32:  # noqa: SIM300
        high, low = split_tf32(x)
    else:
        high = round_to(x, DTYPE)
        low = high
    return high, low


@triton.jit
def dot_matrix(high, low, matrix_ptrs, PART: tl.constexpr, acc, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + rows (high, low) @ a matrix (K, N) at `matrix_ptrs`; of fp32 its second part is PART elements behind."""
    first = tl.load(matrix_ptrs)
    return dot(high, first, acc, "ieee") if HALF else dot_tf32x3(high, low, first, tl.load(matrix_ptrs + PART), acc)


@triton.jit
def dot_rows(a_high, a_low, b_high, b_low, acc, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """acc + aᵀb (M, N), a sum over all tiles, of rows a (rows, M) and b (rows, N); in fp32 acc − aᵀb (`sum_of`).

    Tensor cores add into their accumulator with truncation. In fp32, where the sum must keep 1e-5 over the hundreds of
    tiles, each tile's product is made apart; it is subtracted because Triton folds an addition back into the dot.
    """
    if HALF:
        acc = dot(tl.trans(a_high), b_high, acc, "ieee")
    else:
        acc -= dot_tf32x3(tl.trans(a_high), tl.trans(a_low), b_high, b_low, tl.zeros_like(acc))
    return acc


@triton.jit
def sum_of(acc, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum that `dot_rows` made."""
    return acc if HALF else -acc
