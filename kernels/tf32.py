"""fp32 products on tensor cores, of operands that are split beforehand: once for several products, or for all tiles.

A "tf32" dot reads the first 11 bits of an operand. "tf32x3" splits both operands wherever it is written, a matrix that
all tiles share in each of them; here the parts are made where it costs least.

    x = high + low;  a·b ≈ a_low·b_high + a_high·b_low + a_high·b_high;  what is left out is 2^-22 of it at most
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastjepa.kernels.launch import dot


@triton.jit
def split_tf32(x):  # type: ignore[no-untyped-def]
    """(high, low) of fp32 x: high is the nearest number of 11 bits, low the rest."""
    high = ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def dot_tf32x3(a_high, a_low, b_high, b_low, acc):  # type: ignore[no-untyped-def]
    """acc (M, N) + a (M, K) @ b (K, N), all fp32, the small terms first."""
    acc = dot(a_low, b_high, acc, "tf32")
    acc = dot(a_high, b_low, acc, "tf32")
    return dot(a_high, b_high, acc, "tf32")
