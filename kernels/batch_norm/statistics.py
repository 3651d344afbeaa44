"""Per-channel mean and variance of channels-last rows in one pass, and the running statistics of nn.BatchNorm.

Every program leaves the (mean, M2) of its rows, M2 = Σ(x − mean)², and a second, small kernel merges them (`merge`).
Within a program, every position of the tile runs Welford's update, and these are merged by the same formula. Nothing is
squared before it is centred. All of this is done on x − x₀, where the pivot x₀ is the channel's first value: that
difference is exact in fp32 for values near each other, whereas a running mean of 1e3 would be rounded by 3e-5 at every
step, too much beside a standard deviation of 1e-2. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa.kernels.batch_norm.merge import Partials, RunningStatistics, merge, merge_partials
from fastjepa.kernels.batch_norm.tiling import check_rows, recipe_cases, row_launch, rows_of_program
from fastjepa.kernels.checks import check_tensor, require_available
from fastjepa.kernels.launch import TRITON_TYPE, AuditCase, audit_signature, kernel_op, launch_kernel
from fastjepa.kernels.shares import Shares

_OP = "batch_norm_statistics"


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


def _fake_statistics(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    n_channels = x.shape[1]
    return x.new_empty(n_channels, dtype=torch.float32), x.new_empty(n_channels, dtype=torch.float32)


@kernel_op(
    "fastjepa::batch_norm_statistics",
    fake=_fake_statistics,
    mutates_args=("running_mean", "running_var", "num_batches_tracked"),
)
def _statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> tuple[Tensor, Tensor]:
    """`batch_norm_statistics`, as an op."""
    require_available(_OP, x.device)
    n_rows, _ = check_rows(_OP, x)
    check_more_than_one_value(x.shape)
    running = RunningStatistics(running_mean, running_var, num_batches_tracked, momentum)
    check_running_statistics(_OP, x, running)
    pivot = x[0]
    return merge_partials(statistics_partials(x, pivot), n_rows, pivot=pivot, running=running)


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
    return _statistics(x, running_mean, running_var, num_batches_tracked, momentum)


def check_running_statistics(op: str, x: Tensor, running: RunningStatistics) -> None:
    """Raise a ValueError that names a buffer that does not fit x, (n_rows, n_channels)."""
    for name, buffer in (("running_mean", running.running_mean), ("running_var", running.running_var)):
        if buffer is not None:
            check_tensor(op, name, buffer, shape=(x.shape[1],), device=x.device, contiguous=True)


def check_more_than_one_value(shape: torch.Size, shares: Shares | None = None) -> None:
    """nn.BatchNorm's own ValueError for a batch that has one value per channel: `shape` is (N, C, ...), of one rank if
    there are shares.
    """
    values, channels = shape.numel(), shape[1]
    if values == channels if shares is None else sum(shares.rows(values // channels)) < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")


def audit_cases() -> list[AuditCase]:
    """The pass over the rows at the recipe's shapes, for the static audit."""
    cases = []
    for n_rows, n_channels, dtype in recipe_cases():
        rows = row_launch("statistics", n_rows, n_channels, dtype)
        partials = 2 * rows.split.programs * n_channels
        cases.append(
            AuditCase(
                name=f"{_OP}/{TRITON_TYPE[dtype]}/{n_rows}x{n_channels}",
                kernel=_batch_norm_statistics_kernel,
                signature=audit_signature(_batch_norm_statistics_kernel, dtype, ("x_ptr", "pivot_ptr")),
                constexprs={"EVEN": rows.even},
                config=rows.config,
                bytes_moved=(n_rows + 1) * n_channels * dtype.itemsize + 4 * partials,
                flops=6 * n_rows * n_channels,
                divisible_by_16=("n_rows", "n_channels", "rows_per_program"),
                programs=math.prod(rows.grid),
                loop_trips=(rows.split.tiles,),
            )
        )
    return cases
