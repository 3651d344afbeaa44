"""The projected losses' backward pass over the activations: Aᵀdy of z and of every prediction, and Σdy and Σdy(x−μ)ᵀ.

    N rows  T = 1+K tensors (t = 0: the state z; t = 1..K: predictions)  D channels  H hidden features

With u_k = M·c_k(r(p_k) − r(z)):  dr(p_k) = u_k,  dr(z) = G(r(z) − r̄) − Σ_k u_k,  dy = dr·[r > 0].
G, M and c come from the algebra between the passes. What is written, v = Aᵀdy, is dx before BatchNorm's correction,
which needs the sums that this pass makes; correcting v afterwards costs less than doing this pass twice. Programs leave
fp32 partials, which are added in float64 in one order.
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
    dot_precision,
    launch_kernel,
    round_to,
)
from fastjepa.kernels.moments.blocks import padded
from fastjepa.kernels.projected_losses.activations import (
    MAX_PROGRAMS,
    Operands,
    block_sizes,
    hidden_activations,
    with_block_d,
)
from fastjepa.kernels.projected_losses.algebra import OutputGradients
from fastjepa.kernels.projected_losses.slope import reduce_slope


@triton.jit
def _slope_gradients_kernel(  # type: ignore[no-untyped-def]
    z_ptr, p0_ptr, p1_ptr, p2_ptr, p3_ptr,  # rows (n_rows, D); the first N_PREDICTIONS of p are read
    vz_ptr, v0_ptr, v1_ptr, v2_ptr, v3_ptr,  # (n_rows, D), written
    centre_ptr,  # (1 + N_PREDICTIONS, 2, BLOCK_D) fp32; z is row 0 here and below
    slope_ptr,  # (1 + N_PREDICTIONS, 2 if HALF else 1, BLOCK_D, BLOCK_H)
    offset_ptr,  # (1 + N_PREDICTIONS, BLOCK_H) fp32
    mean_r_ptr,  # (BLOCK_H,) fp32
    variance_ptr,  # (BLOCK_H, BLOCK_H) in the dtype of z: G, read if FIRST
    gram_ptr,  # (BLOCK_H, BLOCK_H) in the dtype of z: M
    coefficient_ptr,  # (N_PREDICTIONS,) fp32: c
    sum_dy_ptr,  # (programs, BLOCK_H): over all tensors
    dy_x_ptr,  # (1 + N_PREDICTIONS, programs, BLOCK_H, BLOCK_D)
    slope_sum_ptr,  # (1 + N_PREDICTIONS, programs, BLOCK_D)
    n_rows,
    zero,  # the integer 0, unknown to the compiler: pointers that depend on it are read again for each tile, which
    # saves the registers that loop-invariant matrices would take
    D: tl.constexpr,
    TILES: tl.constexpr,
    EVEN_N: tl.constexpr,
    N_PREDICTIONS: tl.constexpr,
    FIRST: tl.constexpr,  # this launch adds G(r − r̄) and starts vz; later groups of predictions add to it
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n_programs = tl.num_programs(0)
    SLOPE: tl.constexpr = (2 if HALF else 1) * BLOCK_D * BLOCK_H
    offs_n = pid.to(tl.int64) * (TILES * BLOCK_N) + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_h = tl.arange(0, BLOCK_H)
    offs_hh = offs_h[:, None] * BLOCK_H + offs_h[None, :]
    offs_hd = offs_h[:, None] * BLOCK_D + offs_d[None, :]
    sum_dy = tl.zeros([16, BLOCK_H], dtype=tl.float32)  # a dot with 16 rows of ones: cheaper than a reduction per tile
    sz = tl.zeros([BLOCK_D], dtype=tl.float32)
    s0 = tl.zeros([BLOCK_D], dtype=tl.float32)
    s1 = tl.zeros([BLOCK_D], dtype=tl.float32)
    s2 = tl.zeros([BLOCK_D], dtype=tl.float32)
    s3 = tl.zeros([BLOCK_D], dtype=tl.float32)
    qz = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    q0 = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    q1 = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    q2 = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    q3 = tl.zeros([BLOCK_H, BLOCK_D], dtype=tl.float32)
    for tile in range(TILES):
        reload = tile * zero
        z, r_z = hidden_activations(
            z_ptr, centre_ptr + reload, slope_ptr + reload, offset_ptr + reload, offs_n, n_rows,
            D, EVEN_N, HALF, PRECISION, BLOCK_N, BLOCK_D, BLOCK_H,
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
            slope_p_ptr = slope_ptr + (reload + (k + 1) * SLOPE)
            p, r = hidden_activations(
                p_ptr, centre_ptr + (reload + (k + 1) * 2 * BLOCK_D), slope_p_ptr,
                offset_ptr + (reload + (k + 1) * BLOCK_H), offs_n, n_rows,
                D, EVEN_N, HALF, PRECISION, BLOCK_N, BLOCK_D, BLOCK_H,
            )  # fmt: skip
            c = tl.load(coefficient_ptr + k)
            delta = round_to(c * (r - r_z), z_ptr.dtype.element_ty)
            u = dot(
                delta, tl.load(gram_ptr + reload + offs_hh), tl.zeros([BLOCK_N, BLOCK_H], dtype=tl.float32), PRECISION
            )
            dr_z -= u
            active = r > 0.0
            if not EVEN_N:
                active = active & (offs_n[:, None] < n_rows)
            dy = tl.where(active, u, 0.0)
            sum_dy, q, s = reduce_slope(
                dy, p, slope_p_ptr, v_ptr, sum_dy, q, s, offs_n, n_rows,
                D, EVEN_N, HALF, False, PRECISION, BLOCK_N, BLOCK_D, BLOCK_H,
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
            apart = round_to(r_z - tl.load(mean_r_ptr + reload + offs_h)[None, :], z_ptr.dtype.element_ty)
            dr_z = dot(apart, tl.load(variance_ptr + reload + offs_hh), dr_z, PRECISION)
        active = r_z > 0.0
        if not EVEN_N:
            active = active & (offs_n[:, None] < n_rows)
        dy = tl.where(active, dr_z, 0.0)
        sum_dy, qz, sz = reduce_slope(
            dy, z, slope_ptr + reload, vz_ptr, sum_dy, qz, sz, offs_n, n_rows,
            D, EVEN_N, HALF, not FIRST, PRECISION, BLOCK_N, BLOCK_D, BLOCK_H,
        )  # fmt: skip
        offs_n += BLOCK_N
    tl.store(sum_dy_ptr + pid * BLOCK_H + offs_h, tl.sum(sum_dy, 0) * 0.0625)  # of 16 equal rows
    tl.store(slope_sum_ptr + pid * BLOCK_D + offs_d, sz)
    tl.store(dy_x_ptr + pid * BLOCK_H * BLOCK_D + offs_hd, qz)
    for k in tl.static_range(N_PREDICTIONS):
        if k == 0:
            s, q = s0, q0
        elif k == 1:
            s, q = s1, q1
        elif k == 2:
            s, q = s2, q2
        else:
            s, q = s3, q3
        partial = (k + 1) * n_programs + pid
        tl.store(slope_sum_ptr + partial * BLOCK_D + offs_d, s)
        tl.store(dy_x_ptr + partial * BLOCK_H * BLOCK_D + offs_hd, q)


# (BLOCK_H, fp32?) → launch config, and the number of predictions that one launch takes (at most 4). More take several
# launches, each of which recomputes r(z) and adds to v of z in fp32. From the audit with triton 3.6, 3.7 and 3.9:
# the largest tiles that spill little. "tf32x3" holds every operand twice, so fp32 takes one prediction at a time, and
# 32 rows would spill up to 180 bytes at 64 features. Four bf16 predictions spill 620 bytes on sm_100, and need 608 of
# its 512 tensor-memory columns with triton 3.6; three spill 332 bytes on sm_80, and four predictions take two launches
# all the same.
_CONFIGS = {
    (64, False): (LaunchConfig(num_warps=4, blocks={"BLOCK_N": 64, "BLOCK_H": 64}), 2),
    (64, True): (LaunchConfig(num_warps=4, blocks={"BLOCK_N": 16, "BLOCK_H": 64}), 1),
    (128, False): (LaunchConfig(num_warps=8, blocks={"BLOCK_N": 32, "BLOCK_H": 128}), 1),
    (128, True): (LaunchConfig(num_warps=8, blocks={"BLOCK_N": 16, "BLOCK_H": 128}), 1),
}
# Bytes per thread, the most over sm_80, sm_90, sm_100 and the versions of triton, by (BLOCK_H, bf16?).
_ALLOWED_SPILL = {(64, True): 148, (64, False): 8, (128, True): 56, (128, False): 672}
_SPILL_REASON = (
    "one sum Σdy(x−μ)ᵀ per tensor stays in registers. At 64 features without predictions, or with one in bf16, nothing "
    "spills; but one launch for each prediction would move 2.4 GB instead of 1.4 at the default recipe"
)
_POINTERS = 4  # predictions that the kernel's signature has room for


def slope_gradients(
    tensors: Sequence[Tensor], ops: Operands, mean_r: Tensor, out: OutputGradients
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Aᵀdy of every tensor (N, D); in float64 Σdy over all of them (H,), Σdy(x−μ)ᵀ (T, H, D) and ΣAᵀdy (T, D).

    Launches one kernel for each group of predictions, and one where there are none. Aᵀdy has the dtype of the rows,
    except that of z where several launches add to it: fp32.
    """
    z, predictions = tensors[0], tensors[1:]
    n_rows, n_channels = z.shape
    n_hidden, dtype = mean_r.shape[0], z.dtype
    block_d, block_h = ops.centre.shape[2], ops.offset.shape[1]
    entry, group_size = _CONFIGS[block_h, dtype == torch.float32]
    config = with_block_d(entry, block_d)
    split = RowSplit.of(n_rows, config.blocks["BLOCK_N"], MAX_PROGRAMS, prefer_even=True)
    results = [torch.empty_like(z, dtype=torch.float32 if len(predictions) > group_size else dtype)]
    results += [torch.empty_like(p) for p in predictions]
    variance, gram = (padded(m, (block_h, block_h), dtype) for m in (out.variance, out.gram))
    coefficients = out.prediction.float()
    sum_dys, products, slope_sums = [], [], []
    for start in range(0, max(1, len(predictions)), group_size):
        group = list(range(start + 1, min(start + group_size, len(predictions)) + 1))
        index = [0, *group]
        places = group + [0] * (_POINTERS - len(group))  # z stands in where there is no further prediction
        sum_dy = torch.empty(split.programs, block_h, device=z.device, dtype=torch.float32)
        slope_sum = torch.empty(len(index), split.programs, block_d, device=z.device, dtype=torch.float32)
        dy_x = torch.empty(len(index), split.programs, block_h, block_d, device=z.device, dtype=torch.float32)
        coefficient = coefficients[start : start + group_size] if group else mean_r.new_zeros(1, dtype=torch.float32)
        launch_kernel(
            _slope_gradients_kernel,
            (split.programs,),
            config,
            z_ptr=z,
            **{f"p{k}_ptr": tensors[t] for k, t in enumerate(places)},
            vz_ptr=results[0],
            **{f"v{k}_ptr": results[t] if t else z for k, t in enumerate(places)},
            centre_ptr=_rows_of(ops.centre, index),
            slope_ptr=_rows_of(ops.slope, index),
            offset_ptr=_rows_of(ops.offset, index),
            mean_r_ptr=padded(mean_r, (block_h,), torch.float32),
            variance_ptr=variance,
            gram_ptr=gram,
            coefficient_ptr=coefficient,
            sum_dy_ptr=sum_dy,
            dy_x_ptr=dy_x,
            slope_sum_ptr=slope_sum,
            n_rows=n_rows,
            zero=0,
            D=n_channels,
            TILES=split.tiles,
            EVEN_N=split.even,
            N_PREDICTIONS=len(group),
            FIRST=start == 0,
            HALF=dtype != torch.float32,
            PRECISION=dot_precision(tensors[0].dtype),
        )
        sum_dys.append(sum_dy.sum(0, dtype=torch.float64)[:n_hidden])
        slope_sums.append(slope_sum.sum(1, dtype=torch.float64)[:, :n_channels])
        products.append(dy_x.sum(1, dtype=torch.float64)[:, :n_hidden, :n_channels])
    return results, torch.stack(sum_dys).sum(0), _joined(products), _joined(slope_sums)


def _joined(groups: list[Tensor]) -> Tensor:
    """Each group's sums, z first → z's sum over the groups, then every prediction's."""
    return torch.cat([torch.stack([g[:1] for g in groups]).sum(0), *(g[1:] for g in groups)])


def _rows_of(x: Tensor, index: list[int]) -> Tensor:
    """x[index]; x itself if that is all of it."""
    return x if len(index) == x.shape[0] else torch.stack([x[t] for t in index])


def audit_cases() -> list[AuditCase]:
    """No prediction, one group of them, and a later group, at the default recipe and at the largest sizes."""
    n_rows, cases = 64 * 10 * 64 * 64, []
    for dtype in (torch.float32, torch.bfloat16):
        for d, h, k, first in ((16, 64, 2, True), (16, 64, 0, True), (16, 64, 2, False), (64, 128, 1, True)):
            half, (block_d, block_h) = dtype != torch.float32, block_sizes(d, h)
            entry, group_size = _CONFIGS[block_h, not half]
            config, k = with_block_d(entry, block_d), min(k, group_size)
            split = RowSplit.of(n_rows, config.blocks["BLOCK_N"], MAX_PROGRAMS, prefer_even=True)
            in_rows_dtype = ["slope_ptr", "variance_ptr", "gram_ptr", "z_ptr", *(["vz_ptr"] if first else [])]
            in_rows_dtype += [f"{name}{i}_ptr" for name in ("p", "v") for i in range(_POINTERS)]
            dots = (k + 1) * (d * h * (4 if half else 3) + h * h)
            cases.append(
                AuditCase(
                    name=f"slope_gradients/K={k}{'' if first else ' more'}/{TRITON_TYPE[dtype]}/D={d} H={h}",
                    kernel=_slope_gradients_kernel,
                    signature=audit_signature(_slope_gradients_kernel, dtype, in_rows_dtype),
                    constexprs={
                        "D": d,
                        "TILES": split.tiles,
                        "EVEN_N": split.even,
                        "N_PREDICTIONS": k,
                        "FIRST": first,
                        "HALF": half,
                        "PRECISION": dot_precision(dtype),
                    },
                    config=config,
                    bytes_moved=2 * (k + 1) * n_rows * d * dtype.itemsize
                    + (k + 1) * split.programs * block_h * (block_d + 1) * 4,
                    flops=2 * n_rows * (dots if first else dots - h * h),
                    divisible_by_16=("n_rows", "zero"),
                    expects_tensor_cores=True,
                    allowed_spill_bytes=_ALLOWED_SPILL[block_h, half],
                    allowed_spill_reason=_SPILL_REASON,
                )
            )
    return cases
