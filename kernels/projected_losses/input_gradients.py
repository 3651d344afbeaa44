"""Behind the backward pass over the activations: the parameters' gradients, and BatchNorm's correction of Aᵀdy.

    T = 1+K tensors (t = 0: the state z; t = 1..K: predictions)  D channels  H hidden features

`algebra.input_gradients` in one launch, float64, with the correction padded and rounded as the last pass over the rows
reads it (`LinearOperands`). From Q = Σdy(x−μ)ᵀ and s = Σdy of each tensor:

    q_t = inv_t·rowsum(W1∘Q_t),  dW1 = Σ_t γ·inv_t(Q_t − q_t/N·inv_t∘(W1·M2_t)),  dγ = Σ_t q_t,  dβ = Σ_t s_t
    linear_t = W1ᵀ·diag(γ·inv_t²·q_t/N)·W1,  constant_t = A_tᵀs_t/N

Some programs make 32 rows of dW1 each, and one for each tensor its correction, of which the second factor,
diag(…)·W1, is a scratch of the program's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa.kernels.launch import TRITON_TYPE, AuditCase, LaunchConfig, audit_signature, launch_kernel, round_to
from fastjepa.kernels.moments.blocks import n_summands
from fastjepa.kernels.moments.centred_linear import LinearOperands
from fastjepa.kernels.projected_losses.activations import block_sizes
from fastjepa.kernels.projected_losses.algebra import ProjectorParameters
from fastjepa.kernels.projected_losses.backward import group_size
from fastjepa.kernels.projected_losses.parts import n_parts
from fastjepa.kernels.projected_losses.products import add_product


@triton.jit
def sums_of_tensor(sums_ptr, t, offs, mask, RECORD: tl.constexpr, GROUP: tl.constexpr, N_GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Entries of tensor t's record: z's record is in every group of predictions, before theirs, and they are added."""
    place = tl.where(t == 0, 0, t + (t - 1) // GROUP)
    values = tl.load(sums_ptr + place * RECORD + offs, mask=mask, other=0.0)
    for group in range(1, N_GROUPS):
        if t == 0:
            values += tl.load(sums_ptr + group * (GROUP + 1) * RECORD + offs, mask=mask, other=0.0)
    return values


@triton.jit
def parameter_rows(  # type: ignore[no-untyped-def]
    grad_weight1_ptr,  # pointers as in the kernel
    grad_bias1_ptr,
    grad_bn_weight_ptr,
    grad_bn_bias_ptr,
    sums_ptr,
    inv_std_ptr,
    weight1_scatter_ptr,
    weight1_ptr,
    bn_weight_ptr,
    first_row,
    n,
    N_TENSORS: tl.constexpr,
    GROUP: tl.constexpr,
    N_GROUPS: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The parameters' gradients of some hidden features."""
    RECORD: tl.constexpr = BLOCK_H * BLOCK_D + BLOCK_H
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < H
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    offs_md = offs_m[:, None] * D + offs_d[None, :]
    offs_record = offs_m[:, None] * BLOCK_D + offs_d[None, :]
    weight1 = tl.load(weight1_ptr + offs_md, mask=mask, other=0.0).to(tl.float64)
    gamma = tl.load(bn_weight_ptr + offs_m, mask=mask_m, other=0.0).to(tl.float64)
    grad_weight1 = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float64)
    grad_gamma = tl.zeros([BLOCK_M], dtype=tl.float64)
    grad_beta = tl.zeros([BLOCK_M], dtype=tl.float64)
    for t in range(N_TENSORS):
        inv_std = tl.load(inv_std_ptr + t * H + offs_m, mask=mask_m, other=0.0)
        dy_x = sums_of_tensor(sums_ptr, t, offs_record, mask, RECORD, GROUP, N_GROUPS)
        dy_xhat = inv_std * tl.sum(weight1 * dy_x, 1)
        xhat_x = tl.load(weight1_scatter_ptr + t * H * D + offs_md, mask=mask, other=0.0) * inv_std[:, None]
        grad_weight1 += (gamma * inv_std)[:, None] * (dy_x - (dy_xhat / n)[:, None] * xhat_x)
        grad_gamma += dy_xhat
        grad_beta += sums_of_tensor(sums_ptr, t, BLOCK_H * BLOCK_D + offs_m, mask_m, RECORD, GROUP, N_GROUPS)
    grad_weight1 = round_to(grad_weight1.to(tl.float32), grad_weight1_ptr.dtype.element_ty)
    tl.store(grad_weight1_ptr + offs_md, grad_weight1, mask=mask)
    tl.store(grad_bias1_ptr + offs_m, tl.zeros([BLOCK_M], dtype=grad_bias1_ptr.dtype.element_ty), mask=mask_m)
    grad_gamma = round_to(grad_gamma.to(tl.float32), grad_bn_weight_ptr.dtype.element_ty)
    tl.store(grad_bn_weight_ptr + offs_m, grad_gamma, mask=mask_m)
    grad_beta = round_to(grad_beta.to(tl.float32), grad_bn_bias_ptr.dtype.element_ty)
    tl.store(grad_bn_bias_ptr + offs_m, grad_beta, mask=mask_m)


@triton.jit
def correction(  # type: ignore[no-untyped-def]
    centre_ptr,  # pointers as in the kernel
    constant_ptr,
    linear_ptr,
    scaled_ptr,
    sums_ptr,
    mean_ptr,
    inv_std_ptr,
    slope_ptr,
    weight1_ptr,
    bn_weight_ptr,
    t,
    n,
    GROUP: tl.constexpr,
    N_GROUPS: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """BatchNorm's correction of one tensor."""
    RECORD: tl.constexpr = BLOCK_H * BLOCK_D + BLOCK_H
    offs_h = tl.arange(0, BLOCK_H)
    offs_d = tl.arange(0, BLOCK_D)
    mask_h, mask_d = offs_h < H, offs_d < D
    mask = mask_h[:, None] & mask_d[None, :]
    weight1 = tl.load(weight1_ptr + offs_h[:, None] * D + offs_d[None, :], mask=mask, other=0.0).to(tl.float64)
    gamma = tl.load(bn_weight_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float64)
    inv_std = tl.load(inv_std_ptr + t * H + offs_h, mask=mask_h, other=0.0)
    offs_record = offs_h[:, None] * BLOCK_D + offs_d[None, :]
    dy_x = sums_of_tensor(sums_ptr, t, offs_record, mask, RECORD, GROUP, N_GROUPS)
    dy_xhat = inv_std * tl.sum(weight1 * dy_x, 1)
    scaled_ptr += t * H * D
    scaled = (gamma * inv_std * inv_std * dy_xhat / n)[:, None] * weight1
    tl.store(scaled_ptr + offs_h[:, None] * D + offs_d[None, :], scaled, mask=mask)
    tl.debug_barrier()  # every thread's part of it is there
    linear = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float64)
    linear = add_product(linear, scaled_ptr, weight1_ptr, offs_d, offs_d, mask_d, mask_d, D, D, H)
    mean = tl.load(mean_ptr + t * D + offs_d, mask=mask_d, other=0.0)
    centre = mean.to(tl.float32)
    # Of A what the pass over the activations had: then the rows of dx have the mean that they should, 0.
    slope_ptrs = slope_ptr + t * 2 * BLOCK_D * BLOCK_H + offs_d[None, :] * BLOCK_H + offs_h[:, None]
    slope = tl.load(slope_ptrs).to(tl.float64)
    if not HALF:
        slope += tl.load(slope_ptrs + BLOCK_D * BLOCK_H)
    sum_dy = sums_of_tensor(sums_ptr, t, BLOCK_H * BLOCK_D + offs_h, mask_h, RECORD, GROUP, N_GROUPS)
    constant = tl.sum(slope * sum_dy[:, None], 0) / n
    # The pass centres at the rounded mean; the constant takes what rounding left.
    constant -= tl.sum(linear * (mean - centre.to(tl.float64))[None, :], 1)
    tl.store(centre_ptr + t * BLOCK_D + offs_d, centre)
    tl.store(constant_ptr + t * BLOCK_D + offs_d, constant.to(tl.float32))
    linear_ptr += t * ((2 if HALF else 1) * BLOCK_D * BLOCK_D)
    offs_dd = offs_d[None, :] * BLOCK_D + offs_d[:, None]
    first = round_to(linear.to(tl.float32), linear_ptr.dtype.element_ty)
    tl.store(linear_ptr + offs_dd, first)
    if HALF:
        rest = (linear - first.to(tl.float32).to(tl.float64)).to(tl.float32)
        tl.store(linear_ptr + BLOCK_D * BLOCK_D + offs_dd, round_to(rest, linear_ptr.dtype.element_ty))


@triton.jit
def _input_gradients_kernel(  # type: ignore[no-untyped-def]
    grad_weight1_ptr,  # (H, D)
    grad_bias1_ptr,  # (H,), like the next two; it is 0, since BatchNorm undoes a shift of the hidden layer
    grad_bn_weight_ptr,
    grad_bn_bias_ptr,
    centre_ptr,  # (T, BLOCK_D) fp32; this and the next two are `LinearOperands`
    constant_ptr,  # (T, BLOCK_D) fp32
    linear_ptr,  # (T, 2 if HALF else 1, BLOCK_D, BLOCK_D) in the rows' dtype, transposed
    scaled_ptr,  # (T, H, D) fp64: diag(…)·W1; read again here
    sums_ptr,  # (records, SIZE_H·BLOCK_D + SIZE_H) fp64: Q and s
    mean_ptr,  # (T, D) fp64
    inv_std_ptr,  # (T, H) fp64
    weight1_scatter_ptr,  # (T, H, D) fp64: W1·M2
    slope_ptr,  # (T, 2, BLOCK_D, SIZE_H) in the rows' dtype: Aᵀ as a sum of two
    weight1_ptr,  # (H, D)
    bn_weight_ptr,  # (H,)
    n_rows,
    N_TENSORS: tl.constexpr,
    GROUP: tl.constexpr,
    N_GROUPS: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,  # all of SIZE_H
):
    pid = tl.program_id(0)
    n = tl.full([], 0.0, tl.float64) + n_rows
    if pid < N_TENSORS:
        correction(
            centre_ptr, constant_ptr, linear_ptr, scaled_ptr, sums_ptr, mean_ptr, inv_std_ptr, slope_ptr, weight1_ptr,
            bn_weight_ptr, pid, n, GROUP, N_GROUPS, D, H, HALF, BLOCK_D, BLOCK_H,
        )  # fmt: skip
    else:
        parameter_rows(
            grad_weight1_ptr, grad_bias1_ptr, grad_bn_weight_ptr, grad_bn_bias_ptr, sums_ptr, inv_std_ptr,
            weight1_scatter_ptr, weight1_ptr, bn_weight_ptr, (pid - N_TENSORS) * BLOCK_M, n,
            N_TENSORS, GROUP, N_GROUPS, D, H, BLOCK_M, BLOCK_D, BLOCK_H,
        )  # fmt: skip


_BLOCK_M = 32  # rows of a program


def _config(block_d: int, size_h: int) -> LaunchConfig:
    return LaunchConfig(num_warps=8, blocks={"BLOCK_M": _BLOCK_M, "BLOCK_D": block_d, "BLOCK_H": size_h})


class InputGradients(NamedTuple):
    """Parameter gradients in the parameters' dtypes, and the correction."""

    weight1: Tensor  # (H, D)
    bias1: Tensor  # (H,)
    bn_weight: Tensor  # (H,)
    bn_bias: Tensor  # (H,)
    correction: LinearOperands


def input_gradients(
    params: ProjectorParameters,
    sums: Tensor,
    group_size: int,
    mean: Tensor,
    inv_std: Tensor,
    weight1_scatter: Tensor,
    slope: Tensor,
    n_rows: int,
) -> InputGradients:
    """From the sums that `slope_gradients` returns, and what `hidden_affine` left; the slope has the rows' dtype."""
    (n_tensors, hidden), channels, device, dtype = inv_std.shape, mean.shape[1], mean.device, slope.dtype
    block_d, size_h = block_sizes(channels, hidden)
    found = InputGradients(
        weight1=torch.empty(hidden, channels, device=device, dtype=params.weight1.dtype),
        bias1=torch.empty(hidden, device=device, dtype=params.bias1.dtype),
        bn_weight=torch.empty(hidden, device=device, dtype=params.bn_weight.dtype),
        bn_bias=torch.empty(hidden, device=device, dtype=params.bn_bias.dtype),
        correction=LinearOperands(
            centre=torch.empty(n_tensors, block_d, device=device, dtype=torch.float32),
            constant=torch.empty(n_tensors, block_d, device=device, dtype=torch.float32),
            linear=torch.empty(n_tensors, n_summands(dtype), block_d, block_d, device=device, dtype=dtype),
        ),
    )
    launch_kernel(
        _input_gradients_kernel,
        (n_tensors + triton.cdiv(hidden, _BLOCK_M),),
        _config(block_d, size_h),
        grad_weight1_ptr=found.weight1,
        grad_bias1_ptr=found.bias1,
        grad_bn_weight_ptr=found.bn_weight,
        grad_bn_bias_ptr=found.bn_bias,
        centre_ptr=found.correction.centre,
        constant_ptr=found.correction.constant,
        linear_ptr=found.correction.linear,
        scaled_ptr=torch.empty(n_tensors, hidden, channels, device=device, dtype=torch.float64),
        sums_ptr=sums,
        mean_ptr=mean,
        inv_std_ptr=inv_std,
        weight1_scatter_ptr=weight1_scatter,
        slope_ptr=slope[:, : n_parts(dtype)],  # what is read of it
        weight1_ptr=params.weight1,
        bn_weight_ptr=params.bn_weight,
        n_rows=n_rows,
        N_TENSORS=n_tensors,
        GROUP=group_size,
        N_GROUPS=max(1, -(-(n_tensors - 1) // group_size)),
        D=channels,
        H=hidden,
        HALF=n_summands(dtype) == 2,
    )
    return found


def audit_cases() -> list[AuditCase]:
    """At the default recipe, and at the largest sizes."""
    kernel, n_tensors, cases = _input_gradients_kernel, 5, []
    wide = ("scaled_ptr", "sums_ptr", "mean_ptr", "inv_std_ptr", "weight1_scatter_ptr")
    for dtype in (torch.float32, torch.bfloat16):
        for d, h in ((16, 64), (64, 128)):
            (block_d, size_h), parts = block_sizes(d, h), n_summands(dtype)
            group = group_size(size_h, dtype)
            n_groups = (n_tensors - 1) // group
            record = size_h * block_d + size_h
            of_tensor = 8 * (d + h + 2 * h * d) + 8 * block_d + parts * dtype.itemsize * block_d**2
            of_tensor += n_parts(dtype) * dtype.itemsize * block_d * size_h
            cases.append(
                AuditCase(
                    name=f"input_gradients/{TRITON_TYPE[dtype]}/D={d} H={h}",
                    kernel=kernel,
                    signature=audit_signature(kernel, dtype, ("linear_ptr", "slope_ptr"))
                    | dict.fromkeys(wide, "*fp64"),
                    constexprs={
                        "N_TENSORS": n_tensors,
                        "GROUP": group,
                        "N_GROUPS": n_groups,
                        "D": d,
                        "H": h,
                        "HALF": parts == 2,
                    },
                    config=_config(block_d, size_h),
                    bytes_moved=8 * (n_tensors - 1 + n_groups) * record
                    + n_tensors * of_tensor
                    + 4 * (2 * h * d + 4 * h),
                    flops=2 * n_tensors * h * d * d,
                    divisible_by_16=("n_rows",),
                )
            )
    return cases
