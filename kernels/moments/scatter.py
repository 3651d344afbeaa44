"""Pass 1: each program's rows about a centre of their own, Σ(x − centre) and Σ(x − centre)(x − centre)ᵀ.

Here for more than 32 channels, in blocks of 64; `narrow` has the kernel for fewer.
"""

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
from fastjepa.kernels.moments.blocks import MAX_D, padded_size
from fastjepa.kernels.moments.narrow import MAX_NARROW_D, launch_narrow, narrow_split
from fastjepa.kernels.moments.tensors import MAX_TENSORS, launches_of, pointers, tensor_of


@triton.jit
def _moments_kernel(  # type: ignore[no-untyped-def]
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr,  # (n_rows, D), or None
    centre_ptr,  # (tensors, programs, n_blocks·BLOCK_D)
    residual_ptr,  # (tensors, programs, n_blocks·BLOCK_D): Σ(x − centre)
    scatter_ptr,  # (tensors, programs, n_blocks·BLOCK_D, n_blocks·BLOCK_D), about the centre
    n_rows,
    D: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    TILES: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block_i = tl.program_id(1) // N_BLOCKS
    block_j = tl.program_id(1) % N_BLOCKS
    t = tl.program_id(2)
    x_ptr = tensor_of(x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, t)
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

    partial = (t * tl.num_programs(0) + pid).to(tl.int64)
    if block_j == 0:
        tl.store(centre_ptr + partial * SIZE + offs_i, centre_i)
        tl.store(residual_ptr + partial * SIZE + offs_i, residual)
    tl.store(scatter_ptr + partial * SIZE * SIZE + offs_i[:, None] * SIZE + offs_j[None, :], scatter)


# From the static audit: no spills on sm_80, sm_90 and sm_100.
_CONFIG = LaunchConfig(num_warps=4, blocks={"BLOCK_N": 64, "BLOCK_D": 64})
_MAX_PROGRAMS = 2112  # for each tensor, in all blocks of its matrix; 16 for each of 132 multiprocessors


class Partials(NamedTuple):
    """What every program leaves of T tensors of rows; `size` is D padded to whole blocks."""

    centre: Tensor  # (T, programs, size) fp32
    residual: Tensor  # (T, programs, size) fp32: Σ(x − centre)
    scatter: Tensor  # (T, programs, size, size) fp32, about the centre
    rows_per_program: int  # the last one has what is left


def scatter_partials(tensors: Sequence[Tensor]) -> Partials:
    """The partials of T tensors of contiguous rows (N, D), of one shape and dtype; `MAX_TENSORS` in each launch."""
    (n_rows, n_channels), device = tensors[0].shape, tensors[0].device
    size, narrow = padded_size(n_channels), int(n_channels) <= MAX_NARROW_D
    split = narrow_split(n_rows, n_channels) if narrow else _split(n_rows, n_channels)
    centre = torch.empty(len(tensors), split.programs, size, device=device, dtype=torch.float32)
    residual = torch.empty_like(centre)
    scatter = torch.empty(len(tensors), split.programs, size, size, device=device, dtype=torch.float32)
    for some in launches_of(len(tensors)):
        launch = launch_narrow if narrow else _launch_wide
        launch(tensors[some], split, centre[some], residual[some], scatter[some])
    return Partials(centre, residual, scatter, split.rows_per_program)


def _launch_wide(tensors: Sequence[Tensor], split: RowSplit, centre: Tensor, residual: Tensor, scatter: Tensor) -> None:
    n_rows, n_channels = tensors[0].shape
    n_blocks = padded_size(n_channels) // _CONFIG.blocks["BLOCK_D"]
    launch_kernel(
        _moments_kernel,
        (split.programs, n_blocks**2, len(tensors)),
        _CONFIG,
        **pointers("x", tensors),
        centre_ptr=centre,
        residual_ptr=residual,
        scatter_ptr=scatter,
        n_rows=n_rows,
        D=n_channels,
        N_BLOCKS=n_blocks,
        TILES=split.tiles,
        EVEN_N=split.even,
        PRECISION="tf32x3",
    )


def _split(n_rows: int, n_channels: int) -> RowSplit:
    """How the programs of a launch share the rows of a tensor: fewer where each makes several blocks of the matrix."""
    n_blocks = padded_size(n_channels) // _CONFIG.blocks["BLOCK_D"]
    return RowSplit.of(n_rows, _CONFIG.blocks["BLOCK_N"], max(1, _MAX_PROGRAMS // n_blocks**2), prefer_even=True)


def audit_cases() -> list[AuditCase]:
    """A state and four predictions of one block, and one tensor of the largest size, fp32 and bf16."""
    n_rows, cases = 64 * 10 * 64 * 64, []
    for dtype in (torch.float32, torch.bfloat16):
        for d, n_tensors in ((64, MAX_TENSORS), (MAX_D, 1)):
            size, split = padded_size(d), _split(n_rows, d)
            rows, absent = ([f"x{i}_ptr" for i in r] for r in (range(MAX_TENSORS), range(n_tensors, MAX_TENSORS)))
            cases.append(
                AuditCase(
                    name=f"moments/{TRITON_TYPE[dtype]}/D={d}",
                    kernel=_moments_kernel,
                    signature=audit_signature(_moments_kernel, dtype, rows, absent),
                    constexprs={
                        **dict.fromkeys(absent),
                        "D": d,
                        "N_BLOCKS": size // _CONFIG.blocks["BLOCK_D"],
                        "TILES": split.tiles,
                        "EVEN_N": split.even,
                        "PRECISION": "tf32x3",
                    },
                    config=_CONFIG,
                    bytes_moved=n_tensors * (n_rows * d * dtype.itemsize + split.programs * size * (size + 2) * 4),
                    flops=n_tensors * 2 * n_rows * d * d,
                    divisible_by_16=("n_rows",),
                    expects_tensor_cores=True,
                    programs=split.programs * (size // _CONFIG.blocks["BLOCK_D"]) ** 2 * n_tensors,
                    loop_trips=(split.tiles,),
                )
            )
    return cases
