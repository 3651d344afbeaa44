"""The partials of a pass, merged in float64 in one order: plain sums, and moments about centres of their own.

Parts are what the programs of a pass leave, or, of several devices that each have some of the rows, what each of them
has merged; gather those, and merge once more (`fused.merged_moments`, `fused.merged_sums`).

    moments of n_p rows about centres c_p, R_p = Σ(x − c_p), S_p = Σ(x − c_p)(x − c_p)ᵀ, moved to the first centre c₀:
    δ = c_p − c₀,  s = Σ_p R_p + n_p·δ,  S = Σ_p S_p + n_p·δδᵀ + δR_pᵀ + R_pδᵀ,  μ = c₀ + s/N,  M2 = S − ssᵀ/N

The parts' centres are in the data's midst, so ssᵀ/N takes few of float64's bits away.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa.kernels.launch import AuditCase, LaunchConfig, launch_kernel


@triton.jit
def _merge_sums_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,  # (groups, n_parts, size), any float type; entries of one part are adjacent
    sums_ptr,  # (groups, size) fp64
    n_parts,
    size,
    group_stride,
    part_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    group = tl.program_id(1)
    offs_p = tl.arange(0, BLOCK_P)
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask_e = offs_e < size
    ptrs = parts_ptr + group.to(tl.int64) * group_stride + offs_e[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_E], dtype=tl.float64)
    part = 0
    while part < n_parts:
        p = (part + offs_p).to(tl.int64)
        mask = (p < n_parts)[:, None] & mask_e[None, :]
        total += tl.load(ptrs + p[:, None] * part_stride, mask=mask, other=0.0).to(tl.float64)
        part += BLOCK_P
    tl.store(sums_ptr + group.to(tl.int64) * size + offs_e, tl.sum(total, 0), mask=mask_e)


@triton.jit
def _merge_moments_kernel(  # type: ignore[no-untyped-def]
    centre_ptr,  # (tensors, n_parts, SIZE), any float type, like residual and scatter
    residual_ptr,  # (tensors, n_parts, SIZE): Σ(x − centre); None: 0, as the centres are means
    scatter_ptr,  # (tensors, n_parts, SIZE, SIZE), about the centres
    count_ptr,  # (n_parts,) fp64: rows of each part; None: rows_per_part, the last part what is left of n_rows
    mean_ptr,  # (tensors, D) fp64
    total_ptr,  # (tensors, D, D) fp64: the scatter about the mean
    n_rows,
    n_parts,
    rows_per_part,
    tensor_stride,  # from one tensor's centre to the next's, in elements; of a scatter SIZE times that
    part_stride,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(2).to(tl.int64)
    offs_p = tl.arange(0, BLOCK_P)
    offs_i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # rows of the matrices
    offs_j = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)  # columns
    mask_i, mask_j = offs_i < SIZE, offs_j < SIZE
    centre_ptr += t * tensor_stride
    scatter_ptr += t * tensor_stride * SIZE
    first_i = tl.load(centre_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float64)
    first_j = tl.load(centre_ptr + offs_j, mask=mask_j, other=0.0).to(tl.float64)
    sum_i = tl.zeros([BLOCK_P, BLOCK_M], dtype=tl.float64)
    sum_j = tl.zeros([BLOCK_P, BLOCK_D], dtype=tl.float64)
    total = tl.zeros([BLOCK_P, BLOCK_M, BLOCK_D], dtype=tl.float64)
    rows = tl.zeros([BLOCK_P], dtype=tl.float64)
    part = 0
    while part < n_parts:
        p = (part + offs_p).to(tl.int64)
        mask_p = p < n_parts
        mask_pi, mask_pj = mask_p[:, None] & mask_i[None, :], mask_p[:, None] & mask_j[None, :]
        offs_pi, offs_pj = p[:, None] * part_stride + offs_i[None, :], p[:, None] * part_stride + offs_j[None, :]
        if count_ptr is not None:
            count = tl.load(count_ptr + p, mask=mask_p, other=0.0)
        else:
            count = tl.minimum(tl.maximum(n_rows - p * rows_per_part, 0), rows_per_part).to(tl.float64)
        rows += count
        apart_i = tl.load(centre_ptr + offs_pi, mask=mask_pi, other=0.0).to(tl.float64) - first_i[None, :]
        apart_j = tl.load(centre_ptr + offs_pj, mask=mask_pj, other=0.0).to(tl.float64) - first_j[None, :]
        scatter_ptrs = (
            scatter_ptr + (p[:, None] * part_stride + offs_i[None, :])[:, :, None] * SIZE + offs_j[None, None]
        )
        mask = mask_pi[:, :, None] & mask_j[None, None, :]
        total += tl.load(scatter_ptrs, mask=mask, other=0.0).to(tl.float64)
        moved_i = count[:, None] * apart_i
        sum_j += count[:, None] * apart_j
        if residual_ptr is not None:
            residual_i = tl.load(residual_ptr + t * tensor_stride + offs_pi, mask=mask_pi, other=0.0).to(tl.float64)
            residual_j = tl.load(residual_ptr + t * tensor_stride + offs_pj, mask=mask_pj, other=0.0).to(tl.float64)
            total += apart_i[:, :, None] * residual_j[:, None, :]
            moved_i += residual_i
            sum_j += residual_j
        total += moved_i[:, :, None] * apart_j[:, None, :]
        sum_i += moved_i
        part += BLOCK_P

    n = tl.sum(rows, 0)
    shift_i, shift_j = tl.sum(sum_i, 0), tl.sum(sum_j, 0) / n
    about_mean = tl.sum(total, 0) - shift_i[:, None] * shift_j[None, :]
    inside = (offs_i < D)[:, None] & (offs_j < D)[None, :]
    tl.store(total_ptr + t * D * D + offs_i[:, None] * D + offs_j[None, :], about_mean, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(mean_ptr + t * D + offs_j, first_j + shift_j, mask=offs_j < D)


def _sums_config(n_parts: int, n_entries: int) -> LaunchConfig:
    """32 entries a thread, all on their way at once: 16 KB of fp32 to each program; more of each part if they are few.

    Numbers, also where torch.compile has symbols.
    """
    block_p = min(128, triton.next_power_of_2(int(n_parts)))
    block_e = min(4096 // block_p, triton.next_power_of_2(int(n_entries)))
    return LaunchConfig(num_warps=4, blocks={"BLOCK_P": block_p, "BLOCK_E": block_e})


def _moments_config(n_parts: int, size: int) -> LaunchConfig:
    """At least eight times around the loop, so that few of the last trip's parts are missing.

    4 entries of scatters a thread, or 8 where there are so few parts that a thread's rows and columns share more.
    """
    block_p = min(64, max(1, triton.next_power_of_2(int(n_parts)) // 8))
    tile, whole = 1024 if block_p == 64 else 2048, triton.next_power_of_2(int(size))
    block_d = min(64, tile // block_p, whole)
    block_m = min(tile // (block_p * block_d), whole)
    return LaunchConfig(num_warps=8, blocks={"BLOCK_P": block_p, "BLOCK_M": block_m, "BLOCK_D": block_d})


def merge_sums(parts: Tensor) -> Tensor:
    """Σ over the parts, (groups, size) float64, of (groups, n_parts, size), whose last dimension is contiguous."""
    n_groups, n_parts, size = parts.shape
    sums = torch.empty(n_groups, size, device=parts.device, dtype=torch.float64)
    config = _sums_config(n_parts, size)
    launch_kernel(
        _merge_sums_kernel,
        (triton.cdiv(size, config.blocks["BLOCK_E"]), n_groups),
        config,
        parts_ptr=parts,
        sums_ptr=sums,
        n_parts=n_parts,
        size=size,
        group_stride=parts.stride(0),
        part_stride=parts.stride(1),
    )
    return sums


def merge_moments(
    centre: Tensor, residual: Tensor | None, scatter: Tensor, count: Tensor | tuple[int, int], n_channels: int
) -> tuple[Tensor, Tensor]:
    """Mean (T, D) and scatter about it (T, D, D), float64, of the parts of T tensors; `size` ≥ D is padded.

    Args:
        centre: (T, n_parts, size); its and the scatter's strides differ by the factor `size`, and nothing else.
        residual: (T, n_parts, size), strided like the centre; None where the centres are means.
        scatter: (T, n_parts, size, size), about the centres.
        count: (n_parts,) float64, the rows of each part; or (rows of all parts, rows of each but the last).
        n_channels: D.
    """
    n_tensors, n_parts, size = centre.shape
    mean = torch.empty(n_tensors, n_channels, device=centre.device, dtype=torch.float64)
    total = torch.empty(n_tensors, n_channels, n_channels, device=centre.device, dtype=torch.float64)
    n_rows, rows_per_part = (None, None) if isinstance(count, Tensor) else count
    config = _moments_config(n_parts, size)
    launch_kernel(
        _merge_moments_kernel,
        (triton.cdiv(size, config.blocks["BLOCK_D"]), triton.cdiv(size, config.blocks["BLOCK_M"]), n_tensors),
        config,
        centre_ptr=centre,
        residual_ptr=residual,
        scatter_ptr=scatter,
        count_ptr=count if isinstance(count, Tensor) else None,
        mean_ptr=mean,
        total_ptr=total,
        n_rows=n_rows,
        n_parts=n_parts,
        rows_per_part=rows_per_part,
        tensor_stride=centre.stride(0),
        part_stride=centre.stride(1),
        D=n_channels,
        SIZE=size,
    )
    return mean, total


def audit_cases() -> list[AuditCase]:
    """The merges of the projected losses at the default recipe, and those of eight devices' parts."""
    cases = []
    for name, n_groups, n_parts, size, dtype in (
        ("activations", 5, 512, 65 * 64, "fp32"),
        ("slopes of bf16", 6, 512, 64 * 16 + 64, "fp32"),
        ("slopes of fp32", 8, 512, 64 * 16 + 64, "fp32"),
        ("devices", 5, 8, 65 * 64, "fp64"),
    ):
        config = _sums_config(n_parts, size)
        cases.append(
            AuditCase(
                name=f"merge_sums/{name}",
                kernel=_merge_sums_kernel,
                signature={"parts_ptr": f"*{dtype}", "sums_ptr": "*fp64"}
                | dict.fromkeys(("n_parts", "size", "group_stride", "part_stride"), "i32"),
                constexprs={},
                config=config,
                bytes_moved=n_groups * size * (n_parts * (4 if dtype == "fp32" else 8) + 8),
                flops=n_groups * size * n_parts,
                divisible_by_16=("size", "group_stride", "part_stride"),
                programs=triton.cdiv(size, config.blocks["BLOCK_E"]) * n_groups,
                loop_trips=(triton.cdiv(n_parts, config.blocks["BLOCK_P"]),),
            )
        )
    integers = ("n_rows", "n_parts", "rows_per_part", "tensor_stride", "part_stride")
    for name, n_tensors, n_parts, d in (("partials", 5, 512, 16), ("partials", 1, 33, 512), ("devices", 5, 8, 16)):
        devices = name == "devices"
        dtype, width = ("fp64", 8) if devices else ("fp32", 4)
        absent = ("residual_ptr", "n_rows", "rows_per_part") if devices else ("count_ptr",)
        pointers = {"centre_ptr": dtype, "residual_ptr": dtype, "scatter_ptr": dtype}
        pointers |= dict.fromkeys(("count_ptr", "mean_ptr", "total_ptr"), "fp64")
        signature = {pointer: f"*{kind}" for pointer, kind in pointers.items()} | dict.fromkeys(integers, "i32")
        config = _moments_config(n_parts, d)
        cases.append(
            AuditCase(
                name=f"merge_moments/{name}/D={d}",
                kernel=_merge_moments_kernel,
                signature={argument: kind for argument, kind in signature.items() if argument not in absent},
                constexprs={**dict.fromkeys(absent), "D": d, "SIZE": d},
                config=config,
                bytes_moved=n_tensors * d * ((d + (1 if devices else 2)) * n_parts * width + (d + 1) * 8),
                flops=8 * n_tensors * n_parts * d * d,
                divisible_by_16=("tensor_stride", "part_stride"),
                programs=triton.cdiv(d, config.blocks["BLOCK_D"])
                * triton.cdiv(d, config.blocks["BLOCK_M"])
                * n_tensors,
                loop_trips=(triton.cdiv(n_parts, config.blocks["BLOCK_P"]),),
            )
        )
    return cases
