"""Pass 2: base − constant − linear·(x − mean) for every row x, of several tensors in one launch."""

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
    audit_signature,
    dot,
    dot_precision,
    launch_kernel,
    load_rows,
    round_to,
)
from fastjepa.kernels.moments.blocks import MAX_D, block_d_for, n_summands, padded, padded_size, summands
from fastjepa.kernels.moments.tensors import MAX_TENSORS, launches_of, pointers, tensor_of


@triton.jit
def load_base(  # type: ignore[no-untyped-def]
    base0_ptr, base1_ptr, base2_ptr, base3_ptr, base4_ptr,  # as in the kernel
    t,
    offs_n,
    offs_j,
    n_rows,
    D: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_D: tl.constexpr,
):  # fmt: skip
    """The tile of tensor t's base in fp32; 0 where there is none."""
    if base0_ptr is None:
        base = 0.0
    elif base1_ptr is None:
        base = load_rows(base0_ptr, offs_n, offs_j, n_rows, D, EVEN_N, EVEN_D).to(tl.float32)
    else:
        if t == 0:
            base = load_rows(base0_ptr, offs_n, offs_j, n_rows, D, EVEN_N, EVEN_D).to(tl.float32)
        else:
            base_ptr = tensor_of(base1_ptr, base1_ptr, base2_ptr, base3_ptr, base4_ptr, t)
            base = load_rows(base_ptr, offs_n, offs_j, n_rows, D, EVEN_N, EVEN_D).to(tl.float32)
    return base


@triton.jit
def _centred_linear_kernel(  # type: ignore[no-untyped-def]
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr,  # (n_rows, D), or None
    base0_ptr, base1_ptr, base2_ptr, base3_ptr, base4_ptr,  # (n_rows, D), or None; the first may have another dtype
    out0_ptr, out1_ptr, out2_ptr, out3_ptr, out4_ptr,  # (n_rows, D), or None; may be the base
    centre_ptr,  # (tensors, n_blocks·BLOCK_D) fp32
    constant_ptr,  # (tensors, n_blocks·BLOCK_D) fp32
    linear_ptr,  # (tensors, 2 if HALF else 1, n_blocks·BLOCK_D, n_blocks·BLOCK_D) in x's dtype, transposed: row = input
    n_rows,
    D: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    EVEN_N: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,  # channels of x at a time; divides BLOCK_D
):  # fmt: skip
    t = tl.program_id(2)
    EVEN_D: tl.constexpr = D == N_BLOCKS * BLOCK_D
    SIZE: tl.constexpr = N_BLOCKS * BLOCK_D
    x_ptr = tensor_of(x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, t)
    out_ptr = tensor_of(out0_ptr, out1_ptr, out2_ptr, out3_ptr, out4_ptr, t)
    centre_ptr += t * SIZE
    constant_ptr += t * SIZE
    linear_ptr += t * ((2 if HALF else 1) * SIZE * SIZE)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_j = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if N_BLOCKS == 1:  # loaded first, so that it is on its way while the product is made
        base = load_base(
            base0_ptr, base1_ptr, base2_ptr, base3_ptr, base4_ptr, t, offs_n, offs_j, n_rows, D, EVEN_N, EVEN_D
        )
    out = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32) - tl.load(constant_ptr + offs_j)[None, :]
    for block_i in range(SIZE // BLOCK_I):
        offs_i = block_i * BLOCK_I + tl.arange(0, BLOCK_I)
        x = load_rows(x_ptr, offs_n, offs_i, n_rows, D, EVEN_N, EVEN_D).to(tl.float32)
        x = round_to(tl.load(centre_ptr + offs_i)[None, :] - x, x_ptr.dtype.element_ty)
        linear_ptrs = linear_ptr + offs_i[:, None] * SIZE + offs_j[None, :]
        if HALF:
            out = dot(x, tl.load(linear_ptrs + SIZE * SIZE), out, PRECISION)
        out = dot(x, tl.load(linear_ptrs), out, PRECISION)
    if N_BLOCKS > 1:  # last: the products take longer than its load, and the registers
        base = load_base(
            base0_ptr, base1_ptr, base2_ptr, base3_ptr, base4_ptr, t, offs_n, offs_j, n_rows, D, EVEN_N, EVEN_D
        )
    out += base
    out = round_to(out, out_ptr.dtype.element_ty)
    ptrs = out_ptr + offs_n[:, None] * D + offs_j[None, :]
    if EVEN_N and EVEN_D:
        tl.store(ptrs, out)
    else:
        tl.store(ptrs, out, mask=(offs_n[:, None] < n_rows) & (offs_j[None, :] < D))


def _config(block_n: int, block_d: int, block_i: int, num_warps: int) -> LaunchConfig:
    return LaunchConfig(num_warps, blocks={"BLOCK_N": block_n, "BLOCK_D": block_d, "BLOCK_I": block_i})


# (BLOCK_D, fp32?) → launch config. From the static audit: no spills on sm_80, sm_90 and sm_100. At least 64 rows, since
# Hopper's large matrix instructions take no fewer. "tf32x3" holds every operand twice: 64×64 would spill on sm_80.
_CONFIGS = {
    (16, False): _config(256, 16, 16, num_warps=4),
    (16, True): _config(256, 16, 16, num_warps=4),
    (32, False): _config(128, 32, 32, num_warps=4),
    (32, True): _config(128, 32, 32, num_warps=4),
    (64, False): _config(128, 64, 64, num_warps=8),
    (64, True): _config(128, 64, 32, num_warps=8),
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


def launch_centred_linear(
    tensors: Sequence[Tensor], operands: LinearOperands, bases: Sequence[Tensor] | None, outs: Sequence[Tensor]
) -> None:
    """out ← base − constant − linear·(x − mean) for contiguous rows x (N, D) of each tensor; `outs` may be `bases`.

    `MAX_TENSORS` in each launch. The first base may have another dtype than the others; so may the only out.
    """
    n_rows, n_channels = tensors[0].shape
    config = _CONFIGS[block_d_for(n_channels), tensors[0].dtype == torch.float32]
    split = RowSplit.one_tile_each(n_rows, config.blocks["BLOCK_N"])
    n_blocks = padded_size(n_channels) // config.blocks["BLOCK_D"]
    for some in launches_of(len(tensors)):
        launch_kernel(
            _centred_linear_kernel,
            (split.programs, n_blocks, len(tensors[some])),
            config,
            **pointers("x", tensors[some]),
            **pointers("base", [] if bases is None else bases[some]),
            **pointers("out", outs[some]),
            centre_ptr=operands.centre[some],
            constant_ptr=operands.constant[some],
            linear_ptr=operands.linear[some],
            n_rows=n_rows,
            D=n_channels,
            N_BLOCKS=n_blocks,
            EVEN_N=split.even,
            HALF=n_summands(tensors[0].dtype) == 2,
            PRECISION=dot_precision(tensors[0].dtype),
        )


def audit_cases() -> list[AuditCase]:
    """A state and four predictions at the projected losses' size (D = 16), and one tensor of up to the largest size.

    Of bf16 rows with the state's base in fp32, as several groups of predictions leave it.
    """
    n_rows, cases = 64 * 10 * 64 * 64, []
    for dtype in (torch.float32, torch.bfloat16):
        for d, n_tensors in ((16, MAX_TENSORS), (64, MAX_TENSORS), (MAX_D, 1)):
            size, config = padded_size(d), _CONFIGS[block_d_for(d), dtype == torch.float32]
            n_blocks = size // config.blocks["BLOCK_D"]
            names = [(f"x{i}_ptr", f"base{i}_ptr", f"out{i}_ptr") for i in range(MAX_TENSORS)]
            absent = [name for triple in names[n_tensors:] for name in triple]
            in_rows_dtype = {name for triple in names for name in triple} | {"linear_ptr"}
            wide_base = n_tensors > 1
            signature = audit_signature(
                _centred_linear_kernel, dtype, in_rows_dtype - ({"base0_ptr"} if wide_base else set()), absent
            )
            n_moved = 3 * n_tensors * dtype.itemsize + (4 - dtype.itemsize if wide_base else 0)
            cases.append(
                AuditCase(
                    name=f"centred_linear/{TRITON_TYPE[dtype]}/D={d}",
                    kernel=_centred_linear_kernel,
                    signature=signature,
                    constexprs={
                        **dict.fromkeys(absent),
                        "D": d,
                        "N_BLOCKS": n_blocks,
                        "EVEN_N": True,
                        "HALF": n_summands(dtype) == 2,
                        "PRECISION": dot_precision(dtype),
                    },
                    config=config,
                    bytes_moved=n_moved * n_rows * d
                    + n_tensors * size * (size * n_summands(dtype) * dtype.itemsize + 8),
                    flops=2 * n_tensors * n_rows * d * d * n_summands(dtype),
                    divisible_by_16=("n_rows",),
                    expects_tensor_cores=True,
                    programs=-(-n_rows // config.blocks["BLOCK_N"]) * n_blocks * n_tensors,
                    loop_trips=(size // config.blocks["BLOCK_I"],),
                )
            )
    return cases
