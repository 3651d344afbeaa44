"""The statistics of parts of the rows, merged into those of all of them; the merge moves nn.BatchNorm's buffers too.

Parts, each with its mean and M2 = Σ(x − mean)², are what the programs of `statistics` leave:

    n = Σ n_i,   mean = Σ n_i·mean_i / n,   M2 = Σ M2_i + Σ n_i·(mean_i − mean)²

(Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", for all parts at once).

The merge also moves the running statistics: three launches less for each BatchNorm. It stays a launch of its own, so
that parts of several ranks can be merged by it too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa.kernels.batch_norm.tiling import merge_config, recipe_cases, row_launch
from fastjepa.kernels.launch import TRITON_TYPE, AuditCase, audit_signature, launch_kernel, round_to


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


def merge_partials(
    partials: Partials,
    n_rows: int,
    *,
    pivot: Tensor | None = None,
    counts: Tensor | None = None,
    running: RunningStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the merge: (mean, biased variance) of all parts, each (n_channels,) fp32; moves the running statistics.

    Parts may come from several ranks, each of which has merged its own before (`across_ranks`):
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


def audit_cases() -> list[AuditCase]:
    """The merge of what `statistics` leaves at the recipe's shapes, and of eight ranks' parts, for the static audit."""
    kernel, cases = _batch_norm_statistics_merge_kernel, []
    for n_rows, n_channels, dtype in recipe_cases():
        if dtype == torch.bfloat16:
            n_partials = row_launch("statistics", n_rows, n_channels, dtype).split.programs
            config = merge_config(n_partials)
            cases.append(
                AuditCase(
                    name=f"batch_norm_statistics_merge/{TRITON_TYPE[dtype]}/{n_rows}x{n_channels}",
                    kernel=kernel,
                    signature=audit_signature(kernel, dtype, ("pivot_ptr",), ("count_ptr",))
                    | {"num_batches_tracked_ptr": "*i64", "momentum": "fp32"},
                    constexprs={"count_ptr": None, "CUMULATIVE": False},
                    config=config,
                    bytes_moved=4 * (2 * n_partials + 4) * n_channels + 8 + dtype.itemsize * n_channels,
                    flops=8 * n_partials * n_channels,
                    divisible_by_16=("n_rows", "n_channels", "rows_per_program"),
                    programs=triton.cdiv(n_channels, config.blocks["BLOCK_C"]),
                )
            )
    ranks, n_channels = 8, 64
    config = merge_config(ranks)
    cases.append(
        AuditCase(
            name=f"batch_norm_statistics_merge/ranks/{ranks}x{n_channels}",
            kernel=kernel,
            signature=audit_signature(kernel, torch.float32, ())
            | {"num_batches_tracked_ptr": "*i64", "momentum": "fp32"},
            constexprs={"CUMULATIVE": False},
            config=config,
            bytes_moved=4 * (2 * ranks + 7) * n_channels + 4 * ranks + 8,
            flops=8 * ranks * n_channels,
            divisible_by_16=("n_rows", "n_channels", "rows_per_program"),
            programs=triton.cdiv(n_channels, config.blocks["BLOCK_C"]),
        )
    )
    return cases
