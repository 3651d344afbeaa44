"""Pass 2: base − constant − linear·(x − mean) for every row x."""

from __future__ import annotations

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
    audit_signature,
    dot,
    dot_precision,
    launch_kernel,
    load_rows,
    round_to,
)
from fastjepa.kernels.moments.blocks import MAX_D, block_d_for, n_summands, padded, padded_size, summands


@triton.jit
def _centred_linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (n_rows, D)
    base_ptr,  # (n_rows, D), read if HAS_BASE; may be out
    out_ptr,  # (n_rows, D)
    centre_ptr,  # (n_blocks·BLOCK_D,) fp32
    constant_ptr,  # (n_blocks·BLOCK_D,) fp32
    linear_ptr,  # (2 if HALF else 1, n_blocks·BLOCK_D, n_blocks·BLOCK_D) in the dtype of x, transposed: row = input
    n_rows,
    D: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HALF: tl.constexpr,
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
        linear_ptrs = linear_ptr + offs_i[:, None] * SIZE + offs_j[None, :]
        if HALF:
            out = dot(x, tl.load(linear_ptrs + SIZE * SIZE), out, PRECISION)
        out = dot(x, tl.load(linear_ptrs), out, PRECISION)
    if HAS_BASE:
        out += load_rows(base_ptr, offs_n, offs_j, n_rows, D, EVEN_N, EVEN_D).to(tl.float32)
    out = round_to(out, out_ptr.dtype.element_ty)
    ptrs = out_ptr + offs_n[:, None] * D + offs_j[None, :]
    if EVEN_N and EVEN_D:
        tl.store(ptrs, out)
    else:
        tl.store(ptrs, out, mask=(offs_n[:, None] < n_rows) & (offs_j[None, :] < D))


# BLOCK_D → launch config. From the static audit: no spills on sm_80, sm_90 and sm_100.
_CONFIGS = {
    16: LaunchConfig(num_warps=4, blocks={"BLOCK_N": 256, "BLOCK_D": 16}),
    32: LaunchConfig(num_warps=4, blocks={"BLOCK_N": 128, "BLOCK_D": 32}),
    64: LaunchConfig(num_warps=8, blocks={"BLOCK_N": 32, "BLOCK_D": 64}),
}


class LinearOperands(NamedTuple):
    """(x − mean) → constant + linear·(x − mean) for T tensors, as the kernel reads it: padded, rounded."""

    centre: Tensor  # (T, size) fp32
    constant: Tensor  # (T, size) fp32
    linear: Tensor  # (T, 2 or 1, size, size) in the rows' dtype, transposed: a sum of two if that is bf16


def round_operands(mean: Tensor, constant: Tensor | None, linear: Tensor, dtype: torch.dtype) -> LinearOperands:
    """The operands from mean (T, D), constant (T, D; None: zeros) and linear (T, D, D), all float64.

    With `linear` rounded once to bf16, a gradient of 512 channels is off by 0.0088 of its largest entry: more than
    twice eager's error, which is the rounding of the result alone.
    """
    n_tensors, n_channels = mean.shape
    size, centre = padded_size(n_channels), mean.float()
    # The kernel centres at the rounded mean; the constant takes what rounding left.
    rest = (linear @ (mean - centre.double()).unsqueeze(-1)).squeeze(-1)
    constant = -rest if constant is None else constant - rest
    parts = summands(linear.transpose(1, 2), dtype)
    return LinearOperands(
        padded(centre, (n_tensors, size), torch.float32),
        padded(constant, (n_tensors, size), torch.float32),
        padded(torch.stack(parts, 1), (n_tensors, len(parts), size, size), dtype),
    )


def launch_centred_linear(x: Tensor, operands: LinearOperands, t: int, base: Tensor | None, out: Tensor) -> None:
    """out ← base − constant − linear·(x − mean) for contiguous rows x (N, D) of tensor t; `out` may be `base`."""
    n_rows, n_channels = x.shape
    config = _CONFIGS[block_d_for(n_channels)]
    split = RowSplit.one_tile_each(n_rows, config.blocks["BLOCK_N"])
    n_blocks = padded_size(n_channels) // config.blocks["BLOCK_D"]
    launch_kernel(
        _centred_linear_kernel,
        (split.programs, n_blocks),
        config,
        x_ptr=x,
        base_ptr=out if base is None else base,
        out_ptr=out,
        centre_ptr=operands.centre[t],
        constant_ptr=operands.constant[t],
        linear_ptr=operands.linear[t],
        n_rows=n_rows,
        D=n_channels,
        N_BLOCKS=n_blocks,
        EVEN_N=split.even,
        HAS_BASE=base is not None,
        HALF=n_summands(x.dtype) == 2,
        PRECISION=dot_precision(x.dtype),
    )


def audit_cases() -> list[AuditCase]:
    """At the projected losses' size (D = 16), the largest block and the largest size, fp32 and bf16."""
    n_rows, cases = 64 * 10 * 64 * 64, []
    for dtype in (torch.float32, torch.bfloat16):
        for d in (16, 64, MAX_D):
            size = padded_size(d)
            cases.append(
                AuditCase(
                    name=f"centred_linear/{TRITON_TYPE[dtype]}/D={d}",
                    kernel=_centred_linear_kernel,
                    signature=audit_signature(
                        _centred_linear_kernel, dtype, ("x_ptr", "base_ptr", "out_ptr", "linear_ptr")
                    ),
                    constexprs={
                        "D": d,
                        "N_BLOCKS": size // block_d_for(d),
                        "EVEN_N": True,
                        "HAS_BASE": True,
                        "HALF": n_summands(dtype) == 2,
                        "PRECISION": dot_precision(dtype),
                    },
                    config=_CONFIGS[block_d_for(d)],
                    bytes_moved=3 * n_rows * d * dtype.itemsize,
                    flops=2 * n_rows * d * d * n_summands(dtype),
                    divisible_by_16=("n_rows",),
                    expects_tensor_cores=True,
                )
            )
    return cases
