"""Per-channel mean and variance of channels-last rows in one pass, and the running statistics of nn.BatchNorm.

Every program leaves the (mean, M2) of its rows, M2 = Σ(x − mean)², and a second, small kernel merges them:

    n = Σ n_i,   mean = Σ n_i·mean_i / n,   M2 = Σ M2_i + Σ n_i·(mean_i − mean)²

(Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", for all parts at once). Within a program,
every position of the tile runs Welford's update. Nothing is squared before it is centred. All of this is done on
x − x₀, where x₀ is the channel's first value: that difference is exact in fp32 for values near each other, whereas a
running mean of 1e3 would be rounded by 3e-5 at every step, too much beside a standard deviation of 1e-2. No atomics:
the same input gives the same bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from fastjepa.kernels.batch_norm.tiling import (
    check_rows,
    merge_config,
    recipe_cases,
    row_launch,
    rows_of_program,
)
from fastjepa.kernels.checks import require_available
from fastjepa.kernels.launch import TRITON_TYPE, AuditCase, audit_signature, kernel_op, launch_kernel

_OP = "batch_norm_statistics"


@triton.jit
def merge(mean, m2, count, total):  # type: ignore[no-untyped-def]
    """Merge parts (P, C) of `count` (P,) values each, `total` in all, into mean and M2 (C,).

    Means are taken relative to the first part's, so that a common offset costs no precision.
    """
    is_first = tl.arange(0, mean.shape[0]) == 0
    first = tl.sum(tl.where(is_first[:, None], mean, 0.0), axis=0)
    offset = mean - first[None, :]
    shift = tl.sum(offset * (count / total)[:, None], axis=0)
    offset -= shift[None, :]
    return first + shift, tl.sum(m2 + offset * offset * count[:, None], axis=0)


@triton.jit
def _batch_norm_statistics_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (n_rows, n_channels)
    partial_mean_ptr,  # (n_partials, n_channels): mean of x − x₀
    partial_m2_ptr,  # (n_partials, n_channels)
    n_rows,
    n_channels,
    rows_per_program,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_channels
    offs_tile = offs_n[:, None] * n_channels + offs_c[None, :]
    first_row, rows = rows_of_program(n_rows, rows_per_program)

    pivot = tl.load(x_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    # The next tile is loaded while this one is summed: one input alone keeps too few loads in flight.
    mask = (offs_n < rows)[:, None] & mask_c[None, :]
    x = tl.load(x_ptr + first_row * n_channels + offs_tile, mask=mask, other=0.0)
    row = 0
    tile = 0.0
    while row < rows:  # not range(): some versions of the interpreter cannot take its runtime bounds
        next_row = row + BLOCK_N
        mask = (offs_n < rows - next_row)[:, None] & mask_c[None, :]
        next_x = tl.load(x_ptr + (first_row + next_row) * n_channels + offs_tile, mask=mask, other=0.0)
        weight = tl.where(offs_n < rows - row, 1.0 / (tile + 1.0), 0.0)  # 0 for rows beyond the end
        delta = (x.to(tl.float32) - pivot[None, :]) - mean
        mean += delta * weight[:, None]
        m2 += delta * delta * (weight * tile)[:, None]
        x = next_x
        row = next_row
        tile += 1.0

    count = tl.maximum((rows - offs_n + BLOCK_N - 1) // BLOCK_N, 0)
    mean_c, m2_c = merge(mean, m2, count.to(tl.float32), rows.to(tl.float32))
    offs_partial = tl.program_id(0) * n_channels + offs_c
    tl.store(partial_mean_ptr + offs_partial, mean_c, mask=mask_c)
    tl.store(partial_m2_ptr + offs_partial, m2_c, mask=mask_c)


@triton.jit
def _batch_norm_statistics_merge_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (n_rows, n_channels)
    partial_mean_ptr,  # (n_partials, n_channels): mean of x − x₀
    partial_m2_ptr,  # (n_partials, n_channels)
    mean_ptr,  # (n_channels,)
    var_ptr,  # (n_channels,)
    unbiased_var_ptr,  # (n_channels,)
    n_rows,
    n_channels,
    n_partials,
    rows_per_program,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_p = tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_channels
    offs_tile = offs_p[:, None] * n_channels + offs_c[None, :]
    mask = (offs_p < n_partials)[:, None] & mask_c[None, :]
    mean = tl.load(partial_mean_ptr + offs_tile, mask=mask, other=0.0)
    m2 = tl.load(partial_m2_ptr + offs_tile, mask=mask, other=0.0)
    count = tl.maximum(tl.minimum(n_rows - offs_p.to(tl.int64) * rows_per_program, rows_per_program), 0)
    mean_c, m2_c = merge(mean, m2, count.to(tl.float32), n_rows * 1.0)
    pivot = tl.load(x_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    tl.store(mean_ptr + offs_c, pivot + mean_c, mask=mask_c)
    tl.store(var_ptr + offs_c, m2_c / n_rows, mask=mask_c)
    tl.store(unbiased_var_ptr + offs_c, m2_c / (n_rows - 1), mask=mask_c)


def _fake_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n_channels = x.shape[1]
    mean, var, unbiased_var = (x.new_empty(n_channels, dtype=torch.float32) for _ in range(3))
    return mean, var, unbiased_var


@kernel_op("fastjepa::batch_norm_statistics", fake=_fake_statistics)
def batch_norm_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of every channel.

    Args:
        x: (n_rows, n_channels), contiguous, n_rows ≥ 2, fp32, bf16 or fp16. Detach it: the gradient of the statistics
            is part of the gradient of `fastjepa::batch_norm_forward`.

    Returns:
        mean, var (divided by n_rows) and unbiased var (divided by n_rows − 1), each (n_channels,) fp32.

    Raises:
        ValueError: there is one row only, or more than 1024 channels, or x is not contiguous.
    """
    require_available(_OP, x.device)
    n_rows, n_channels = check_rows(_OP, x)
    check_more_than_one_value(x.shape)
    rows = row_launch("statistics", n_rows, n_channels, x.dtype)
    partial_mean, partial_m2 = (
        torch.empty((rows.split.programs, n_channels), dtype=torch.float32, device=x.device) for _ in range(2)
    )
    mean, var, unbiased_var = (torch.empty(n_channels, dtype=torch.float32, device=x.device) for _ in range(3))
    launch_kernel(
        _batch_norm_statistics_kernel,
        rows.grid,
        rows.config,
        x_ptr=x,
        partial_mean_ptr=partial_mean,
        partial_m2_ptr=partial_m2,
        n_rows=n_rows,
        n_channels=n_channels,
        rows_per_program=rows.split.rows_per_program,
    )
    config = merge_config(rows.split.programs)
    launch_kernel(
        _batch_norm_statistics_merge_kernel,
        (triton.cdiv(n_channels, config.blocks["BLOCK_C"]),),
        config,
        x_ptr=x,
        partial_mean_ptr=partial_mean,
        partial_m2_ptr=partial_m2,
        mean_ptr=mean,
        var_ptr=var,
        unbiased_var_ptr=unbiased_var,
        n_rows=n_rows,
        n_channels=n_channels,
        n_partials=rows.split.programs,
        rows_per_program=rows.split.rows_per_program,
    )
    return mean, var, unbiased_var


def check_more_than_one_value(shape: torch.Size) -> None:
    """nn.BatchNorm's own ValueError for a batch that has one value per channel: `shape` is (N, C, ...)."""
    if shape.numel() == shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")


@torch.no_grad()
def update_running_statistics(bn: nn.BatchNorm1d | nn.BatchNorm2d, mean: Tensor, unbiased_var: Tensor) -> None:
    """Move the buffers of `bn` as nn.BatchNorm does in one training step, without a host sync.

    running ← running + m·(batch − running) with m = momentum, or 1/num_batches_tracked (a cumulative average) if the
    momentum is None. Does nothing if `bn` does not track running statistics.

    Args:
        bn: the module whose running_mean, running_var and num_batches_tracked are changed in place.
        mean, unbiased_var: (n_channels,), the statistics of the batch, from `batch_norm_statistics`.
    """
    if not bn.track_running_stats:
        return
    # nn.BatchNorm moves nothing if there is neither a momentum nor a count of batches.
    step: float | Tensor = 0.0 if bn.momentum is None else bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            step = bn.num_batches_tracked.reciprocal()
    for running, batch in ((bn.running_mean, mean), (bn.running_var, unbiased_var)):
        if running is not None:
            weight = step.to(running.dtype) if isinstance(step, Tensor) else step
            running.lerp_(batch.to(running.dtype), weight)


def audit_cases() -> list[AuditCase]:
    """The statistics kernels at the recipe's shapes, for the static audit."""
    cases = []
    for n_rows, n_channels, dtype in recipe_cases():
        rows = row_launch("statistics", n_rows, n_channels, dtype)
        shape = f"{TRITON_TYPE[dtype]}/{n_rows}x{n_channels}"
        partials = 2 * rows.split.programs * n_channels
        divisible = ("n_rows", "n_channels", "rows_per_program")
        cases.append(
            AuditCase(
                name=f"{_OP}/{shape}",
                kernel=_batch_norm_statistics_kernel,
                signature=audit_signature(_batch_norm_statistics_kernel, dtype, ("x_ptr",)),
                constexprs={},
                config=rows.config,
                bytes_moved=n_rows * n_channels * dtype.itemsize + 4 * partials,
                flops=6 * n_rows * n_channels,
                divisible_by_16=divisible,
                programs=math.prod(rows.grid),
                loop_trips=(rows.split.tiles,),
            )
        )
        if dtype == torch.bfloat16:
            config = merge_config(rows.split.programs)
            cases.append(
                AuditCase(
                    name=f"{_OP}_merge/{shape}",
                    kernel=_batch_norm_statistics_merge_kernel,
                    signature=audit_signature(_batch_norm_statistics_merge_kernel, dtype, ("x_ptr",)),
                    constexprs={},
                    config=config,
                    bytes_moved=4 * (partials + 3 * n_channels),
                    flops=8 * rows.split.programs * n_channels,
                    divisible_by_16=divisible,
                    programs=triton.cdiv(n_channels, config.blocks["BLOCK_C"]),
                )
            )
    return cases
