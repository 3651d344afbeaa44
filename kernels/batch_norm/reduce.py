"""The first pass of BatchNorm's backward: per-channel sums over the rows, in partials merged in a fixed order.

    Σ g,  Σ g·x̂  [, Σ g·r̂ for a normalised residual],   g = grad_out masked by the ReLU (`relu`)

Each program sums its rows; a second, small kernel adds the partials of all programs. No atomics. The gradient of a
residual that is added as it is equals g: it is stored on the way, so that the second pass reads g in place of grad_out
and the residual.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa.kernels.batch_norm.channel_vectors import RESIDUAL_POINTERS, ChannelVectors
from fastjepa.kernels.batch_norm.relu import relu_gradient
from fastjepa.kernels.batch_norm.tiling import (
    form,
    load_affine,
    merge_config,
    recipe_cases,
    row_launch,
    rows_of_program,
)
from fastjepa.kernels.launch import TRITON_TYPE, AuditCase, audit_signature, launch_kernel


@triton.jit
def _batch_norm_reduce_kernel(  # type: ignore[no-untyped-def]
    grad_out_ptr,  # (n_rows, n_channels)
    x_ptr,  # (n_rows, n_channels)
    residual_ptr,  # (n_rows, n_channels) or None
    g_ptr,  # (n_rows, n_channels) or None: receives g
    partial_ptr,  # (2 or 3, n_partials, n_channels): Σ g, Σ g·x̂, Σ g·(normalised residual)
    mean_ptr,  # (n_channels,), like all that follow
    var_ptr,
    weight_ptr,
    bias_ptr,
    residual_mean_ptr,
    residual_var_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    eps,
    residual_eps,
    n_rows,
    n_channels,
    rows_per_program,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_n = tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_channels
    offs_tile = offs_n[:, None] * n_channels + offs_c[None, :]
    first_row, rows = rows_of_program(n_rows, rows_per_program)
    mean, rstd, scale, bias = load_affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, offs_c, mask_c)
    if residual_mean_ptr is not None:
        residual_mean, residual_rstd, residual_scale, residual_bias = load_affine(
            residual_mean_ptr, residual_var_ptr, residual_weight_ptr, residual_bias_ptr, residual_eps, offs_c, mask_c
        )
        bias += residual_bias

    sum_g = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    sum_gc = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    sum_gr = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    row = 0
    while row < rows:
        offs = (first_row + row) * n_channels + offs_tile
        mask = (offs_n < rows - row)[:, None] & mask_c[None, :]
        g = tl.load(grad_out_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        if residual_ptr is not None:
            r = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            if residual_mean_ptr is not None:
                r -= residual_mean[None, :]
        if RELU:  # the same arithmetic as in the forward kernel
            out = c * scale[None, :] + bias[None, :]
            if residual_mean_ptr is not None:
                out += r * residual_scale[None, :]
            elif residual_ptr is not None:
                out += r
            g = relu_gradient(g, out)
        if g_ptr is not None:
            tl.store(g_ptr + offs, g.to(g_ptr.dtype.element_ty), mask=mask)
        sum_g += g
        sum_gc += g * c
        if residual_mean_ptr is not None:
            sum_gr += g * r
        row += BLOCK_N

    offs_partial = tl.program_id(0) * n_channels + offs_c
    partial_stride = tl.num_programs(0) * n_channels
    tl.store(partial_ptr + offs_partial, tl.sum(sum_g, axis=0), mask=mask_c)
    tl.store(partial_ptr + partial_stride + offs_partial, tl.sum(sum_gc, axis=0) * rstd, mask=mask_c)
    if residual_mean_ptr is not None:
        tl.store(partial_ptr + 2 * partial_stride + offs_partial, tl.sum(sum_gr, axis=0) * residual_rstd, mask=mask_c)


@triton.jit
def _batch_norm_reduce_merge_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,  # (n_sums, n_partials, n_channels)
    sums_ptr,  # (n_sums, n_channels)
    n_channels,
    n_partials,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_p = tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_channels
    offs = (tl.program_id(1) * n_partials + offs_p)[:, None] * n_channels + offs_c[None, :]
    partial = tl.load(partial_ptr + offs, mask=(offs_p < n_partials)[:, None] & mask_c[None, :], other=0.0)
    tl.store(sums_ptr + tl.program_id(1) * n_channels + offs_c, tl.sum(partial, axis=0), mask=mask_c)


def reduce_gradients(
    grad_out: Tensor,
    x: Tensor,
    residual: Tensor | None,
    vectors: ChannelVectors,
    eps: float,
    residual_eps: float,
    *,
    relu: bool,
) -> tuple[Tensor | None, Tensor]:
    """Launch the pass. Arguments as in `batch_norm_backward`, which checks them.

    Returns:
        g, like x, for a residual without statistics of its own, else None.
        sums: (2 or 3, n_channels) fp32: Σ g, Σ g·x̂, Σ g·r̂.
    """
    n_rows, n_channels = x.shape
    reduce_form = form(residual, vectors.residual_mean)
    rows = row_launch(f"reduce/{reduce_form}", n_rows, n_channels, x.dtype)
    n_sums = 3 if reduce_form == "normalized_residual" else 2
    partial = torch.empty((n_sums, rows.split.programs, n_channels), dtype=torch.float32, device=x.device)
    sums = torch.empty((n_sums, n_channels), dtype=torch.float32, device=x.device)
    g = torch.empty_like(x) if reduce_form == "residual" else None
    launch_kernel(
        _batch_norm_reduce_kernel,
        rows.grid,
        rows.config,
        grad_out_ptr=grad_out,
        x_ptr=x,
        residual_ptr=residual,
        g_ptr=g,
        partial_ptr=partial,
        **vectors.pointers(),
        eps=eps,
        residual_eps=residual_eps,
        n_rows=n_rows,
        n_channels=n_channels,
        rows_per_program=rows.split.rows_per_program,
        RELU=relu,
    )
    config = merge_config(rows.split.programs)
    launch_kernel(
        _batch_norm_reduce_merge_kernel,
        (triton.cdiv(n_channels, config.blocks["BLOCK_C"]), n_sums),
        config,
        partial_ptr=partial,
        sums_ptr=sums,
        n_channels=n_channels,
        n_partials=rows.split.programs,
    )
    return g, sums


def audit_cases() -> list[AuditCase]:
    """The reduction in its three forms, and the merge of its partials, at the recipe's shapes."""
    kernel = _batch_norm_reduce_kernel
    # form: (full-size tensors moved, flops per element, absent pointers)
    forms: dict[str, tuple[int, int, tuple[str, ...]]] = {
        "plain": (2, 7, ("residual_ptr", "g_ptr", *RESIDUAL_POINTERS)),
        "residual": (4, 8, RESIDUAL_POINTERS),
        "normalized_residual": (3, 12, ("g_ptr",)),
    }
    cases = []
    for n_rows, n_channels, dtype in recipe_cases():
        shape = f"{TRITON_TYPE[dtype]}/{n_rows}x{n_channels}"
        for name, (n_tensors, flops, absent) in forms.items():
            rows = row_launch(f"reduce/{name}", n_rows, n_channels, dtype)
            partial_bytes = 4 * (3 if name == "normalized_residual" else 2) * rows.split.programs * n_channels
            constexprs: dict[str, Any] = {**dict.fromkeys(absent), "RELU": True}
            cases.append(
                AuditCase(
                    name=f"batch_norm_reduce/{name}/{shape}",
                    kernel=kernel,
                    signature=audit_signature(
                        kernel, dtype, ("grad_out_ptr", "x_ptr", "residual_ptr", "g_ptr"), absent
                    ),
                    constexprs=constexprs,
                    config=rows.config,
                    bytes_moved=n_tensors * n_rows * n_channels * dtype.itemsize + partial_bytes,
                    flops=flops * n_rows * n_channels,
                    divisible_by_16=("n_rows", "n_channels", "rows_per_program"),
                    programs=math.prod(rows.grid),
                    loop_trips=(rows.split.tiles,),
                )
            )
        rows = row_launch("reduce/plain", n_rows, n_channels, dtype)
        config = merge_config(rows.split.programs)
        cases.append(
            AuditCase(
                name=f"batch_norm_reduce_merge/{shape}",
                kernel=_batch_norm_reduce_merge_kernel,
                signature=audit_signature(_batch_norm_reduce_merge_kernel, dtype, ()),
                constexprs={},
                config=config,
                bytes_moved=4 * 2 * (rows.split.programs + 1) * n_channels,
                flops=2 * rows.split.programs * n_channels,
                divisible_by_16=("n_channels",),
                programs=2 * triton.cdiv(n_channels, config.blocks["BLOCK_C"]),
            )
        )
    return cases
