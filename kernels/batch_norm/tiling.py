"""How every BatchNorm kernel cuts channels-last rows into programs, and the launch table.

A channels-last tensor (N, C, H, W) is a matrix of rows (n_rows = N·H·W, C) in memory. One program walks over rows that
follow each other, of a block of channels, one tile (BLOCK_N, BLOCK_C) at a time. The cut depends on the shape and the
dtype alone, never on the GPU, so sums are made in the same order, and give the same bits, everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa.kernels.batch_norm.channel_vectors import ChannelVectors
from fastjepa.kernels.checks import check_tensor
from fastjepa.kernels.launch import LaunchConfig, RowSplit

MAX_CHANNELS = 1024


@dataclass(frozen=True)
class Tiling:
    """`tile_bytes` of each full-size tensor in one tile, and the most programs that the rows are cut into."""

    tile_bytes: int
    max_programs: int
    prefer_even: bool = False  # up to half the programs, if the tiles then divide evenly


# A program has 128 threads, so 4096 tile bytes are two 128-bit loads in flight per thread and tensor. Where sums are
# kept, max_programs is what an H200 holds at once: 132 SMs × the programs that the compiled registers (bf16, in the
# comment) allow on each, rounded down, so that no second wave runs half empty; and at most MAX_PARTIALS.
# Where none are kept, smaller programs even out the end of the launch. Chosen from compiled code, not yet measured.
TILINGS = {
    "statistics": Tiling(tile_bytes=4096, max_programs=896, prefer_even=True),  # 72 registers: 7 per SM
    "forward/plain": Tiling(tile_bytes=8192, max_programs=4096),  # 68
    "forward/residual": Tiling(tile_bytes=8192, max_programs=4096),  # 80; triton 3.9 spills at half the tile
    "forward/normalized_residual": Tiling(tile_bytes=4096, max_programs=4096),  # 74
    "reduce/plain": Tiling(tile_bytes=4096, max_programs=640),  # 93: 5 per SM
    "reduce/residual": Tiling(tile_bytes=4096, max_programs=512),  # 119: 4 per SM
    "reduce/normalized_residual": Tiling(tile_bytes=4096, max_programs=384),  # 164: 3 per SM
    # Of several gradients: half the tile keeps four more loads within the registers.
    "reduce/plain/sum": Tiling(tile_bytes=2048, max_programs=768),  # 80: 6 per SM
    "reduce/residual/sum": Tiling(tile_bytes=2048, max_programs=640),  # 93: 5 per SM
    "reduce/normalized_residual/sum": Tiling(tile_bytes=2048, max_programs=512),  # 127: 4 per SM
    "grad/plain": Tiling(tile_bytes=4096, max_programs=4096),  # 72
    "grad/normalized_residual": Tiling(tile_bytes=4096, max_programs=4096),  # 122
}
MAX_PARTIALS = 1024  # the partials of all programs fit one tile of a merging kernel

# (rows, channels, dtypes) for the static audit: 64 clips × 9 frame pairs of 64×64 maps, as in the default recipe. Wider
# layers (64 channels at 32×32, 128 at 16×16, 256 at 8×8) run the code of 64 channels, a block of 64 at a time.
_AUDITED = (
    (576 * 64 * 64, 16, (torch.bfloat16,)),
    (576 * 64 * 64, 32, (torch.bfloat16, torch.float16, torch.float32)),
    (576 * 64 * 64, 64, (torch.bfloat16,)),
)


def form(residual: object, residual_mean: object) -> str:
    """Which of the three forms of the op this is: the second half of a TILINGS key."""
    return "plain" if residual is None else "residual" if residual_mean is None else "normalized_residual"


@dataclass(frozen=True)
class RowLaunch:
    """A launch over (n_rows, n_channels): a grid of (programs that share the rows, channel blocks)."""

    config: LaunchConfig
    grid: tuple[int, int]
    split: RowSplit
    even: bool  # whole tiles only: nothing needs a mask


def row_launch(key: str, n_rows: int, n_channels: int, dtype: torch.dtype) -> RowLaunch:
    """Cut (n_rows, n_channels) of `dtype` into programs of whole tiles, as TILINGS[key] says.

    A tile is at most 64 channels wide: a whole 128-byte line of bf16. Wider ones would leave the 8×8 maps of the recipe
    too few programs.

    Under torch.compile a size may be a symbol. What a BLOCK_* is made from has to be a number: it is compiled into the
    kernel, and next_power_of_2 of a symbol is an expression that sympy does not get to the end of. int() guards it.
    n_rows may stay a symbol.
    """
    tiling, n_channels = TILINGS[key], int(n_channels)
    block_c = min(triton.next_power_of_2(n_channels), 64)
    block_n = tiling.tile_bytes // (dtype.itemsize * block_c)
    channel_blocks = triton.cdiv(n_channels, block_c)
    max_programs = max(1, tiling.max_programs // channel_blocks)
    split = RowSplit.of(n_rows, block_n, max_programs, prefer_even=tiling.prefer_even)
    config = LaunchConfig(num_warps=4, blocks={"BLOCK_N": block_n, "BLOCK_C": block_c})
    even = bool(tiling.prefer_even and split.even and n_channels % block_c == 0)
    return RowLaunch(config, (split.programs, channel_blocks), split, even)


def merge_config(n_partials: int) -> LaunchConfig:
    """The launch of a kernel that merges the partials of `n_partials` programs: one tile of all of them × 8 channels.

    8 channels of fp32 are one 32-byte sector, the least that a load fetches.
    """
    n_partials = int(n_partials)  # as in row_launch
    blocks = {"BLOCK_P": triton.next_power_of_2(n_partials), "BLOCK_C": 8}
    return LaunchConfig(num_warps=8 if n_partials > 256 else 4, blocks=blocks)


def check_rows(op: str, x: Tensor) -> tuple[int, int]:
    """(n_rows, n_channels) of the row matrix `x`; ValueError or TypeError if the kernels cannot take it."""
    check_tensor(op, "x", x, shape=(None, None), contiguous=True)
    n_rows, n_channels = x.shape
    if not 1 <= n_channels <= MAX_CHANNELS:
        raise ValueError(f"{op}: x has {n_channels} channels; accepted: 1 to {MAX_CHANNELS}")
    if n_rows < 1:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; accepted: at least one row")
    return n_rows, n_channels


def check_inputs(op: str, x: Tensor, tensors: dict[str, Tensor | None], vectors: ChannelVectors) -> tuple[int, int]:
    """(n_rows, n_channels) of `x`; an error naming the argument if one does not fit it.

    `tensors` that are given must be like x. `vectors` that are given have one entry per channel, in fp32 or x's dtype;
    mean and var, and weight and bias, come in pairs.
    """
    n_rows, n_channels = check_rows(op, x)
    for name, tensor in tensors.items():
        if tensor is not None:
            shape = (n_rows, n_channels)
            check_tensor(op, name, tensor, shape=shape, dtypes=(x.dtype,), device=x.device, contiguous=True)
    named = vectors._asdict()
    for name, vector in named.items():
        if vector is not None:
            dtypes = dict.fromkeys((torch.float32, x.dtype))
            check_tensor(op, name, vector, shape=(n_channels,), dtypes=dtypes, device=x.device, contiguous=True)
    for name, partner in _PAIRS:
        if (named[name] is None) != (named[partner] is None):
            raise ValueError(f"{op}: {name} and {partner} must both be given, or both be None")
    return n_rows, n_channels


_PAIRS = (
    ("mean", "var"),
    ("weight", "bias"),
    ("residual_mean", "residual_var"),
    ("residual_weight", "residual_bias"),
)


@triton.jit
def rows_of_program(n_rows, rows_per_program):  # type: ignore[no-untyped-def]
    """(first row, number of rows) of this program. int64, because n_rows · n_channels may exceed 2^31."""
    first_row = tl.program_id(0).to(tl.int64) * rows_per_program
    return first_row, tl.minimum(n_rows - first_row, rows_per_program).to(tl.int32)


@triton.jit
def load_gradient(grad_ptr, grad_stride_n, first_row, offs_n, offs_c, mask):  # type: ignore[no-untyped-def]
    """A tile of a gradient in fp32, from `first_row` (int64) on; its rows may lie in a wider tensor."""
    offs = first_row * grad_stride_n + offs_n[:, None] * grad_stride_n + offs_c[None, :]
    return tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, offs_c, mask_c):  # type: ignore[no-untyped-def]
    """(mean, rstd, scale, bias) of these channels in fp32: BN(x) = (x − mean)·scale + bias with scale = weight·rstd.

    Not folded into x·scale + (bias − mean·scale): that cancels where the mean is large against the deviation.
    """
    mean = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.load(var_ptr + offs_c, mask=mask_c, other=1.0).to(tl.float32) + eps)
    if weight_ptr is not None:
        scale = rstd * tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    else:
        scale = rstd
        bias = tl.zeros_like(mean)
    return mean, rstd, scale, bias


def recipe_cases() -> Iterator[tuple[int, int, torch.dtype]]:
    """(n_rows, n_channels, dtype) of every launch config for the static audit, at the recipe's sizes."""
    for n_rows, n_channels, dtypes in _AUDITED:
        for dtype in dtypes:
            yield n_rows, n_channels, dtype
