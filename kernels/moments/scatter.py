"""Pass 1: each program's rows about a centre of their own, Σ(x − centre) and Σ(x − centre)(x − centre)ᵀ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    launch_kernel,
    load_rows,
)
from fastjepa.kernels.moments.blocks import MAX_D, block_d_for, padded_size


@triton.jit
def _moments_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (n_rows, D)
    centre_ptr,  # (programs, n_blocks·BLOCK_D)
    residual_ptr,  # (programs, n_blocks·BLOCK_D): Σ(x − centre)
    scatter_ptr,  # (programs, n_blocks·BLOCK_D, n_blocks·BLOCK_D), about the centre
    n_rows,
    D: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    block_i = tl.program_id(1)
    block_j = tl.program_id(2)
    EVEN_D: tl.constexpr = D == N_BLOCKS * BLOCK_D
    SIZE: tl.constexpr = N_BLOCKS * BLOCK_D
    offs_n = pid.to(tl.int64) * (TILES * BLOCK_N) + tl.arange(0, BLOCK_N)
    offs_i = block_i * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_j = block_j * BLOCK_D + tl.arange(0, BLOCK_D)

    valid = tl.sum((offs_n < n_rows).to(tl.float32), 0)
    centre_i = tl.sum(load_rows(x_ptr, offs_n, offs_i, n_rows, D, EVEN_N, EVEN_D).to(tl.float32), 0) / valid
    if N_BLOCKS > 1:
        centre_j = tl.sum(load_rows(x_ptr, offs_n, offs_j, n_rows, D, EVEN_N, EVEN_D).to(tl.float32), 0) / valid
    residual = tl.zeros([BLOCK_D], dtype=tl.float32)
    scatter = tl.zeros([BLOCK_D, BLOCK_D], dtype=tl.float32)
    for _ in range(TILES):
        x_i = load_rows(x_ptr, offs_n, offs_i, n_rows, D, EVEN_N, EVEN_D).to(tl.float32) - centre_i[None, :]
        if not EVEN_N:
            x_i = tl.where(offs_n[:, None] < n_rows, x_i, 0.0)
        residual += tl.sum(x_i, 0)
        if N_BLOCKS > 1:
            x_j = load_rows(x_ptr, offs_n, offs_j, n_rows, D, EVEN_N, EVEN_D).to(tl.float32) - centre_j[None, :]
            scatter = add_dot(scatter, tl.trans(x_i), x_j, PRECISION, True)  # x_i is 0 outside already
        else:
            scatter = add_dot(scatter, tl.trans(x_i), x_i, PRECISION, True)
        offs_n += BLOCK_N

    if block_j == 0:
        tl.store(centre_ptr + pid * SIZE + offs_i, centre_i)
        tl.store(residual_ptr + pid * SIZE + offs_i, residual)
    tl.store(scatter_ptr + pid.to(tl.int64) * SIZE * SIZE + offs_i[:, None] * SIZE + offs_j[None, :], scatter)


# BLOCK_D → launch config. From the static audit: no spills on sm_80, sm_90 and sm_100. At 16 channels one warp makes
# the whole 16×16 product, so more warps would only repeat it. Above 64 channels the matrices are made in blocks of 64.
_CONFIGS = {
    16: LaunchConfig(num_warps=1, blocks={"BLOCK_N": 32, "BLOCK_D": 16}),
    32: LaunchConfig(num_warps=2, blocks={"BLOCK_N": 64, "BLOCK_D": 32}),
    64: LaunchConfig(num_warps=4, blocks={"BLOCK_N": 64, "BLOCK_D": 64}),
}
_MAX_PROGRAMS = 2112  # 16 for each of 132 multiprocessors; 2.2 MB of partials at 16 channels


class Partials(NamedTuple):
    """What every program leaves of T tensors of rows; `size` is D padded to whole blocks."""

    centre: Tensor  # (T, programs, size) fp32
    residual: Tensor  # (T, programs, size) fp32: Σ(x − centre)
    scatter: Tensor  # (T, programs, size, size) fp32, about the centre
    counts: Tensor  # (programs, 1) float64: rows


def scatter_partials(tensors: Sequence[Tensor]) -> Partials:
    """The partials of T tensors of contiguous rows (N, D), of one shape and dtype; launches T kernels."""
    (n_rows, n_channels), device = tensors[0].shape, tensors[0].device
    config, size = _CONFIGS[block_d_for(n_channels)], padded_size(n_channels)
    n_blocks = size // config.blocks["BLOCK_D"]
    split = _split(n_rows, n_channels)
    centre = torch.empty(len(tensors), split.programs, size, device=device, dtype=torch.float32)
    residual = torch.empty_like(centre)
    scatter = torch.empty(len(tensors), split.programs, size, size, device=device, dtype=torch.float32)
    for t, x in enumerate(tensors):
        launch_kernel(
            _moments_kernel,
            (split.programs, n_blocks, n_blocks),
            config,
            x_ptr=x,
            centre_ptr=centre[t],
            residual_ptr=residual[t],
            scatter_ptr=scatter[t],
            n_rows=n_rows,
            D=n_channels,
            N_BLOCKS=n_blocks,
            TILES=split.tiles,
            EVEN_N=split.even,
            PRECISION="tf32x3",
        )
    counts = torch.full((split.programs, 1), split.rows_per_program, device=device, dtype=torch.float64)
    counts[-1] = n_rows - (split.programs - 1) * split.rows_per_program
    return Partials(centre, residual, scatter, counts)


def _split(n_rows: int, n_channels: int) -> RowSplit:
    """How the programs of the moments kernel share the rows: fewer where each makes several blocks of the matrix."""
    config = _CONFIGS[block_d_for(n_channels)]
    n_blocks = padded_size(n_channels) // config.blocks["BLOCK_D"]
    return RowSplit.of(n_rows, config.blocks["BLOCK_N"], max(1, _MAX_PROGRAMS // n_blocks**2), prefer_even=True)


def audit_cases() -> list[AuditCase]:
    """At the projected losses' size (D = 16), the largest block and the largest size, fp32 and bf16."""
    n_rows, cases = 64 * 10 * 64 * 64, []
    for dtype in (torch.float32, torch.bfloat16):
        for d in (16, 64, MAX_D):
            size, split = padded_size(d), _split(n_rows, d)
            cases.append(
                AuditCase(
                    name=f"moments/{TRITON_TYPE[dtype]}/D={d}",
                    kernel=_moments_kernel,
                    signature=audit_signature(_moments_kernel, dtype, ("x_ptr",)),
                    constexprs={
                        "D": d,
                        "N_BLOCKS": size // block_d_for(d),
                        "TILES": split.tiles,
                        "EVEN_N": split.even,
                        "PRECISION": "tf32x3",
                    },
                    config=_CONFIGS[block_d_for(d)],
                    bytes_moved=n_rows * d * dtype.itemsize + split.programs * size * (size + 2) * 4,
                    flops=2 * n_rows * d * d,
                    divisible_by_16=("n_rows",),
                    expects_tensor_cores=True,
                )
            )
    return cases
