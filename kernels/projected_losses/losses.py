"""Behind the moments of the activations: the losses, and what backward needs.

    T = 1+K tensors (t = 0: the state z; t = 1..K: predictions)  H hidden  OUT out features

`algebra.covariance`, `std_and_cov_from_moments` and `prediction_losses` in one launch, float64; a program for each
tensor. R = W2·S, S the scatter of r(z) or a prediction's ΣΔΔᵀ, gives tr(R·W2ᵀ), a prediction's loss, and W2·S·W2ᵀ, z's
covariance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa.kernels.launch import AuditCase, LaunchConfig, audit_signature, launch_kernel
from fastjepa.kernels.projected_losses.algebra import STD_EPS
from fastjepa.kernels.projected_losses.products import add_product

_STD_EPS = tl.constexpr(STD_EPS)


@triton.jit
def _losses_kernel(  # type: ignore[no-untyped-def]
    std_ptr,  # () fp32
    cov_ptr,  # () fp32
    prediction_ptr,  # (K,) fp32; None if K is 0
    mean_r_ptr,  # (SIZE_H,) fp32: mean of r(z)
    covariance_ptr,  # (OUT, OUT) fp64: C, of W2·r(z); its diagonal is read again here
    projected_ptr,  # (T, OUT, H) fp64: W2·S, S the scatter of r(z), then ΣΔΔᵀ of each prediction
    transposed_ptr,  # (H, OUT) fp64: the first of them, transposed; read again here
    sums_ptr,  # (T, SIZE_H + 1, SIZE_H) fp64: Σ(r−s)(r−s)ᵀ and Σ(r−s), then ΣΔΔᵀ and 0 of each prediction
    shift_ptr,  # (SIZE_H,) fp32: s
    wide_weight2_ptr,  # (OUT, H) fp64: W2
    n_rows,
    H: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,  # all of SIZE_H
    BLOCK_O: tl.constexpr,  # all out features
):
    t = tl.program_id(0)
    offs_h = tl.arange(0, BLOCK_H)
    offs_o = tl.arange(0, BLOCK_O)
    mask_h, mask_o = offs_h < H, offs_o < OUT
    n = tl.full([], 0.0, tl.float64) + n_rows
    per_row = 1.0 / (n - 1.0)
    sums_ptr += t * ((BLOCK_H + 1) * BLOCK_H)
    projected_ptr += t * (OUT * H)
    total = tl.load(sums_ptr + BLOCK_H * BLOCK_H + offs_h)  # Σ(r−s); 0 for a prediction
    mean = total * (1.0 / n)
    if t == 0:
        tl.store(mean_r_ptr + offs_h, (tl.load(shift_ptr + offs_h).to(tl.float64) + mean).to(tl.float32))

    squares = tl.zeros([BLOCK_M], dtype=tl.float64)
    for start in range(0, OUT, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        mask_m = offs_m < OUT
        mask = mask_m[:, None] & mask_h[None, :]
        product = tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float64)
        product = add_product(product, wide_weight2_ptr, sums_ptr, offs_m * H, offs_h, mask_m, mask_h, 1, BLOCK_H, H)
        weight2 = tl.load(wide_weight2_ptr + offs_m[:, None] * H + offs_h[None, :], mask=mask, other=0.0)
        product -= tl.sum(weight2 * total[None, :], 1)[:, None] * mean[None, :]  # about the mean
        squares += tl.sum(product * weight2, 1)
        tl.store(projected_ptr + offs_m[:, None] * H + offs_h[None, :], product, mask=mask)
        if t == 0:
            tl.store(transposed_ptr + offs_h[None, :] * OUT + offs_m[:, None], product, mask=mask)
    if prediction_ptr is not None:  # noqa: SIM102, one is decided when the kernel is compiled, the other when it runs
        if t > 0:
            tl.store(prediction_ptr + (t - 1), (tl.sum(squares, 0) / (OUT * n)).to(tl.float32))
    if t == 0:
        tl.debug_barrier()  # every thread's part of the transposed product is there
        off_squares = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float64)
        for start in range(0, OUT, BLOCK_M):
            offs_m = start + tl.arange(0, BLOCK_M)
            mask_m = offs_m < OUT
            cov = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float64)
            cov = add_product(cov, wide_weight2_ptr, transposed_ptr, offs_m * H, offs_o, mask_m, mask_o, 1, OUT, H)
            cov *= per_row
            mask = mask_m[:, None] & mask_o[None, :]
            tl.store(covariance_ptr + offs_m[:, None] * OUT + offs_o[None, :], cov, mask=mask)
            cov = tl.where(offs_m[:, None] == offs_o[None, :], 0.0, cov)
            off_squares += cov * cov
        tl.store(cov_ptr, (tl.sum(tl.sum(off_squares, 1), 0) / (OUT * (OUT - 1))).to(tl.float32))
        tl.debug_barrier()  # so is the covariance
        variance = tl.load(covariance_ptr + offs_o * (OUT + 1), mask=mask_o, other=0.0)
        hinge = 1.0 - tl.sqrt(variance + tl.full([], _STD_EPS, tl.float64))
        hinge = tl.where(mask_o & ~(hinge < 0.0), hinge, 0.0)  # not tl.maximum, which may lose a NaN
        tl.store(std_ptr, (tl.sum(hinge, 0) / OUT).to(tl.float32))


def _config(size_h: int, n_out: int) -> LaunchConfig:
    """16 float64 sums a thread: 64 rows of a matrix of 64 columns at a time, 32 of 128 columns. No spills anywhere."""
    block_o = max(16, triton.next_power_of_2(int(n_out)))
    block_m = min(block_o, 4096 // max(size_h, block_o))
    return LaunchConfig(num_warps=8, blocks={"BLOCK_M": block_m, "BLOCK_H": size_h, "BLOCK_O": block_o})


class Losses(NamedTuple):
    """The losses, and what backward needs of the activations."""

    std_loss: Tensor  # () fp32
    cov_loss: Tensor  # () fp32
    prediction_losses: Tensor  # (K,) fp32
    mean_r: Tensor  # (SIZE_H,) fp32: mean of r(z)
    covariance: Tensor  # (OUT, OUT) fp64: of W2·r(z)
    projected: Tensor  # (T, OUT, H) fp64: W2·(scatter of r(z), then ΣΔΔᵀ of each prediction)


def losses(sums: Tensor, shift: Tensor, wide_weight2: Tensor, n_rows: int) -> Losses:
    """All losses from the moments of the activations (T, SIZE_H + 1, SIZE_H) float64, as `activation_moments` returns.

    `algebra.covariance`, `std_and_cov_from_moments` and `prediction_losses`.
    """
    n_tensors, size_h = sums.shape[0], sums.shape[2]
    n_out, hidden = wide_weight2.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, device=sums.device, dtype=dtype)

    found = Losses(
        std_loss=empty(dtype=torch.float32),
        cov_loss=empty(dtype=torch.float32),
        prediction_losses=empty(n_tensors - 1, dtype=torch.float32),
        mean_r=empty(size_h, dtype=torch.float32),
        covariance=empty(n_out, n_out),
        projected=empty(n_tensors, n_out, hidden),
    )
    launch_kernel(
        _losses_kernel,
        (n_tensors,),
        _config(size_h, n_out),
        std_ptr=found.std_loss,
        cov_ptr=found.cov_loss,
        prediction_ptr=found.prediction_losses if n_tensors > 1 else None,
        mean_r_ptr=found.mean_r,
        covariance_ptr=found.covariance,
        projected_ptr=found.projected,
        transposed_ptr=empty(hidden, n_out),
        sums_ptr=sums,
        shift_ptr=shift,
        wide_weight2_ptr=wide_weight2,
        n_rows=n_rows,
        H=hidden,
        OUT=n_out,
    )
    return found


def audit_cases() -> list[AuditCase]:
    """At the default recipe, without predictions too, and at the largest sizes."""
    kernel, cases = _losses_kernel, []
    wide = ("covariance_ptr", "projected_ptr", "transposed_ptr", "sums_ptr", "wide_weight2_ptr")
    for h, k in ((64, 4), (64, 0), (128, 4)):
        absent = () if k else ("prediction_ptr",)
        cases.append(
            AuditCase(
                name=f"losses/K={k}/H={h}",
                kernel=kernel,
                signature=audit_signature(kernel, torch.float32, (), absent) | dict.fromkeys(wide, "*fp64"),
                constexprs={**dict.fromkeys(absent), "H": h, "OUT": h},
                config=_config(h, h),
                bytes_moved=8 * ((1 + k) * (2 * h + 1) * h + 3 * h * h) + 4 * (2 * h + k + 2),
                flops=2 * (k + 2) * h**3,
                divisible_by_16=("n_rows",),
            )
        )
    return cases
