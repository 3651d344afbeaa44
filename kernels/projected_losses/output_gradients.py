"""Before the backward pass over the activations: the losses differentiated down to r, and the gradient of W2.

    T = 1+K tensors (t = 0: the state z; t = 1..K: predictions)  H hidden  OUT out features

`algebra.output_gradients` in one launch, float64. With E the gradient of the losses with respect to z's covariance
C, divided by N−1, and R_t = W2·S_t, which `losses` left:

    G = 2 W2ᵀ·E·W2,  M = W2ᵀ·W2,  c_k = grad_k·2/(OUT·N),  dL/dW2 = 2 E·R_0 + Σ_k c_k·R_k

Each program makes 32 rows of G and of every c_k·M, or of dL/dW2. Of G's rows the first factor, W2ᵀ·E, is a scratch of
the program's own. E is a multiple of C but on its diagonal, and both are symmetric.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa.kernels.launch import TRITON_TYPE, AuditCase, LaunchConfig, audit_signature, launch_kernel, round_to
from fastjepa.kernels.projected_losses.algebra import STD_EPS
from fastjepa.kernels.projected_losses.parts import n_parts, parts_of_matrix
from fastjepa.kernels.projected_losses.products import add_product

_STD_EPS = tl.constexpr(STD_EPS)


@triton.jit
def on_diagonal(covariance_ptr, offs_o, mask_o, grad_std, factor, OUT: tl.constexpr):  # type: ignore[no-untyped-def]
    """E − factor·C, which is diagonal: std_loss's gradient −grad_std/(2·sqrt(C + 1e-4)) while that root is below 1,
    and cov_loss has none, which elsewhere is factor·C."""
    variance = tl.load(covariance_ptr + offs_o * (OUT + 1), mask=mask_o, other=0.0)
    std = tl.sqrt(variance + tl.full([], _STD_EPS, tl.float64))
    return tl.where(std < 1.0, -0.5 / std, 0.0) * grad_std - factor * variance


@triton.jit
def coefficient_of(grad_prediction_ptr, k, grad_prediction_stride, n, OUT: tl.constexpr):  # type: ignore[no-untyped-def]
    """c_k."""
    coefficient = tl.full([], 0.0, tl.float64)
    if grad_prediction_ptr is not None:
        coefficient += tl.load(grad_prediction_ptr + k * grad_prediction_stride)
    return coefficient * (2.0 / (OUT * n))


@triton.jit
def store_parts(matrix_ptr, offs, matrix, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """Leave a float64 tile as the passes read it: rounded to bf16, or in two parts of fp32, PART elements apart."""
    first, second = parts_of_matrix(matrix, matrix_ptr.dtype.element_ty)
    tl.store(matrix_ptr + offs, first)
    if matrix_ptr.dtype.element_ty == tl.float32:
        tl.store(matrix_ptr + PART + offs, second)


@triton.jit
def hidden_rows(  # type: ignore[no-untyped-def]
    variance_ptr,  # pointers as in the kernel
    gram_ptr,
    inner_ptr,
    grad_prediction_ptr,
    covariance_ptr,
    wide_weight2_ptr,
    first_row,
    grad_std,
    factor,
    grad_prediction_stride,
    n,
    H: tl.constexpr,
    OUT: tl.constexpr,
    N_PREDICTIONS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Rows of G, and of c_k·M of every prediction."""
    PART: tl.constexpr = BLOCK_H * BLOCK_H
    HALF: tl.constexpr = variance_ptr.dtype.element_ty != tl.float32
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_h = tl.arange(0, BLOCK_H)
    offs_o = tl.arange(0, BLOCK_O)
    mask_m, mask_h, mask_o = offs_m < H, offs_h < H, offs_o < OUT
    mask = mask_m[:, None] & mask_o[None, :]
    inner = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float64)
    inner = add_product(inner, wide_weight2_ptr, covariance_ptr, offs_m, offs_o, mask_m, mask_o, H, OUT, OUT)
    weight2 = tl.load(wide_weight2_ptr + offs_o[None, :] * H + offs_m[:, None], mask=mask, other=0.0)
    diagonal = on_diagonal(covariance_ptr, offs_o, mask_o, grad_std, factor, OUT)
    inner = factor * inner + weight2 * diagonal[None, :]
    tl.store(inner_ptr + offs_m[:, None] * OUT + offs_o[None, :], inner, mask=mask)
    tl.debug_barrier()  # every thread's part of it is there
    product = tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float64)
    product = add_product(product, inner_ptr, wide_weight2_ptr, offs_m * OUT, offs_h, mask_m, mask_h, 1, H, OUT)
    offs_mh = offs_m[:, None] * BLOCK_H + offs_h[None, :]
    store_parts(variance_ptr, offs_mh, 2.0 * product, PART)
    if gram_ptr is not None:
        gram = tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float64)
        gram = add_product(gram, wide_weight2_ptr, wide_weight2_ptr, offs_m, offs_h, mask_m, mask_h, H, H, OUT)
        for k in range(N_PREDICTIONS):
            coefficient = coefficient_of(grad_prediction_ptr, k, grad_prediction_stride, n, OUT)
            store_parts(gram_ptr + k * (1 if HALF else 2) * PART, offs_mh, coefficient * gram, PART)


@triton.jit
def weight2_rows(  # type: ignore[no-untyped-def]
    grad_weight2_ptr,  # pointers as in the kernel
    grad_prediction_ptr,
    covariance_ptr,
    projected_ptr,
    first_row,
    grad_std,
    factor,
    grad_prediction_stride,
    n,
    H: tl.constexpr,
    OUT: tl.constexpr,
    N_PREDICTIONS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Rows of dL/dW2."""
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_h = tl.arange(0, BLOCK_H)
    mask_m, mask_h = offs_m < OUT, offs_h < H
    mask = mask_m[:, None] & mask_h[None, :]
    offs_mh = offs_m[:, None] * H + offs_h[None, :]
    product = tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float64)
    product = add_product(product, covariance_ptr, projected_ptr, offs_m, offs_h, mask_m, mask_h, OUT, H, OUT)
    diagonal = on_diagonal(covariance_ptr, offs_m, mask_m, grad_std, factor, OUT)
    projected = tl.load(projected_ptr + offs_mh, mask=mask, other=0.0)
    product = 2.0 * (factor * product + diagonal[:, None] * projected)
    for k in range(N_PREDICTIONS):
        coefficient = coefficient_of(grad_prediction_ptr, k, grad_prediction_stride, n, OUT)
        product += coefficient * tl.load(projected_ptr + (k + 1) * OUT * H + offs_mh, mask=mask, other=0.0)
    grad_weight2 = round_to(product.to(tl.float32), grad_weight2_ptr.dtype.element_ty)
    tl.store(grad_weight2_ptr + offs_mh, grad_weight2, mask=mask)


@triton.jit
def _output_gradients_kernel(  # type: ignore[no-untyped-def]
    variance_ptr,  # (parts, SIZE_H, SIZE_H) in the rows' dtype: G
    gram_ptr,  # (K, parts, SIZE_H, SIZE_H) in the rows' dtype: c_k·M; None if K is 0
    grad_weight2_ptr,  # (OUT, H)
    inner_ptr,  # (H, OUT) fp64: W2ᵀ·E; read again here
    grad_std_ptr,  # () fp32, or None for 0, like the next two
    grad_cov_ptr,
    grad_prediction_ptr,  # (K,) fp32
    covariance_ptr,  # (OUT, OUT) fp64: C
    projected_ptr,  # (T, OUT, H) fp64: R
    wide_weight2_ptr,  # (OUT, H) fp64: W2
    n_rows,
    grad_prediction_stride,
    H: tl.constexpr,
    OUT: tl.constexpr,
    N_PREDICTIONS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,  # all of SIZE_H
    BLOCK_O: tl.constexpr,  # all out features
):
    pid = tl.program_id(0)
    HIDDEN_BLOCKS: tl.constexpr = BLOCK_H // BLOCK_M
    n = tl.full([], 0.0, tl.float64) + n_rows
    grad_std = tl.full([], 0.0, tl.float64)
    grad_cov = tl.full([], 0.0, tl.float64)
    if grad_std_ptr is not None:
        grad_std += tl.load(grad_std_ptr)
    if grad_cov_ptr is not None:
        grad_cov += tl.load(grad_cov_ptr)
    grad_std /= OUT * (n - 1.0)
    factor = grad_cov * 2.0 / (OUT * (OUT - 1) * (n - 1.0))
    if pid < HIDDEN_BLOCKS:
        hidden_rows(
            variance_ptr, gram_ptr, inner_ptr, grad_prediction_ptr, covariance_ptr, wide_weight2_ptr,
            pid * BLOCK_M, grad_std, factor, grad_prediction_stride, n,
            H, OUT, N_PREDICTIONS, BLOCK_M, BLOCK_H, BLOCK_O,
        )  # fmt: skip
    else:
        weight2_rows(
            grad_weight2_ptr, grad_prediction_ptr, covariance_ptr, projected_ptr,
            (pid - HIDDEN_BLOCKS) * BLOCK_M, grad_std, factor, grad_prediction_stride, n,
            H, OUT, N_PREDICTIONS, BLOCK_M, BLOCK_H,
        )  # fmt: skip


_BLOCK_M = 32  # rows of a program: 16 float64 sums a thread at 128 columns, and as many for the other matrix


def _config(size_h: int, n_out: int) -> LaunchConfig:
    block_o = max(16, triton.next_power_of_2(int(n_out)))
    return LaunchConfig(num_warps=8, blocks={"BLOCK_M": _BLOCK_M, "BLOCK_H": size_h, "BLOCK_O": block_o})


class OutputGradients(NamedTuple):
    """What the backward pass over the activations reads, and the gradient of W2."""

    variance: Tensor  # (parts, SIZE_H, SIZE_H) in the rows' dtype: G
    gram: Tensor | None  # (K, parts, SIZE_H, SIZE_H) in the rows' dtype: c_k·M; None without predictions
    weight2: Tensor  # (OUT, H) in the parameter's dtype


def output_gradients(
    grad_std: Tensor | None,
    grad_cov: Tensor | None,
    grad_prediction: Tensor | None,
    covariance: Tensor,
    projected: Tensor,
    wide_weight2: Tensor,
    n_rows: int,
    size_h: int,
    dtype: torch.dtype,
    weight2_dtype: torch.dtype,
) -> OutputGradients:
    """From the gradients of the losses, fp32 (), (), (K,), None for zeros, and what `losses` left; rows of `dtype`."""
    n_tensors, n_out, hidden = projected.shape
    device, predicts, shape = projected.device, n_tensors > 1, (n_parts(dtype), size_h, size_h)
    found = OutputGradients(
        variance=torch.empty(shape, device=device, dtype=dtype),
        gram=torch.empty((n_tensors - 1, *shape), device=device, dtype=dtype) if predicts else None,
        weight2=torch.empty(n_out, hidden, device=device, dtype=weight2_dtype),
    )
    given = grad_prediction if predicts else None
    launch_kernel(
        _output_gradients_kernel,
        (size_h // _BLOCK_M + triton.cdiv(n_out, _BLOCK_M),),
        _config(size_h, n_out),
        variance_ptr=found.variance,
        gram_ptr=found.gram,
        grad_weight2_ptr=found.weight2,
        inner_ptr=torch.empty(hidden, n_out, device=device, dtype=torch.float64),
        grad_std_ptr=grad_std,
        grad_cov_ptr=grad_cov,
        grad_prediction_ptr=given,
        covariance_ptr=covariance,
        projected_ptr=projected,
        wide_weight2_ptr=wide_weight2,
        n_rows=n_rows,
        grad_prediction_stride=0 if given is None else given.stride(0),
        H=hidden,
        OUT=n_out,
        N_PREDICTIONS=n_tensors - 1,
    )
    return found


def audit_cases() -> list[AuditCase]:
    """At the default recipe, without predictions too, and at the largest sizes."""
    kernel, cases = _output_gradients_kernel, []
    wide = ("inner_ptr", "covariance_ptr", "projected_ptr", "wide_weight2_ptr")
    for dtype in (torch.float32, torch.bfloat16):
        for h, k in ((64, 4), (64, 0), (128, 4)):
            matrices = (1 + k) + 3  # float64: R, the covariance, W2, the scratch
            absent = () if k else ("gram_ptr", "grad_prediction_ptr")
            signature = audit_signature(kernel, dtype, ("variance_ptr", "gram_ptr"), absent)
            cases.append(
                AuditCase(
                    name=f"output_gradients/K={k}/{TRITON_TYPE[dtype]}/H={h}",
                    kernel=kernel,
                    signature=signature | dict.fromkeys(wide, "*fp64"),
                    constexprs={**dict.fromkeys(absent), "H": h, "OUT": h, "N_PREDICTIONS": k},
                    config=_config(h, h),
                    bytes_moved=h * h * (8 * matrices + 4 + (k + 1) * n_parts(dtype) * dtype.itemsize) + 4 * (k + 2),
                    flops=2 * (4 if k else 3) * h**3,
                    divisible_by_16=("n_rows",),
                )
            )
    return cases
