"""Pass 1 for at most 32 channels: a tile's rows are dealt out in groups, and each warp makes products of its own.

A product of 16×16 is one warp's work, so a plain dot would leave the other warps of a program idle, or repeat it in
each. Here the tile is a stack of matrices (group, row, channel), and the dot a stack of small ones.

    d = x − centre = high + low;  Σddᵀ = Σ(high·highᵀ + low·lowᵀ) + C + Cᵀ,  C = Σ high·lowᵀ

`high` is what a matrix instruction takes exactly, the first 8 bits of d if rows are bf16 and 11 if they are fp32; `low`
is the rest. The symmetry saves the product low·highᵀ and its operand, a third of "tf32x3". As there, low·lowᵀ is left
out for fp32 rows: it is 2^-22 of the sum at most.
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
    audit_signature,
    dot,
    launch_kernel,
    load_rows,
    round_to,
)
from fastjepa.kernels.moments.blocks import block_d_for
from fastjepa.kernels.moments.tensors import MAX_TENSORS, pointers, tensor_of
from fastjepa.kernels.tf32 import split_tf32

MAX_NARROW_D = 32


@triton.jit
def _narrow_moments_kernel(  # type: ignore[no-untyped-def]
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr,  # (n_rows, D), or None
    centre_ptr,  # (tensors, programs, BLOCK_D)
    residual_ptr,  # (tensors, programs, BLOCK_D): Σ(x − centre)
    scatter_ptr,  # (tensors, programs, BLOCK_D, BLOCK_D), about the centre
    n_rows,
    D: tl.constexpr,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN_N: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    t = tl.program_id(1)
    x_ptr = tensor_of(x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, t)
    offs_n = pid.to(tl.int64) * (TILES * BLOCK_N) + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    ROWS: tl.constexpr = BLOCK_N // GROUPS
    PRECISION: tl.constexpr = "ieee" if HALF else "tf32"

    valid = tl.sum((offs_n < n_rows).to(tl.float32), 0)
    centre = tl.sum(load_rows(x_ptr, offs_n, offs_d, n_rows, D, EVEN_N, D == BLOCK_D).to(tl.float32), 0) / valid
    if HALF:  # with few bits, so that a bf16 number less the centre seldom has more than high and low hold
        centre = round_to(centre, tl.bfloat16).to(tl.float32)
    residual = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)  # each row of a tile its own sum: no reduction per tile
    scatter = tl.zeros([GROUPS, BLOCK_D, BLOCK_D], dtype=tl.float32)
    cross = tl.zeros([GROUPS, BLOCK_D, BLOCK_D], dtype=tl.float32)
    for _ in range(TILES):
        x = load_rows(x_ptr, offs_n, offs_d, n_rows, D, EVEN_N, D == BLOCK_D).to(tl.float32) - centre[None, :]
        if not EVEN_N:
            x = tl.where(offs_n[:, None] < n_rows, x, 0.0)
        residual += x
        if HALF:  # cut off: low·lowᵀ is not left out, so it may have one sign
            high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
            low = round_to(x - high, tl.bfloat16)
            high = round_to(high, tl.bfloat16)
        else:  # to nearest
            high, low = split_tf32(x)
        high = tl.reshape(high, [GROUPS, ROWS, BLOCK_D])
        low = tl.reshape(low, [GROUPS, ROWS, BLOCK_D])
        high_t = tl.permute(high, (0, 2, 1))
        # Each tile's product is made apart and joins its sum by a rounded fp32 operation, because matrix instructions
        # add into their accumulator with truncation. Subtractions: Triton folds additions back into the dot.
        product = dot(high_t, high, tl.zeros_like(scatter), PRECISION)
        if HALF:
            product = dot(tl.permute(low, (0, 2, 1)), low, product, PRECISION)
        scatter -= product
        cross -= dot(high_t, low, tl.zeros_like(cross), PRECISION)
        offs_n += BLOCK_N

    partial = t * tl.num_programs(0) + pid
    offs_dd = offs_d[:, None] * BLOCK_D + offs_d[None, :]
    tl.store(centre_ptr + partial * BLOCK_D + offs_d, centre)
    tl.store(residual_ptr + partial * BLOCK_D + offs_d, tl.sum(residual, 0))
    scatter += cross + tl.permute(cross, (0, 2, 1))
    tl.store(scatter_ptr + partial * BLOCK_D * BLOCK_D + offs_dd, -tl.sum(scatter, 0))


# BLOCK_D → launch config. From the static audit: no spills on sm_80, sm_90 and sm_100 with triton 3.6, 3.7 and 3.9. The
# next two tiles are on their way while one is worked on; at 16 channels that keeps 32 KB in flight on a multiprocessor.
NARROW_CONFIGS = {
    16: LaunchConfig(num_warps=4, num_stages=3, blocks={"BLOCK_N": 128, "BLOCK_D": 16}),
    32: LaunchConfig(num_warps=4, num_stages=3, blocks={"BLOCK_N": 128, "BLOCK_D": 32}),
}


_MAX_PROGRAMS = 528  # for each tensor; 4 for each of 132 multiprocessors, 0.6 MB of partials at 16 channels


def narrow_split(n_rows: int, n_channels: int) -> RowSplit:
    """How the programs of a launch share the rows of each of its tensors."""
    return RowSplit.of(
        n_rows, NARROW_CONFIGS[block_d_for(n_channels)].blocks["BLOCK_N"], _MAX_PROGRAMS, prefer_even=True
    )


def launch_narrow(
    tensors: Sequence[Tensor], split: RowSplit, centre: Tensor, residual: Tensor, scatter: Tensor
) -> None:
    """Write the partials of at most `MAX_TENSORS` tensors of contiguous rows (N, D), D ≤ 32; see `Partials`."""
    n_rows, n_channels = tensors[0].shape
    config = NARROW_CONFIGS[centre.shape[2]]
    launch_kernel(
        _narrow_moments_kernel,
        (split.programs, len(tensors)),
        config,
        **pointers("x", tensors),
        centre_ptr=centre,
        residual_ptr=residual,
        scatter_ptr=scatter,
        n_rows=n_rows,
        D=n_channels,
        TILES=split.tiles,
        GROUPS=config.num_warps,
        EVEN_N=split.even,
        HALF=tensors[0].dtype != torch.float32,
    )


def audit_cases() -> list[AuditCase]:
    """A state and four predictions at the projected losses' size (D = 16), and 32 channels, fp32 and bf16."""
    n_rows, cases = 64 * 10 * 64 * 64, []
    for dtype in (torch.float32, torch.bfloat16):
        for d in (16, MAX_NARROW_D):
            split = narrow_split(n_rows, d)
            rows = tuple(f"x{i}_ptr" for i in range(MAX_TENSORS))
            cases.append(
                AuditCase(
                    name=f"moments/{TRITON_TYPE[dtype]}/D={d}",
                    kernel=_narrow_moments_kernel,
                    signature=audit_signature(_narrow_moments_kernel, dtype, rows),
                    constexprs={
                        "D": d,
                        "TILES": split.tiles,
                        "GROUPS": NARROW_CONFIGS[d].num_warps,
                        "EVEN_N": split.even,
                        "HALF": dtype != torch.float32,
                    },
                    config=NARROW_CONFIGS[d],
                    bytes_moved=MAX_TENSORS * (n_rows * d * dtype.itemsize + split.programs * d * (d + 2) * 4),
                    flops=MAX_TENSORS * 2 * n_rows * d * d,
                    divisible_by_16=("n_rows",),
                    expects_tensor_cores=True,
                    programs=split.programs * MAX_TENSORS,
                    loop_trips=(split.tiles,),
                )
            )
    return cases
