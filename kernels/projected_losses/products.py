"""Products of small float64 matrices, for the four kernels between the passes over the rows."""

from __future__ import annotations

import triton
import triton.language as tl

from fastjepa.kernels.launch import INTERPRET

_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def add_product(  # type: ignore[no-untyped-def]
    acc,  # (M, N) fp64
    a_ptr,
    b_ptr,
    offs_a,  # (M,), like mask_a
    offs_b,  # (N,), like mask_b
    mask_a,
    mask_b,
    stride_a,
    stride_b,
    COUNT: tl.constexpr,
):
    """acc + Σ_k a_k·b_kᵀ: rows k = 0 … COUNT−1 of two matrices, a_k at a_ptr + k·stride_a + offs_a.

    Not `tl.dot`: what becomes of a float64 one differs between versions of triton and between architectures, and with
    triton 3.6 and 3.7 most do not compile for sm_100. The interpreter has no such troubles, but takes half a
    millisecond for each k of the loop.
    """
    if _INTERPRET:
        offs_k = tl.arange(0, triton.next_power_of_2(COUNT))
        mask_k = offs_k < COUNT
        a_ptrs = a_ptr + (offs_a[:, None] + offs_k[None, :] * stride_a)
        b_ptrs = b_ptr + (offs_b[None, :] + offs_k[:, None] * stride_b)
        a = tl.load(a_ptrs, mask=mask_a[:, None] & mask_k[None, :], other=0.0).to(tl.float64)
        b = tl.load(b_ptrs, mask=mask_b[None, :] & mask_k[:, None], other=0.0).to(tl.float64)
        acc = tl.dot(a, b, acc, out_dtype=tl.float64)
    else:
        acc = add_outer_products(acc, a_ptr, b_ptr, offs_a, offs_b, mask_a, mask_b, stride_a, stride_b, COUNT)
    return acc


@triton.jit
def add_outer_products(  # type: ignore[no-untyped-def]
    acc, a_ptr, b_ptr, offs_a, offs_b, mask_a, mask_b, stride_a, stride_b, COUNT: tl.constexpr
):
    """`add_product` as it is compiled: a thread's sums stay in registers, and the factors come from the L1 cache."""
    for k in tl.range(0, COUNT, loop_unroll_factor=4):  # the factors of four k are on their way at once
        a = tl.load(a_ptr + (offs_a + k * stride_a), mask=mask_a, other=0.0).to(tl.float64)
        b = tl.load(b_ptr + (offs_b + k * stride_b), mask=mask_b, other=0.0).to(tl.float64)
        acc += a[:, None] * b[None, :]
    return acc
