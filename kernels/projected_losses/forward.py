"""The projected losses' forward pass over the activations: moments of r(z), and of its difference to each prediction.

    N rows  D channels  H hidden features;  r = r(z), s a shift near its mean;  Δ = r(z) − r(p)

One launch for z: Σ(r−s)(r−s)ᵀ and Σ(r−s). One for every five predictions: ΣΔΔᵀ of each, with z's activations made
again, which keeps one H×H accumulator in registers instead of 1+K. The programs that share z's rows lie side by side in
the grid, so that z comes from the L2 cache for all of them but one. Programs leave fp32 partials, which are merged in
float64 in one order.
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
    launch_kernel,
)
from fastjepa.kernels.moments.merge import merge_sums
from fastjepa.kernels.moments.tensors import MAX_TENSORS, launches_of, pointers, tensor_of
from fastjepa.kernels.projected_losses.activations import (
    MAX_PROGRAMS,
    Operands,
    block_sizes,
    hidden_activations,
    with_block_d,
)
from fastjepa.kernels.projected_losses.parts import dot_rows, parts_of_rows, sum_of


@triton.jit
def _activation_moments_kernel(  # type: ignore[no-untyped-def]
    z_ptr,  # (n_rows, D)
    p0_ptr, p1_ptr, p2_ptr, p3_ptr, p4_ptr,  # (n_rows, D): predictions; all None: the moments of r(z)
    sums_ptr,  # (predictions or 1, programs, BLOCK_H + 1, BLOCK_H): Σ(r−s)(r−s)ᵀ and Σ(r−s), or ΣΔΔᵀ and 0
    centre_z_ptr,  # (2, BLOCK_D) fp32; this and the next two are z's part of `Operands`
    slope_z_ptr,  # (2, BLOCK_D, BLOCK_H)
    offset_z_ptr,  # (BLOCK_H,) fp32
    centre_p_ptr,  # (predictions, 2, BLOCK_D); this and the next two are theirs, or None
    slope_p_ptr,
    offset_p_ptr,
    shift_ptr,  # (BLOCK_H,) fp32: s; None with predictions
    n_rows,
    zero,  # the integer 0, unknown to the compiler, as in the backward pass: the vectors are read again for each tile
    D: tl.constexpr,
    TILES: tl.constexpr,
    EVEN_N: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1)
    offs_n = pid.to(tl.int64) * (TILES * BLOCK_N) + tl.arange(0, BLOCK_N)
    offs_h = tl.arange(0, BLOCK_H)
    if p0_ptr is None:
        shift = tl.load(shift_ptr + offs_h)
    else:
        k = tl.program_id(0)
        p_ptr = tensor_of(p0_ptr, p1_ptr, p2_ptr, p3_ptr, p4_ptr, k)
        slope_p_ptr += k * (2 * BLOCK_D * BLOCK_H)
    # Each row of a tile keeps its own sum where there are registers for that: cheaper than a reduction per tile.
    ROWS: tl.constexpr = BLOCK_N if BLOCK_H == 64 else 1
    total = tl.zeros([ROWS, BLOCK_H], dtype=tl.float32)
    second = tl.zeros([BLOCK_H, BLOCK_H], dtype=tl.float32)
    for tile in range(TILES):
        reload = tile * zero
        _high, _low, r = hidden_activations(
            z_ptr, centre_z_ptr + reload, slope_z_ptr, offset_z_ptr + reload, offs_n, n_rows,
            D, EVEN_N, HALF, BLOCK_N, BLOCK_D, BLOCK_H,
        )  # fmt: skip
        if p0_ptr is None:
            r -= shift[None, :]
        else:
            _high, _low, r_p = hidden_activations(
                p_ptr, centre_p_ptr + (reload + k * 2 * BLOCK_D), slope_p_ptr, offset_p_ptr + (reload + k * BLOCK_H),
                offs_n, n_rows,
                D, EVEN_N, HALF, BLOCK_N, BLOCK_D, BLOCK_H,
            )  # fmt: skip
            r -= r_p
        if not EVEN_N:
            r = tl.where(offs_n[:, None] < n_rows, r, 0.0)
        if p0_ptr is None:
            total += r if ROWS > 1 else tl.sum(r, 0, keep_dims=True)
        high, low = parts_of_rows(r, z_ptr.dtype.element_ty)
        second = dot_rows(high, low, high, low, second, HALF)
        offs_n += BLOCK_N
    partial = pid if p0_ptr is None else tl.program_id(0) * tl.num_programs(1) + pid
    sums_ptr += partial.to(tl.int64) * ((BLOCK_H + 1) * BLOCK_H)
    tl.store(sums_ptr + offs_h[:, None] * BLOCK_H + offs_h[None, :], sum_of(second, HALF))
    tl.store(sums_ptr + BLOCK_H * BLOCK_H + offs_h, tl.sum(total, 0))


# (BLOCK_H, fp32?) → launch config. From the static audit with triton 3.6, 3.7 and 3.9: the largest tiles that stay in
# registers on sm_90.
_CONFIGS = {
    (64, False): LaunchConfig(num_warps=4, blocks={"BLOCK_N": 128, "BLOCK_H": 64}),
    (64, True): LaunchConfig(num_warps=4, blocks={"BLOCK_N": 64, "BLOCK_H": 64}),
    (128, False): LaunchConfig(num_warps=8, blocks={"BLOCK_N": 32, "BLOCK_H": 128}),
    (128, True): LaunchConfig(num_warps=8, blocks={"BLOCK_N": 16, "BLOCK_H": 128}),
}


def activation_moments(tensors: Sequence[Tensor], ops: Operands, shift: Tensor) -> Tensor:
    """Σ(r−s)(r−s)ᵀ of z and ΣΔΔᵀ of each prediction, and below it Σ(r−s) or 0: (T, SIZE_H + 1, SIZE_H) float64.

    From rows (N, D), and of `hidden_affine` the operands and the shift s (SIZE_H,). Launches a kernel for z, one for
    every five predictions, and one that merges.
    """
    (n_rows, n_channels), dtype = tensors[0].shape, tensors[0].dtype
    block_d, block_h = ops.centre.shape[2], ops.offset.shape[1]
    config = with_block_d(_CONFIGS[block_h, dtype == torch.float32], block_d)
    split = RowSplit.of(n_rows, config.blocks["BLOCK_N"], MAX_PROGRAMS, prefer_even=True)
    size = (block_h + 1) * block_h
    sums = torch.empty(len(tensors), split.programs, size, device=shift.device, dtype=torch.float32)
    groups = [slice(some.start + 1, some.stop + 1) for some in launches_of(len(tensors) - 1)]
    for written in (slice(0, 1), *groups):
        predictions = tensors[written] if written.start else []
        launch_kernel(
            _activation_moments_kernel,
            (max(1, len(predictions)), split.programs),
            config,
            z_ptr=tensors[0],
            **pointers("p", predictions),
            sums_ptr=sums[written],
            **ops.pointers("z", 0),
            **ops.pointers("p", written if predictions else None),
            shift_ptr=None if predictions else shift,
            n_rows=n_rows,
            zero=0,
            D=n_channels,
            TILES=split.tiles,
            EVEN_N=split.even,
            HALF=dtype != torch.float32,
        )
    return merge_sums(sums).view(len(tensors), block_h + 1, block_h)


# Bytes per thread, the most over the architectures and the versions of triton, by (BLOCK_H, bf16?).
_ALLOWED_SPILL = {(64, True): 0, (64, False): 80, (128, True): 16, (128, False): 1992}


def audit_cases() -> list[AuditCase]:
    """z alone and z with four predictions, at the default recipe and at the largest sizes, fp32 and bf16."""
    kernel, n_rows, cases = _activation_moments_kernel, 64 * 10 * 64 * 64, []
    predictions = [f"p{i}_ptr" for i in range(MAX_TENSORS)]
    theirs = ["centre_p_ptr", "slope_p_ptr", "offset_p_ptr"]
    for dtype in (torch.float32, torch.bfloat16):
        for d, h in ((16, 64), (64, 128)):
            half = dtype != torch.float32
            block_d, block_h = block_sizes(d, h)
            config = with_block_d(_CONFIGS[block_h, not half], block_d)
            split = RowSplit.of(n_rows, config.blocks["BLOCK_N"], MAX_PROGRAMS, prefer_even=True)
            in_rows_dtype = ("z_ptr", *predictions, "slope_z_ptr", "slope_p_ptr")
            operands = 2 * dtype.itemsize * block_d * block_h + 4 * (2 * block_d + block_h)
            for n in (0, 4):
                absent = [*predictions[n:], *(["shift_ptr"] if n else theirs)]
                hidden = (2 if n else 1) * d * h
                dots = max(1, n) * (2 * hidden + h * h if half else 3 * (hidden + h * h))
                cases.append(
                    AuditCase(
                        name=f"activation_moments/{'pair' if n else 'z'}/{TRITON_TYPE[dtype]}/D={d} H={h}",
                        kernel=kernel,
                        signature=audit_signature(kernel, dtype, in_rows_dtype, absent),
                        constexprs={
                            **dict.fromkeys(absent),
                            "D": d,
                            "TILES": split.tiles,
                            "EVEN_N": split.even,
                            "HALF": half,
                        },
                        config=config,
                        bytes_moved=(1 + n) * (n_rows * d * dtype.itemsize + operands)
                        + 4 * (max(1, n) * split.programs * (block_h + 1) * block_h + (0 if n else block_h)),
                        flops=2 * n_rows * dots,
                        divisible_by_16=("n_rows", "zero"),
                        expects_tensor_cores=True,
                        programs=max(1, n) * split.programs,
                        loop_trips=(split.tiles,),
                        allowed_spill_bytes=_ALLOWED_SPILL[block_h, half],
                        allowed_spill_reason="sm_80 and sm_100 only: tiles are sized for sm_90, where nothing spills",
                    )
                )
    return cases
