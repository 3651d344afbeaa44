"""Behind the moments of the rows: each tensor's map to the hidden features, y = A(x − μ) + β, and its statistics.

    T = 1+K tensors (t = 0: the state z; t = 1..K: predictions)  D channels  H hidden  OUT out features

`algebra.hidden_affine` in one launch, float64, with the map padded and rounded as the passes over the activations read
it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa.kernels.launch import TRITON_TYPE, AuditCase, LaunchConfig, audit_signature, launch_kernel
from fastjepa.kernels.projected_losses.activations import Operands, block_sizes
from fastjepa.kernels.projected_losses.algebra import ProjectorParameters
from fastjepa.kernels.projected_losses.parts import parts_of_matrix
from fastjepa.kernels.projected_losses.products import add_product


@triton.jit
def _hidden_affine_kernel(  # type: ignore[no-untyped-def]
    batch_mean_ptr,  # (T, H) fp32: of W1·x + b1
    batch_var_ptr,  # (T, H) fp32: unbiased
    inv_std_ptr,  # (T, H) fp64
    weight1_scatter_ptr,  # (T, H, D) fp64: W1·M2
    centre_ptr,  # (T, 2, BLOCK_D) fp32; this and the next two are `Operands`
    slope_ptr,  # (T, 2, BLOCK_D, SIZE_H) in the rows' dtype
    offset_ptr,  # (T, SIZE_H) fp32
    shift_ptr,  # (SIZE_H,) fp32
    wide_weight2_ptr,  # (OUT, H) fp64: W2, so that no product has to convert it
    mean_ptr,  # (T, D) fp64
    scatter_ptr,  # (T, D, D) fp64: M2
    weight1_ptr,  # (H, D)
    bias1_ptr,  # (H,), like the next two
    bn_weight_ptr,
    bn_bias_ptr,
    weight2_ptr,  # (OUT, H)
    n_rows,
    EPS: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    OUT: tl.constexpr,
    SIZE_H: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    t = tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_d, mask_h = offs_d < D, offs_h < H
    mask = mask_h[:, None] & mask_d[None, :]
    offs_hd = offs_h[:, None] * D + offs_d[None, :]
    n = tl.full([], 0.0, tl.float64) + n_rows

    weight1 = tl.load(weight1_ptr + offs_hd, mask=mask, other=0.0).to(tl.float64)
    product = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float64)
    product = add_product(product, weight1_ptr, scatter_ptr + t * D * D, offs_h * D, offs_d, mask_h, mask_d, 1, D, D)
    tl.store(weight1_scatter_ptr + t * H * D + offs_hd, product, mask=mask)
    var = tl.sum(product * weight1, 1)
    var = tl.where(var < 0.0, 0.0, var) / n  # not tl.maximum, which may lose a NaN
    inv_std = 1.0 / tl.sqrt(var + tl.full([], EPS, tl.float64))
    mean = tl.load(mean_ptr + t * D + offs_d, mask=mask_d, other=0.0)
    bias1 = tl.load(bias1_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float64)
    batch_mean = tl.sum(weight1 * mean[None, :], 1) + bias1
    tl.store(inv_std_ptr + t * H + offs_h, inv_std, mask=mask_h)
    tl.store(batch_mean_ptr + t * H + offs_h, batch_mean.to(tl.float32), mask=mask_h)
    tl.store(batch_var_ptr + t * H + offs_h, (var * (n / (n - 1.0))).to(tl.float32), mask=mask_h)

    gamma = tl.load(bn_weight_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float64)
    beta = tl.load(bn_bias_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float64)
    slope = (gamma * inv_std)[:, None] * weight1  # 0 where the padding is
    slope_ptr += t * (2 * BLOCK_D * SIZE_H)
    offs_dh = offs_d[None, :] * SIZE_H + offs_h[:, None]
    first, second = parts_of_matrix(slope, slope_ptr.dtype.element_ty)
    tl.store(slope_ptr + offs_dh, first)
    tl.store(slope_ptr + BLOCK_D * SIZE_H + offs_dh, second)
    offset = beta
    if HALF:
        # These rows are not centred before the dot: that would round them again. The offset is made with the rounded A,
        # so that its rounding does not shift y.
        rounded = first.to(tl.float32).to(tl.float64) + second.to(tl.float32).to(tl.float64)
        offset -= tl.sum(rounded * mean[None, :], 1)
    tl.store(offset_ptr + t * SIZE_H + offs_h, offset.to(tl.float32))
    if tl.program_id(0) == 0:
        centre = mean.to(tl.float32)
        tl.store(centre_ptr + t * 2 * BLOCK_D + offs_d, centre)
        tl.store(centre_ptr + (t * 2 + 1) * BLOCK_D + offs_d, (mean - centre.to(tl.float64)).to(tl.float32))
    if t == 0:
        # What the mean of r(z) would be if y were Gaussian, in fp32: a guess (`algebra.hidden_affine`).
        y_std = tl.abs(gamma) * inv_std * tl.sqrt(var)
        y_std = tl.where(y_std < 1e-30, 1e-30, y_std).to(tl.float32)
        ratio = beta.to(tl.float32) / y_std
        ratio = tl.minimum(tl.maximum(ratio, -20.0), 20.0)  # beyond, nothing changes but that its square may overflow
        density = tl.exp(-0.5 * ratio * ratio) * 0.3989422804014327
        shift = y_std * density + beta.to(tl.float32) * (0.5 + 0.5 * tl.erf(ratio * 0.7071067811865476))
        tl.store(shift_ptr + offs_h, tl.where(mask_h, shift, 0.0))
        for start in range(0, OUT, BLOCK_H):
            offs_o = start + tl.arange(0, BLOCK_H)
            mask_oh = (offs_o < OUT)[:, None] & mask_h[None, :]
            offs_oh = offs_o[:, None] * H + offs_h[None, :]
            weight2 = tl.load(weight2_ptr + offs_oh, mask=mask_oh, other=0.0)
            tl.store(wide_weight2_ptr + offs_oh, weight2.to(tl.float64), mask=mask_oh)


def _config(block_d: int) -> LaunchConfig:
    """At most 8 float64 sums a thread."""
    return LaunchConfig(num_warps=8, blocks={"BLOCK_D": block_d, "BLOCK_H": min(64, 2048 // block_d)})


class HiddenAffine(NamedTuple):
    """Each tensor's map to the hidden features: its statistics for the caller, and what the kernels read."""

    batch_mean: Tensor  # (T, H) fp32
    batch_var: Tensor  # (T, H) fp32: unbiased
    inv_std: Tensor  # (T, H) fp64
    weight1_scatter: Tensor  # (T, H, D) fp64: W1·M2
    operands: Operands
    shift: Tensor  # (SIZE_H,) fp32: a guess of the mean of r(z)
    wide_weight2: Tensor  # (OUT, H) fp64


def hidden_affine(
    params: ProjectorParameters, mean: Tensor, scatter: Tensor, n_rows: int, eps: float, dtype: torch.dtype
) -> HiddenAffine:
    """`algebra.hidden_affine` of the mean (T, D) and scatter (T, D, D) of rows of `dtype`, and its `Operands`."""
    (hidden, channels), n_tensors, device = params.weight1.shape, mean.shape[0], mean.device
    block_d, size_h = block_sizes(channels, hidden)
    config = _config(block_d)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    found = HiddenAffine(
        batch_mean=empty(n_tensors, hidden),
        batch_var=empty(n_tensors, hidden),
        inv_std=empty(n_tensors, hidden, dtype=torch.float64),
        weight1_scatter=empty(n_tensors, hidden, channels, dtype=torch.float64),
        operands=Operands(
            centre=empty(n_tensors, 2, block_d),
            slope=empty(n_tensors, 2, block_d, size_h, dtype=dtype),
            offset=empty(n_tensors, size_h),
        ),
        shift=empty(size_h),
        wide_weight2=empty(*params.weight2.shape, dtype=torch.float64),
    )
    launch_kernel(
        _hidden_affine_kernel,
        (size_h // config.blocks["BLOCK_H"], n_tensors),
        config,
        batch_mean_ptr=found.batch_mean,
        batch_var_ptr=found.batch_var,
        inv_std_ptr=found.inv_std,
        weight1_scatter_ptr=found.weight1_scatter,
        centre_ptr=found.operands.centre,
        slope_ptr=found.operands.slope,
        offset_ptr=found.operands.offset,
        shift_ptr=found.shift,
        wide_weight2_ptr=found.wide_weight2,
        mean_ptr=mean,
        scatter_ptr=scatter,
        weight1_ptr=params.weight1,
        bias1_ptr=params.bias1,
        bn_weight_ptr=params.bn_weight,
        bn_bias_ptr=params.bn_bias,
        weight2_ptr=params.weight2,
        n_rows=n_rows,
        EPS=float(eps),
        D=channels,
        H=hidden,
        OUT=params.weight2.shape[0],
        SIZE_H=size_h,
        HALF=dtype != torch.float32,
    )
    return found


def audit_cases() -> list[AuditCase]:
    """At the default recipe, and at the largest sizes."""
    kernel, n_tensors, cases = _hidden_affine_kernel, 5, []
    wide = ("inv_std_ptr", "weight1_scatter_ptr", "wide_weight2_ptr", "mean_ptr", "scatter_ptr")
    for dtype in (torch.float32, torch.bfloat16):
        for d, h in ((16, 64), (64, 128)):
            block_d, size_h = block_sizes(d, h)
            of_tensor = 8 * (h + h * d + d + d * d) + 4 * (2 * h + 2 * block_d + size_h)
            of_tensor += 2 * dtype.itemsize * block_d * size_h
            cases.append(
                AuditCase(
                    name=f"hidden_affine/{TRITON_TYPE[dtype]}/D={d} H={h}",
                    kernel=kernel,
                    signature=audit_signature(kernel, dtype, ("slope_ptr",)) | dict.fromkeys(wide, "*fp64"),
                    constexprs={
                        "EPS": 1e-5,
                        "D": d,
                        "H": h,
                        "OUT": h,
                        "SIZE_H": size_h,
                        "HALF": dtype != torch.float32,
                    },
                    config=_config(block_d),
                    bytes_moved=n_tensors * of_tensor + 4 * (size_h + h * d + 3 * h) + (4 + 8) * h * h,
                    flops=2 * n_tensors * h * d * d,
                    divisible_by_16=("n_rows",),
                )
            )
    return cases
