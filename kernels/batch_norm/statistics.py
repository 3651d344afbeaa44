"""Per-channel mean and variance of channels-last rows in one pass, and the running statistics of nn.BatchNorm.

Every program leaves the (mean, M2) of its rows, M2 = Σ(x − mean)², and a second, small kernel merges them:

    n = Σ n_i,   mean = Σ n_i·mean_i / n,   M2 = Σ M2_i + Σ n_i·(mean_i − mean)²

(Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", for all parts at once). Within a program,
every position of the tile runs Welford's update. Nothing is squared before it is centred. All of this is done on
x − x₀, where the pivot x₀ is the channel's first value: that difference is exact in fp32 for values near each other,
whereas a running mean of 1e3 would be rounded by 3e-5 at every step, too much beside a standard deviation of 1e-2. No
atomics: the same input gives the same bits.

The merge also moves the running statistics: three launches less for each BatchNorm. It stays a launch of its own, so
that parts of several devices can be merged by it too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa.kernels.batch_norm.tiling import (
    check_rows,
    merge_config,
    recipe_cases,
    row_launch,
    rows_of_program,
)
from fastjepa.kernels.checks import check_tensor, require_available
from fastjepa.kernels.launch import (
    TRITON_TYPE,
    AuditCase,
    audit_signature,
    kernel_op,
    launch_kernel,
    round_to,
)

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
    pivot_ptr,  # (n_channels,)
    partial_mean_ptr,  # (n_partials, n_channels): mean of x − pivot
    partial_m2_ptr,  # (n_partials, n_channels)
    n_rows,
    n_channels,
    rows_per_program,
    EVEN: tl.constexpr,  # whole tiles only, of rows and of channels: an eighth of the loop's instructions are masks
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_channels
    offs_tile = offs_n[:, None] * n_channels + offs_c[None, :]
    first_row, rows = rows_of_program(n_rows, rows_per_program)
    x_ptr += first_row * n_channels  # int64; what one program reads is less than 2^31 elements

    pivot = tl.load(pivot_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    # The next tile is loaded while this one is summed: one input alone keeps too few loads in flight.
    if EVEN:
        x = tl.load(x_ptr + offs_tile)
    else:
        x = tl.load(x_ptr + offs_tile, mask=(offs_n < rows)[:, None] & mask_c[None, :], other=0.0)
    row = 0
    tile = 0.0
    while row < rows:  # not range(): some versions of the interpreter cannot take its runtime bounds
        next_row = row + BLOCK_N
        if EVEN:  # after the last tile there is none, and it is read again
            next_x = tl.load(x_ptr + tl.minimum(next_row, rows - BLOCK_N) * n_channels + offs_tile)
        else:
            mask = (offs_n < rows - next_row)[:, None] & mask_c[None, :]
            next_x = tl.load(x_ptr + next_row * n_channels + offs_tile, mask=mask, other=0.0)
        delta = (x.to(tl.float32) - pivot[None, :]) - mean
        weight = 1.0 / (tile + 1.0)
        if EVEN:
            mean += delta * weight
            m2 += delta * delta * (weight * tile)
        else:
            weight = tl.where(offs_n < rows - row, weight, 0.0)  # 0 for rows beyond the end
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
    pivot_ptr,  # (n_channels,) or None: what partial means are relative to
    partial_mean_ptr,  # (n_partials, n_channels)
    partial_m2_ptr,  # (n_partials, n_channels)
    count_ptr,  # (n_partials,) fp32, rows of each part; None: rows_per_program of each program, the last with the rest
    mean_ptr,  # (n_channels,)
    var_ptr,  # (n_channels,): divided by n_rows
    running_mean_ptr,  # (n_channels,) or None, moved in place, like running_var
    running_var_ptr,
    num_batches_tracked_ptr,  # () int64 or None; counted up if momentum is given, else what gives it
    momentum,
    n_rows,  # of all parts
    n_channels,
    n_partials,
    rows_per_program,
    CUMULATIVE: tl.constexpr,  # momentum = 1/num_batches_tracked
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_p = tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_channels
    mask_p = offs_p < n_partials
    offs_tile = offs_p[:, None] * n_channels + offs_c[None, :]
    mask = mask_p[:, None] & mask_c[None, :]
    mean = tl.load(partial_mean_ptr + offs_tile, mask=mask, other=0.0)
    m2 = tl.load(partial_m2_ptr + offs_tile, mask=mask, other=0.0)
    if count_ptr is not None:
        count = tl.load(count_ptr + offs_p, mask=mask_p, other=0.0)
    else:
        rows = tl.minimum(n_rows - offs_p.to(tl.int64) * rows_per_program, rows_per_program)
        count = tl.maximum(rows, 0).to(tl.float32)
    mean_c, m2_c = merge(mean, m2, count, n_rows * 1.0)
    if pivot_ptr is not None:
        mean_c += tl.load(pivot_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    tl.store(mean_ptr + offs_c, mean_c, mask=mask_c)
    tl.store(var_ptr + offs_c, m2_c / n_rows, mask=mask_c)

    step = momentum
    if CUMULATIVE:
        step = 1.0 / tl.load(num_batches_tracked_ptr).to(tl.float32)
    elif num_batches_tracked_ptr is not None:  # noqa: SIM102  the outer condition is the compiler's
        if tl.program_id(0) == 0:
            tl.store(num_batches_tracked_ptr, tl.load(num_batches_tracked_ptr) + 1)
    if running_mean_ptr is not None:
        _move(running_mean_ptr + offs_c, mean_c, step, mask_c)
    if running_var_ptr is not None:
        _move(running_var_ptr + offs_c, m2_c / (n_rows - 1), step, mask_c)


@triton.jit
def _move(ptrs, batch, step, mask):  # type: ignore[no-untyped-def]
    """running ← (1 − step)·running + step·batch, as nn.BatchNorm does."""
    running = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    running = (1.0 - step) * running + step * batch
    tl.store(ptrs, round_to(running, ptrs.dtype.element_ty), mask=mask)


class Partials(NamedTuple):
    """Parts of the rows: of each its mean, relative to a pivot, and its M2, (parts, n_channels) fp32."""

    mean: Tensor
    m2: Tensor
    rows_per_part: int
    """Rows of each part, of which the last has what is left."""


class RunningStatistics(NamedTuple):
    """The buffers of a BatchNorm that a batch moves, in place; those that it does not have are None.

    momentum: None is nn.BatchNorm's cumulative average, for which `num_batches_tracked` must be there.
    """

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    momentum: float | None = None


def statistics_partials(x: Tensor, pivot: Tensor) -> Partials:
    """Launch the pass over the rows: the statistics of each program's rows, means relative to `pivot` (n_channels,)."""
    n_rows, n_channels = x.shape
    rows = row_launch("statistics", n_rows, n_channels, x.dtype)
    mean, m2 = (torch.empty((rows.split.programs, n_channels), dtype=torch.float32, device=x.device) for _ in range(2))
    launch_kernel(
        _batch_norm_statistics_kernel,
        rows.grid,
        rows.config,
        x_ptr=x,
        pivot_ptr=pivot,
        partial_mean_ptr=mean,
        partial_m2_ptr=m2,
        n_rows=n_rows,
        n_channels=n_channels,
        rows_per_program=rows.split.rows_per_program,
        EVEN=rows.even,
    )
    return Partials(mean, m2, rows.split.rows_per_program)


def merge_partials(
    partials: Partials,
    n_rows: int,
    *,
    pivot: Tensor | None = None,
    counts: Tensor | None = None,
    running: RunningStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the merge: (mean, biased variance) of all parts, each (n_channels,) fp32; moves the running statistics.

    Parts may come from several devices, each of which has merged its own before, with one pivot for all:
    `merge_partials(own, n)` gives mean, still relative to the pivot, and M2/n.

    Args:
        partials: at most `MAX_PARTIALS` parts.
        n_rows: of all parts together.
        pivot: (n_channels,), added to the mean.
        counts: (parts,) fp32, rows of each part, where they are not as `rows_per_part` says.
        running: moved by one step with mean and unbiased variance.
    """
    n_partials, n_channels = partials.mean.shape
    device = partials.mean.device
    mean, var = (torch.empty(n_channels, dtype=torch.float32, device=device) for _ in range(2))
    running = running or RunningStatistics()
    cumulative = running.momentum is None and running.num_batches_tracked is not None
    if cumulative:  # before the kernel, whose programs all read it
        assert running.num_batches_tracked is not None
        running.num_batches_tracked.add_(1)
    config = merge_config(n_partials)
    launch_kernel(
        _batch_norm_statistics_merge_kernel,
        (triton.cdiv(n_channels, config.blocks["BLOCK_C"]),),
        config,
        pivot_ptr=pivot,
        partial_mean_ptr=partials.mean,
        partial_m2_ptr=partials.m2,
        count_ptr=counts,
        mean_ptr=mean,
        var_ptr=var,
        running_mean_ptr=running.running_mean,
        running_var_ptr=running.running_var,
        num_batches_tracked_ptr=running.num_batches_tracked,
        # nn.BatchNorm moves nothing if there is neither a momentum nor a count of batches.
        momentum=0.0 if running.momentum is None else running.momentum,
        n_rows=n_rows,
        n_channels=n_channels,
        n_partials=n_partials,
        rows_per_program=partials.rows_per_part,
        CUMULATIVE=cumulative,
    )
    return mean, var


def _fake_statistics(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    n_channels = x.shape[1]
    return x.new_empty(n_channels, dtype=torch.float32), x.new_empty(n_channels, dtype=torch.float32)


@kernel_op(
    "fastjepa::batch_norm_statistics",
    fake=_fake_statistics,
    mutates_args=("running_mean", "running_var", "num_batches_tracked"),
)
def batch_norm_statistics(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel; moves running statistics, if given, as nn.BatchNorm does in one step.

    running ← (1 − m)·running + m·batch with m = momentum, or 1/num_batches_tracked if that is None, and the unbiased
    variance (divided by n_rows − 1).

    Args:
        x: (n_rows, n_channels), contiguous, n_rows ≥ 2, fp32, bf16 or fp16. Detach it: the gradient of the statistics
            is part of the gradient of `fastjepa::batch_norm_forward`.
        running_mean, running_var: (n_channels,), contiguous, changed in place; or None.
        num_batches_tracked: () int64, counted up in place; or None.
        momentum: m; None for a cumulative average, or, without a count, for nothing to move.

    Returns:
        mean, and var (divided by n_rows), each (n_channels,) fp32.

    Raises:
        ValueError: there is one row only, or more than 1024 channels, or x is not contiguous.
    """
    require_available(_OP, x.device)
    n_rows, n_channels = check_rows(_OP, x)
    check_more_than_one_value(x.shape)
    for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
        if buffer is not None:
            check_tensor(_OP, name, buffer, shape=(n_channels,), device=x.device, contiguous=True)
    pivot = x[0]
    return merge_partials(
        statistics_partials(x, pivot),
        n_rows,
        pivot=pivot,
        running=RunningStatistics(running_mean, running_var, num_batches_tracked, momentum),
    )


def check_more_than_one_value(shape: torch.Size) -> None:
    """nn.BatchNorm's own ValueError for a batch that has one value per channel: `shape` is (N, C, ...)."""
    if shape.numel() == shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")


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
                signature=audit_signature(_batch_norm_statistics_kernel, dtype, ("x_ptr", "pivot_ptr")),
                constexprs={"EVEN": rows.even},
                config=rows.config,
                bytes_moved=(n_rows + 1) * n_channels * dtype.itemsize + 4 * partials,
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
                    signature=audit_signature(
                        _batch_norm_statistics_merge_kernel, dtype, ("pivot_ptr",), ("count_ptr",)
                    )
                    | {"num_batches_tracked_ptr": "*i64", "momentum": "fp32"},
                    constexprs={"count_ptr": None, "CUMULATIVE": False},
                    config=config,
                    bytes_moved=4 * (partials + 4 * n_channels) + 8 + dtype.itemsize * n_channels,
                    flops=8 * rows.split.programs * n_channels,
                    divisible_by_16=divisible,
                    programs=triton.cdiv(n_channels, config.blocks["BLOCK_C"]),
                )
            )
    return cases
