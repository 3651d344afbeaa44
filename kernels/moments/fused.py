"""The kernels of both passes, and the functions that launch them. The package has the maths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    dot,
    dot_precision,
    launch_kernel,
    load_rows,
    round_to,
)


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


@triton.jit
def _centred_linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (n_rows, D)
    base_ptr,  # (n_rows, D), read if HAS_BASE; may be out
    out_ptr,  # (n_rows, D)
    centre_ptr,  # (n_blocks·BLOCK_D,) fp32
    constant_ptr,  # (n_blocks·BLOCK_D,) fp32
    linear_ptr,  # (n_blocks·BLOCK_D, n_blocks·BLOCK_D) in the dtype of x, transposed: row = input channel
    n_rows,
    D: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BASE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    EVEN_D: tl.constexpr = D == N_BLOCKS * BLOCK_D
    SIZE: tl.constexpr = N_BLOCKS * BLOCK_D
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_j = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    out = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32) - tl.load(constant_ptr + offs_j)[None, :]
    for block_i in range(N_BLOCKS):
        offs_i = block_i * BLOCK_D + tl.arange(0, BLOCK_D)
        x = load_rows(x_ptr, offs_n, offs_i, n_rows, D, EVEN_N, EVEN_D).to(tl.float32)
        x = round_to(tl.load(centre_ptr + offs_i)[None, :] - x, x_ptr.dtype.element_ty)
        out = dot(x, tl.load(linear_ptr + offs_i[:, None] * SIZE + offs_j[None, :]), out, PRECISION)
    if HAS_BASE:
        out += load_rows(base_ptr, offs_n, offs_j, n_rows, D, EVEN_N, EVEN_D).to(tl.float32)
    out = round_to(out, out_ptr.dtype.element_ty)
    ptrs = out_ptr + offs_n[:, None] * D + offs_j[None, :]
    if EVEN_N and EVEN_D:
        tl.store(ptrs, out)
    else:
        tl.store(ptrs, out, mask=(offs_n[:, None] < n_rows) & (offs_j[None, :] < D))


# BLOCK_D → launch config. From the static audit: no spills on sm_80, sm_90 and sm_100. At 16 channels one warp makes
# the whole 16×16 product, so more warps would only repeat it. Above 64 channels the matrices are made in blocks of 64.
_MOMENTS_CONFIGS = {
    16: LaunchConfig(num_warps=1, blocks={"BLOCK_N": 32, "BLOCK_D": 16}),
    32: LaunchConfig(num_warps=2, blocks={"BLOCK_N": 64, "BLOCK_D": 32}),
    64: LaunchConfig(num_warps=4, blocks={"BLOCK_N": 64, "BLOCK_D": 64}),
}
_LINEAR_CONFIGS = {
    16: LaunchConfig(num_warps=4, blocks={"BLOCK_N": 256, "BLOCK_D": 16}),
    32: LaunchConfig(num_warps=4, blocks={"BLOCK_N": 128, "BLOCK_D": 32}),
    64: LaunchConfig(num_warps=8, blocks={"BLOCK_N": 32, "BLOCK_D": 64}),
}
_MAX_PROGRAMS = 2112  # 16 for each of 132 multiprocessors; 2.2 MB of partials at 16 channels


def block_d_for(n_channels: int) -> int:
    """The block of channels in which both kernels work."""
    return min(64, max(16, triton.next_power_of_2(n_channels)))


def padded_size(n_channels: int) -> int:
    """`n_channels` rounded up to whole blocks: the size in which centres and matrices are passed to the kernels."""
    block_d = block_d_for(n_channels)
    return -(-n_channels // block_d) * block_d


def padded(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`x` as `dtype`, zero-padded at the end of its last dimensions up to `shape`, contiguous."""
    if shape == x.shape:
        return x.to(dtype).contiguous()
    pad = [p for want, have in zip(reversed(shape), reversed(x.shape), strict=True) for p in (0, want - have)]
    return torch.nn.functional.pad(x.to(dtype), pad).contiguous()


def moments(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (T, D) and scatter (T, D, D) of T tensors of contiguous rows (N, D), in float64; launches T kernels."""
    (n_rows, n_channels), device = tensors[0].shape, tensors[0].device
    config, size = _MOMENTS_CONFIGS[block_d_for(n_channels)], padded_size(n_channels)
    block_n, block_d = config.blocks["BLOCK_N"], config.blocks["BLOCK_D"]
    n_blocks = size // block_d
    split = RowSplit.of(n_rows, block_n, max(1, _MAX_PROGRAMS // n_blocks**2), prefer_even=True)
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
    offset = residual.double() / counts
    program_mean = centre.double() + offset
    mean = (counts * program_mean).sum(1) / n_rows
    apart = program_mean - mean.unsqueeze(1)
    total = scatter.sum(1, dtype=torch.float64)
    total += (counts * apart).transpose(1, 2) @ apart - (counts * offset).transpose(1, 2) @ offset
    return mean[:, :n_channels], total[:, :n_channels, :n_channels]


class LinearOperands(NamedTuple):
    """(x − mean) → constant + linear·(x − mean) for T tensors, as the kernel reads it: padded, rounded."""

    centre: Tensor  # (T, size) fp32
    constant: Tensor  # (T, size) fp32
    linear: Tensor  # (T, size, size) in the rows' dtype, transposed


def linear_operands(mean: Tensor, constant: Tensor | None, linear: Tensor, dtype: torch.dtype) -> LinearOperands:
    """Round mean (T, D), constant (T, D; None: zeros) and linear (T, D, D), all float64, for rows of `dtype`."""
    n_tensors, n_channels = mean.shape
    size, centre = padded_size(n_channels), mean.float()
    # The kernel centres at the rounded mean; the constant takes what rounding left.
    rest = (linear @ (mean - centre.double()).unsqueeze(-1)).squeeze(-1)
    constant = -rest if constant is None else constant - rest
    return LinearOperands(
        padded(centre, (n_tensors, size), torch.float32),
        padded(constant, (n_tensors, size), torch.float32),
        padded(linear.transpose(1, 2), (n_tensors, size, size), dtype),
    )


def subtract_centred_linear(x: Tensor, operands: LinearOperands, t: int, base: Tensor | None, out: Tensor) -> Tensor:
    """out ← base − constant − linear·(x − mean) for contiguous rows x of tensor t; `out` may be `base`; a kernel."""
    n_rows, n_channels = x.shape
    config, size = _LINEAR_CONFIGS[block_d_for(n_channels)], padded_size(n_channels)
    block_n, block_d = config.blocks["BLOCK_N"], config.blocks["BLOCK_D"]
    launch_kernel(
        _centred_linear_kernel,
        (triton.cdiv(n_rows, block_n), size // block_d),
        config,
        x_ptr=x,
        base_ptr=out if base is None else base,
        out_ptr=out,
        centre_ptr=operands.centre[t],
        constant_ptr=operands.constant[t],
        linear_ptr=operands.linear[t],
        n_rows=n_rows,
        D=n_channels,
        N_BLOCKS=size // block_d,
        EVEN_N=n_rows % block_n == 0,
        HAS_BASE=base is not None,
        PRECISION=dot_precision(x.dtype),
    )
    return out


def audit_cases() -> list[AuditCase]:
    """Both kernels at the projected losses' size (D = 16), the largest block and the largest size, fp32 and bf16."""
    n_rows = 64 * 10 * 64 * 64
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        x_type, width = f"*{TRITON_TYPE[dtype]}", dtype.itemsize
        for d in (16, 64, 512):
            size = padded_size(d)
            moments_config, linear_config = _MOMENTS_CONFIGS[block_d_for(d)], _LINEAR_CONFIGS[block_d_for(d)]
            shape: dict[str, Any] = {
                "D": d,
                "N_BLOCKS": size // block_d_for(d),
                "PRECISION": "tf32x3",
                "EVEN_N": True,
            }
            block_n, max_programs = moments_config.blocks["BLOCK_N"], max(1, _MAX_PROGRAMS // shape["N_BLOCKS"] ** 2)
            split = RowSplit.of(n_rows, block_n, max_programs, prefer_even=True)
            fp32 = "*fp32"
            cases += [
                AuditCase(
                    f"moments D={d} {TRITON_TYPE[dtype]}",
                    _moments_kernel,
                    {"x_ptr": x_type, "centre_ptr": fp32, "residual_ptr": fp32, "scatter_ptr": fp32, "n_rows": "i32"},
                    {**shape, **moments_config.blocks, "TILES": split.tiles},
                    moments_config,
                    bytes_moved=n_rows * d * width + split.programs * size * (size + 2) * 4,
                    flops=2 * n_rows * d * d,
                    divisible_by_16=("n_rows",),
                    expects_tensor_cores=True,
                ),
                AuditCase(
                    f"centred_linear D={d} {TRITON_TYPE[dtype]}",
                    _centred_linear_kernel,
                    {
                        "x_ptr": x_type,
                        "base_ptr": x_type,
                        "out_ptr": x_type,
                        "centre_ptr": fp32,
                        "constant_ptr": fp32,
                        "linear_ptr": x_type,
                        "n_rows": "i32",
                    },
                    {**shape, **linear_config.blocks, "HAS_BASE": True, "PRECISION": dot_precision(dtype)},
                    linear_config,
                    bytes_moved=3 * n_rows * d * width,
                    flops=2 * n_rows * d * d,
                    divisible_by_16=("n_rows",),
                    expects_tensor_cores=True,
                ),
            ]
    return cases
