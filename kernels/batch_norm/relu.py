"""The ReLU and its mask, for the kernels of all passes: what forward lets through, backward must let through."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def apply_relu(x):  # type: ignore[no-untyped-def]
    """x where it is positive, else 0; a NaN stays a NaN."""
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def relu_gradient(grad, x):  # type: ignore[no-untyped-def]
    """`grad` of relu(x) → that of x, as torch masks it: 0 where x ≤ 0, unchanged elsewhere, where x is NaN too."""
    return tl.where(x <= 0.0, 0.0, grad)
