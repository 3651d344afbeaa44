"""The projected losses' forward pass over the activations: moments of r(z), and of its difference to each prediction.

    N rows  D channels  H hidden features;  r = r(z), s a shift near its mean;  Δ = r(z) − r(p)

One launch for z: Σ(r−s) and Σ(r−s)(r−s)ᵀ. One launch for each prediction: ΣΔΔᵀ, reading z again: that costs 32 bytes a
row, and keeps one H×H accumulator in registers instead of 1+K. Programs leave fp32 partials, which are added in
float64 in one order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa.kernels.launch import (
    TRITON_TYPE,
    AuditCase,
    LaunchConfig,
    RowSplit,
    add_dot,
    audit_signature,
    dot_precision,
    launch_kernel,
    round_to,
)
from fastjepa.kernels.moments.blocks import padded
from fastjepa.kernels.projected_losses.activations import (
    MAX_PROGRAMS,
    Operands,
    block_sizes,
    hidden_activations,
    with_block_d,
)


@triton.jit
def _activation_moments_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (n_rows, D): z
    y_ptr,  # (n_rows, D): a prediction, read if PAIR
    centre_x_ptr,  # (2, BLOCK_D) fp32, like centre_y; these six are one tensor's part of `Operands`
    centre_y_ptr,
    slope_x_ptr,  # (2 if HALF else 1, BLOCK_D, BLOCK_H), like slope_y
    slope_y_ptr,
    offset_x_ptr,  # (BLOCK_H,) fp32, like offset_y
    offset_y_ptr,
    shift_ptr,  # (BLOCK_H,) fp32
    sum_ptr,  # (programs, BLOCK_H), not written if PAIR
    second_ptr,  # (programs, BLOCK_H, BLOCK_H)
    n_rows,
    zero,  # the integer 0, unknown to the compiler, as in the backward pass: the vectors are read again for each tile
    D: tl.constexpr,
    TILES: tl.constexpr,
    EVEN_N: tl.constexpr,
    PAIR: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    pid = tl.program_id(0)
    offs_n = pid.to(tl.int64) * (TILES * BLOCK_N) + tl.arange(0, BLOCK_N)
    offs_h = tl.arange(0, BLOCK_H)
    shift = tl.load(shift_ptr + offs_h)
    # Each row of a tile keeps its own sum where there are registers for that: cheaper than a reduction per tile.
    ROWS: tl.constexpr = BLOCK_N if BLOCK_H == 64 else 1
    total = tl.zeros([ROWS, BLOCK_H], dtype=tl.float32)
    second = tl.zeros([BLOCK_H, BLOCK_H], dtype=tl.float32)
    for tile in range(TILES):
        reload = tile * zero
        _x, r = hidden_activations(
            x_ptr, centre_x_ptr + reload, slope_x_ptr, offset_x_ptr + reload, offs_n, n_rows,
            D, EVEN_N, HALF, PRECISION, BLOCK_N, BLOCK_D, BLOCK_H,
        )  # fmt: skip
        if PAIR:
            _y, r_y = hidden_activations(
                y_ptr, centre_y_ptr + reload, slope_y_ptr, offset_y_ptr + reload, offs_n, n_rows,
                D, EVEN_N, HALF, PRECISION, BLOCK_N, BLOCK_D, BLOCK_H,
            )  # fmt: skip
            r -= r_y
        else:
            r -= shift[None, :]
        if not EVEN_N:
            r = tl.where(offs_n[:, None] < n_rows, r, 0.0)
        if not PAIR:
            total += r if ROWS > 1 else tl.sum(r, 0, keep_dims=True)
        r = round_to(r, x_ptr.dtype.element_ty)
        second = add_dot(second, tl.trans(r), r, PRECISION, not HALF)
        offs_n += BLOCK_N
    if not PAIR:
        tl.store(sum_ptr + pid * BLOCK_H + offs_h, tl.sum(total, 0))
    offs_hh = offs_h[:, None] * BLOCK_H + offs_h[None, :]
    tl.store(second_ptr + pid.to(tl.int64) * BLOCK_H * BLOCK_H + offs_hh, second)


# (BLOCK_H, fp32?) → launch config. From the static audit with triton 3.6, 3.7 and 3.9: the largest tiles that stay in
# registers on sm_90.
_CONFIGS = {
    (64, False): LaunchConfig(num_warps=4, blocks={"BLOCK_N": 128, "BLOCK_H": 64}),
    (64, True): LaunchConfig(num_warps=4, blocks={"BLOCK_N": 64, "BLOCK_H": 64}),
    (128, False): LaunchConfig(num_warps=8, blocks={"BLOCK_N": 32, "BLOCK_H": 128}),
    (128, True): LaunchConfig(num_warps=8, blocks={"BLOCK_N": 16, "BLOCK_H": 128}),
}


def activation_moments(tensors: Sequence[Tensor], ops: Operands, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (H,) and scatter (H, H) of r(z), and ΣΔΔᵀ (K, H, H), in float64; launches 1 + K kernels."""
    n_rows, n_channels = tensors[0].shape
    block_d, block_h = ops.centre.shape[2], ops.offset.shape[1]
    n_hidden = shift.shape[0]
    fp32 = tensors[0].dtype == torch.float32
    config = with_block_d(_CONFIGS[block_h, fp32], block_d)
    split = RowSplit.of(n_rows, config.blocks["BLOCK_N"], MAX_PROGRAMS, prefer_even=True)
    rounded_shift = padded(shift, (block_h,), torch.float32)
    total = torch.empty(split.programs, block_h, device=shift.device, dtype=torch.float32)
    second = torch.empty(len(tensors), split.programs, block_h, block_h, device=shift.device, dtype=torch.float32)
    for t, x in enumerate(tensors):
        launch_kernel(
            _activation_moments_kernel,
            (split.programs,),
            config,
            x_ptr=tensors[0],
            y_ptr=x,
            centre_x_ptr=ops.centre[0],
            centre_y_ptr=ops.centre[t],
            slope_x_ptr=ops.slope[0],
            slope_y_ptr=ops.slope[t],
            offset_x_ptr=ops.offset[0],
            offset_y_ptr=ops.offset[t],
            shift_ptr=rounded_shift,
            sum_ptr=total,
            second_ptr=second[t],
            n_rows=n_rows,
            zero=0,
            D=n_channels,
            TILES=split.tiles,
            EVEN_N=split.even,
            PAIR=t > 0,
            HALF=not fp32,
            PRECISION=dot_precision(tensors[0].dtype),
        )
    moments = second.sum(1, dtype=torch.float64)[:, :n_hidden, :n_hidden]
    residual = total.sum(0, dtype=torch.float64)[:n_hidden] / n_rows
    scatter = moments[0] - n_rows * torch.outer(residual, residual)
    return rounded_shift[:n_hidden].double() + residual, scatter, moments[1:]


# Bytes per thread, the most over the architectures and the versions of triton, by (BLOCK_H, bf16?).
_ALLOWED_SPILL = {(64, True): 0, (64, False): 64, (128, True): 4, (128, False): 2048}


def audit_cases() -> list[AuditCase]:
    """z alone and z with a prediction, at the default recipe and at the largest sizes, fp32 and bf16."""
    n_rows, cases = 64 * 10 * 64 * 64, []
    for dtype in (torch.float32, torch.bfloat16):
        for d, h in ((16, 64), (64, 128)):
            half = dtype != torch.float32
            block_d, block_h = block_sizes(d, h)
            config = with_block_d(_CONFIGS[block_h, not half], block_d)
            split = RowSplit.of(n_rows, config.blocks["BLOCK_N"], MAX_PROGRAMS, prefer_even=True)
            in_rows_dtype = ("x_ptr", "y_ptr", "slope_x_ptr", "slope_y_ptr")
            for pair in (False, True):
                n_inputs = 2 if pair else 1
                cases.append(
                    AuditCase(
                        name=f"activation_moments/{'pair' if pair else 'z'}/{TRITON_TYPE[dtype]}/D={d} H={h}",
                        kernel=_activation_moments_kernel,
                        signature=audit_signature(_activation_moments_kernel, dtype, in_rows_dtype),
                        constexprs={
                            "D": d,
                            "TILES": split.tiles,
                            "EVEN_N": split.even,
                            "PAIR": pair,
                            "HALF": half,
                            "PRECISION": dot_precision(dtype),
                        },
                        config=config,
                        bytes_moved=n_inputs * n_rows * d * dtype.itemsize + split.programs * block_h**2 * 4,
                        flops=2 * n_rows * (n_inputs * d * h * (2 if half else 1) + h * h),
                        divisible_by_16=("n_rows", "zero"),
                        expects_tensor_cores=True,
                        allowed_spill_bytes=_ALLOWED_SPILL[block_h, half],
                        allowed_spill_reason="sm_80 and sm_100 only: tiles are sized for sm_90, where nothing spills",
                    )
                )
    return cases
