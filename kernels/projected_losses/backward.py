"""The projected losses' backward pass over the activations: for z and every prediction Aᵀdy, Σdy and Σdy(x−μ)ᵀ.

    N rows  T = 1+K tensors (t = 0: the state z; t = 1..K: predictions)  D channels  H hidden features

With u_k = c_k·M(r(p_k) − r(z)):  dr(p_k) = u_k,  dr(z) = G(r(z) − r̄) − Σ_k u_k,  dy = dr·[r > 0].
G and c_k·M come from the algebra between the passes. What is written, v = Aᵀdy, is dx before BatchNorm's correction,
which needs the sums that this pass makes; correcting v afterwards costs less than doing this pass twice. Programs leave
fp32 partials, a record for each tensor, which are merged in float64 in one order.
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
from fastjepa.kernels.projected_losses.activations import (
    MAX_PROGRAMS,
    Operands,
    block_sizes,
    hidden_activations,
    with_block_d,
)
from fastjepa.kernels.projected_losses.output_gradients import OutputGradients
from fastjepa.kernels.projected_losses.parts import dot_matrix, n_parts, parts_of_rows, sum_of
from fastjepa.kernels.projected_losses.slope import reduce_slope, total_sums, zero_sums


@triton.jit
def _slope_gradients_kernel(  # type: ignore[no-untyped-def]
    z_ptr, p0_ptr, p1_ptr, p2_ptr, p3_ptr,  # rows (n_rows, D); the first N_PREDICTIONS of p, then None
    vz_ptr, v0_ptr, v1_ptr, v2_ptr, v3_ptr,  # (n_rows, D), written, or None
    sums_ptr,  # (1 + N_PREDICTIONS, programs, BLOCK_H·BLOCK_D + BLOCK_H), z's records first: Σdy(x−μ)ᵀ and Σdy
    centre_z_ptr,  # (2, BLOCK_D) fp32; this and the next two are z's part of `Operands`
    slope_z_ptr,  # (2, BLOCK_D, BLOCK_H)
    offset_z_ptr,  # (BLOCK_H,) fp32
    centre_p_ptr,  # (N_PREDICTIONS, 2, BLOCK_D); this and the next two are the predictions', or None
    slope_p_ptr,
    offset_p_ptr,
    mean_r_ptr,  # (BLOCK_H,) fp32, or None: a later group of predictions
    variance_ptr,  # (parts, BLOCK_H, BLOCK_H) in the dtype of z: G; None with mean_r
    gram_ptr,  # (N_PREDICTIONS, parts, BLOCK_H, BLOCK_H) in the dtype of z: c_k·M, or None
    n_rows,
    zero,  # the integer 0, unknown to the compiler: pointers that depend on it are read again for each tile, which
    # saves the registers that loop-invariant matrices would take
    D: tl.constexpr,
    TILES: tl.constexpr,
    EVEN_N: tl.constexpr,
    N_PREDICTIONS: tl.constexpr,
    FIRST: tl.constexpr,  # this launch adds G(r − r̄) and starts vz; later groups of predictions add to it
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n_programs = tl.num_programs(0)
    SLOPE: tl.constexpr = 2 * BLOCK_D * BLOCK_H
    PART: tl.constexpr = BLOCK_H * BLOCK_H
    offs_n = pid.to(tl.int64) * (TILES * BLOCK_N) + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_h = tl.arange(0, BLOCK_H)
    offs_hh = offs_h[:, None] + offs_h[None, :] * BLOCK_H  # G and M are symmetric; the summed index is the adjacent one
    offs_hd = offs_h[:, None] * BLOCK_D + offs_d[None, :]
    sz = zero_sums(BLOCK_N, BLOCK_H)
    s0 = zero_sums(BLOCK_N, BLOCK_H)
    s1 = zero_sums(BLOCK_N, BLOCK_H)
    s2 = zero_sums(BLOCK_N, BLOCK_H)
    s3 = zero_sums(BLOCK_N, BLOCK_H)
    qz = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    q0 = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    q1 = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    q2 = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    q3 = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    for tile in range(TILES):
        reload = tile * zero
        z_high, z_low, r_z = hidden_activations(
            z_ptr, centre_z_ptr + reload, slope_z_ptr + reload, offset_z_ptr + reload, offs_n, n_rows,
            D, EVEN_N, HALF, BLOCK_N, BLOCK_D, BLOCK_H,
        )  # fmt: skip
        dr_z = tl.zeros([BLOCK_N, BLOCK_H], dtype=tl.float32)
        for k in tl.static_range(N_PREDICTIONS):
            if k == 0:
                p_ptr, v_ptr, s, q = p0_ptr, v0_ptr, s0, q0
            elif k == 1:
                p_ptr, v_ptr, s, q = p1_ptr, v1_ptr, s1, q1
            elif k == 2:
                p_ptr, v_ptr, s, q = p2_ptr, v2_ptr, s2, q2
            else:
                p_ptr, v_ptr, s, q = p3_ptr, v3_ptr, s3, q3
            slope_k_ptr = slope_p_ptr + (reload + k * SLOPE)
            p_high, p_low, r = hidden_activations(
                p_ptr, centre_p_ptr + (reload + k * 2 * BLOCK_D), slope_k_ptr,
                offset_p_ptr + (reload + k * BLOCK_H), offs_n, n_rows,
                D, EVEN_N, HALF, BLOCK_N, BLOCK_D, BLOCK_H,
            )  # fmt: skip
            high, low = parts_of_rows(r - r_z, z_ptr.dtype.element_ty)
            gram_ptrs = gram_ptr + (reload + k * (1 if HALF else 2) * PART) + offs_hh
            u = dot_matrix(high, low, gram_ptrs, PART, tl.zeros([BLOCK_N, BLOCK_H], dtype=tl.float32), HALF)
            dr_z -= u
            active = r > 0.0
            if not EVEN_N:
                active = active & (offs_n[:, None] < n_rows)
            dy = tl.where(active, u, 0.0)
            s, q = reduce_slope(
                dy, p_high, p_low, slope_k_ptr, v_ptr, s, q, offs_n, n_rows,
                D, EVEN_N, HALF, False, BLOCK_N, BLOCK_D, BLOCK_H,
            )  # fmt: skip
            if k == 0:
                s0, q0 = s, q
            elif k == 1:
                s1, q1 = s, q
            elif k == 2:
                s2, q2 = s, q
            else:
                s3, q3 = s, q
        if FIRST:  # last, so that what it reads is not alive beside a prediction's hidden features
            apart = r_z - tl.load(mean_r_ptr + reload + offs_h)[None, :]
            high, low = parts_of_rows(apart, z_ptr.dtype.element_ty)
            dr_z = dot_matrix(high, low, variance_ptr + reload + offs_hh, PART, dr_z, HALF)
        active = r_z > 0.0
        if not EVEN_N:
            active = active & (offs_n[:, None] < n_rows)
        dy = tl.where(active, dr_z, 0.0)
        sz, qz = reduce_slope(
            dy, z_high, z_low, slope_z_ptr + reload, vz_ptr, sz, qz, offs_n, n_rows,
            D, EVEN_N, HALF, not FIRST, BLOCK_N, BLOCK_D, BLOCK_H,
        )  # fmt: skip
        offs_n += BLOCK_N
    for t in tl.static_range(1 + N_PREDICTIONS):
        if t == 0:
            s, q = sz, qz
        elif t == 1:
            s, q = s0, q0
        elif t == 2:
            s, q = s1, q1
        elif t == 3:
            s, q = s2, q2
        else:
            s, q = s3, q3
        record_ptr = sums_ptr + (t * n_programs + pid).to(tl.int64) * (BLOCK_H * BLOCK_D + BLOCK_H)
        tl.store(record_ptr + BLOCK_H * BLOCK_D + offs_h, total_sums(s, HALF, BLOCK_N))
        tl.store(record_ptr + offs_hd, sum_of(q, HALF))


# (BLOCK_H, fp32?) → launch config, and the number of predictions that one launch takes (at most 4). More take several
# launches, each of which recomputes r(z) and adds to v of z in fp32. From the audit with triton 3.6, 3.7 and 3.9: the
# largest tiles that spill little. fp32 holds every operand twice, so it takes one prediction at a time; 64 rows spill
# 684 bytes, and need too much of sm_100's tensor memory. So do four bf16 predictions, which spill 296 bytes on sm_90;
# three spill 256 bytes on sm_80, and four predictions take two launches all the same.
_CONFIGS = {
    (64, False): (LaunchConfig(num_warps=4, blocks={"BLOCK_N": 64, "BLOCK_H": 64}), 2),
    (64, True): (LaunchConfig(num_warps=4, blocks={"BLOCK_N": 32, "BLOCK_H": 64}), 1),
    (128, False): (LaunchConfig(num_warps=8, blocks={"BLOCK_N": 32, "BLOCK_H": 128}), 1),
    (128, True): (LaunchConfig(num_warps=8, blocks={"BLOCK_N": 16, "BLOCK_H": 128}), 1),
}
# Bytes per thread, the most over sm_80, sm_90, sm_100 and the versions of triton, by (BLOCK_H, bf16?).
_ALLOWED_SPILL = {(64, True): 128, (64, False): 88, (128, True): 92, (128, False): 432}
_SPILL_REASON = (
    "one sum Σdy(x−μ)ᵀ per tensor stays in registers. At 64 features nothing spills on sm_90, but 68 bytes in fp32 by "
    "triton 3.9; one launch for each bf16 prediction would spill nowhere, and move 2.4 GB instead of 1.4 at the recipe"
)
_POINTERS = 4  # predictions that the kernel's signature has room for


def group_size(block_h: int, dtype: torch.dtype) -> int:
    """How many predictions of `dtype` a launch takes."""
    return _CONFIGS[block_h, dtype == torch.float32][1]


def slope_gradients(
    tensors: Sequence[Tensor], ops: Operands, mean_r: Tensor, out: OutputGradients
) -> tuple[list[Tensor], Tensor]:
    """Aᵀdy of every tensor (N, D), and the sums over their rows: (records, SIZE_H·BLOCK_D + SIZE_H) float64.

    Launches a kernel for each group of predictions, or one where there are none, and one that merges. Each launch
    leaves a record of z, then one of each of its predictions; the kernel says what is in it. Aᵀdy has the dtype of the
    rows, except that of z where several launches add to it: fp32.
    """
    z, predictions = tensors[0], tensors[1:]
    (n_rows, n_channels), dtype = z.shape, z.dtype
    block_d, block_h = ops.centre.shape[2], ops.offset.shape[1]
    entry, group = _CONFIGS[block_h, dtype == torch.float32]
    config = with_block_d(entry, block_d)
    split = RowSplit.of(n_rows, config.blocks["BLOCK_N"], MAX_PROGRAMS, prefer_even=True)
    results = [torch.empty_like(z, dtype=torch.float32 if len(predictions) > group else dtype)]
    results += [torch.empty_like(p) for p in predictions]
    starts = range(0, max(1, len(predictions)), group)
    size = block_h * block_d + block_h
    sums = torch.empty(len(predictions) + len(starts), split.programs, size, device=z.device, dtype=torch.float32)
    for launch, start in enumerate(starts):
        some = slice(start + 1, min(start + group, len(predictions)) + 1)
        n = len(tensors[some])
        launch_kernel(
            _slope_gradients_kernel,
            (split.programs,),
            config,
            z_ptr=z,
            **{f"p{k}_ptr": tensors[start + 1 + k] if k < n else None for k in range(_POINTERS)},
            vz_ptr=results[0],
            **{f"v{k}_ptr": results[start + 1 + k] if k < n else None for k in range(_POINTERS)},
            sums_ptr=sums[start + launch : start + launch + 1 + n],
            **ops.pointers("z", 0),
            **ops.pointers("p", some if n else None),
            mean_r_ptr=None if start else mean_r,
            variance_ptr=None if start else out.variance,
            gram_ptr=None if out.gram is None else out.gram[start : start + n],
            n_rows=n_rows,
            zero=0,
            D=n_channels,
            TILES=split.tiles,
            EVEN_N=split.even,
            N_PREDICTIONS=n,
            FIRST=start == 0,
            HALF=dtype != torch.float32,
        )
    return results, merge_sums(sums)


def audit_cases() -> list[AuditCase]:
    """No prediction, one group of them, and a later group, at the default recipe and at the largest sizes."""
    kernel, n_rows, cases = _slope_gradients_kernel, 64 * 10 * 64 * 64, []
    theirs = ["centre_p_ptr", "slope_p_ptr", "offset_p_ptr", "gram_ptr"]
    for dtype in (torch.float32, torch.bfloat16):
        for d, h, k, first in ((16, 64, 2, True), (16, 64, 0, True), (16, 64, 2, False), (64, 128, 1, True)):
            half, (block_d, block_h) = dtype != torch.float32, block_sizes(d, h)
            entry, group = _CONFIGS[block_h, not half]
            config, k = with_block_d(entry, block_d), min(k, group)
            split = RowSplit.of(n_rows, config.blocks["BLOCK_N"], MAX_PROGRAMS, prefer_even=True)
            in_rows_dtype = ["slope_z_ptr", "slope_p_ptr", "variance_ptr", "gram_ptr", "z_ptr"]
            in_rows_dtype += [f"{name}{i}_ptr" for name in ("p", "v") for i in range(_POINTERS)]
            # Of several groups, z's gradient is in fp32. Of these cases those are the first two and the last.
            wide = not first or (d == 16 and k > 0)
            in_rows_dtype += [] if wide else ["vz_ptr"]
            absent = [f"{name}{i}_ptr" for name in ("p", "v") for i in range(k, _POINTERS)]
            absent += [*(theirs if k == 0 else []), *([] if first else ["mean_r_ptr", "variance_ptr"])]
            rows = n_rows * d * ((2 * k + 1) * dtype.itemsize + (4 if wide else dtype.itemsize))
            small = (1 + k) * (4 * (2 * block_d + block_h) + 2 * dtype.itemsize * block_d * block_h)
            small += (int(first) + k) * n_parts(dtype) * block_h**2 * dtype.itemsize + 4 * block_h * first
            dots = (k + 1) * (4 * d * h + h * h if half else 3 * (3 * d * h + h * h))
            cases.append(
                AuditCase(
                    name=f"slope_gradients/K={k}{'' if first else ' more'}/{TRITON_TYPE[dtype]}/D={d} H={h}",
                    kernel=kernel,
                    signature=audit_signature(kernel, dtype, in_rows_dtype, absent),
                    constexprs={
                        **dict.fromkeys(absent),
                        "D": d,
                        "TILES": split.tiles,
                        "EVEN_N": split.even,
                        "N_PREDICTIONS": k,
                        "FIRST": first,
                        "HALF": half,
                    },
                    config=config,
                    bytes_moved=rows + small + (k + 1) * split.programs * block_h * (block_d + 1) * 4,
                    flops=2 * n_rows * (dots if first else dots - (1 if half else 3) * h * h),
                    divisible_by_16=("n_rows", "zero"),
                    expects_tensor_cores=True,
                    programs=split.programs,
                    loop_trips=(split.tiles,),
                    allowed_spill_bytes=_ALLOWED_SPILL[block_h, half],
                    allowed_spill_reason=_SPILL_REASON,
                )
            )
    return cases
