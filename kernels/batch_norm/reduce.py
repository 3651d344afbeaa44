"""The first pass of BatchNorm's backward: per-channel sums over the rows, in partials merged in a fixed order.

    Σ g,  Σ g·x̂  [, Σ g·r̂ for a normalised residual],   g = Σ grad_out masked by the ReLU (`relu`)

Each program sums its rows; a second, small kernel adds the partials of all programs. No atomics.

Where the output went to several places, each has a gradient for it, and they are added here, in fp32: a sum of its own
would read and write them once more. A gradient may be half of a wider tensor, as that of a concatenation is.

The gradient of a residual that is added as it is equals g. There, and where g is a sum, g is stored on the way, rounded
once, and the second pass reads it in place of the gradients and of the residual's part in the mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa.kernels.batch_norm.channel_vectors import RESIDUAL_POINTERS, ChannelVectors, vector_bytes
from fastjepa.kernels.batch_norm.relu import relu_gradient
from fastjepa.kernels.batch_norm.tiling import (
    form,
    load_affine,
    load_gradient,
    merge_config,
    recipe_cases,
    row_launch,
    rows_of_program,
)
from fastjepa.kernels.launch import TRITON_TYPE, AuditCase, audit_signature, launch_kernel

MAX_GRADIENTS = 4  # of one output: an encoder's block of a U-Net feeds two convolutions and two halves of the decoder


@triton.jit
def _batch_norm_reduce_kernel(  # type: ignore[no-untyped-def]
    grad0_ptr,  # (n_rows, n_channels): gradients of the output, their rows grad…_stride_n apart
    grad1_ptr,  # or None, like all that follow it
    grad2_ptr,
    grad3_ptr,
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
    grad0_stride_n,
    grad1_stride_n,
    grad2_stride_n,
    grad3_stride_n,
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
        g = load_gradient(grad0_ptr, grad0_stride_n, first_row + row, offs_n, offs_c, mask)
        if grad1_ptr is not None:
            g += load_gradient(grad1_ptr, grad1_stride_n, first_row + row, offs_n, offs_c, mask)
        if grad2_ptr is not None:
            g += load_gradient(grad2_ptr, grad2_stride_n, first_row + row, offs_n, offs_c, mask)
        if grad3_ptr is not None:
            g += load_gradient(grad3_ptr, grad3_stride_n, first_row + row, offs_n, offs_c, mask)
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
    partial_ptr,  # (2 or 3, n_partials, n_channels)
    sums_ptr,  # (2 or 4, n_channels): of three the first again at the end
    n_channels,
    n_partials,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_p = tl.arange(0, BLOCK_P)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < n_channels
    which = tl.program_id(1) % 3
    offs = (which * n_partials + offs_p)[:, None] * n_channels + offs_c[None, :]
    partial = tl.load(partial_ptr + offs, mask=(offs_p < n_partials)[:, None] & mask_c[None, :], other=0.0)
    tl.store(sums_ptr + tl.program_id(1) * n_channels + offs_c, tl.sum(partial, axis=0), mask=mask_c)


def reduce_gradients(
    grads: Sequence[Tensor],
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
        g, like x, for a residual without statistics of its own and for several gradients, else None.
        sums: (2 or 4, n_channels) fp32: Σ g, Σ g·x̂ [, Σ g·r̂, Σ g].
    """
    n_rows, n_channels = x.shape
    reduce_form = form(residual, vectors.residual_mean)
    rows = row_launch(reduce_key(reduce_form, len(grads)), n_rows, n_channels, x.dtype)
    n_sums = 3 if reduce_form == "normalized_residual" else 2
    partial = torch.empty((n_sums, rows.split.programs, n_channels), dtype=torch.float32, device=x.device)
    # Σ g is the gradient of two biases there, and two parameters must not be given one tensor.
    n_results = 4 if reduce_form == "normalized_residual" else 2
    sums = torch.empty((n_results, n_channels), dtype=torch.float32, device=x.device)
    g = torch.empty_like(x) if reduce_form == "residual" or len(grads) > 1 else None
    given: list[Tensor | None] = [*grads, *[None] * (MAX_GRADIENTS - len(grads))]
    launch_kernel(
        _batch_norm_reduce_kernel,
        rows.grid,
        rows.config,
        **{f"grad{i}_ptr": grad for i, grad in enumerate(given)},
        x_ptr=x,
        residual_ptr=residual,
        g_ptr=g,
        partial_ptr=partial,
        **vectors.pointers(),
        eps=eps,
        residual_eps=residual_eps,
        **{f"grad{i}_stride_n": 0 if grad is None else grad.stride(0) for i, grad in enumerate(given)},
        n_rows=n_rows,
        n_channels=n_channels,
        rows_per_program=rows.split.rows_per_program,
        RELU=relu,
    )
    config = merge_config(rows.split.programs)
    launch_kernel(
        _batch_norm_reduce_merge_kernel,
        (triton.cdiv(n_channels, config.blocks["BLOCK_C"]), n_results),
        config,
        partial_ptr=partial,
        sums_ptr=sums,
        n_channels=n_channels,
        n_partials=rows.split.programs,
    )
    return g, sums


def reduce_key(reduce_form: str, n_grads: int) -> str:
    """The TILINGS key of the pass: a sum of gradients keeps more loads in flight, and has smaller tiles for it."""
    return f"reduce/{reduce_form}" + ("/sum" if n_grads > 1 else "")


def audit_cases() -> list[AuditCase]:
    """The reduction in its three forms, of one gradient, two and four, and the merge of its partials, at the recipe's
    shapes.
    """
    kernel = _batch_norm_reduce_kernel
    pointers = tuple(f"grad{i}_ptr" for i in range(MAX_GRADIENTS))
    strides = tuple(f"grad{i}_stride_n" for i in range(MAX_GRADIENTS))
    # form: (full-size tensors moved besides the gradients, flops per element, absent pointers)
    forms: dict[str, tuple[int, int, tuple[str, ...]]] = {
        "plain": (1, 7, ("residual_ptr", *RESIDUAL_POINTERS)),
        "residual": (2, 8, RESIDUAL_POINTERS),
        "normalized_residual": (2, 12, ()),
    }
    cases = []
    for n_rows, n_channels, dtype in recipe_cases():
        shape = f"{TRITON_TYPE[dtype]}/{n_rows}x{n_channels}"
        for (name, (n_tensors, flops, absent)), n_grads in product(forms.items(), (1, 2, MAX_GRADIENTS)):
            stores = name == "residual" or n_grads > 1
            missing = (*absent, *pointers[n_grads:], *(() if stores else ("g_ptr",)))
            rows = row_launch(reduce_key(name, n_grads), n_rows, n_channels, dtype)
            partial_bytes = 4 * (3 if name == "normalized_residual" else 2) * rows.split.programs * n_channels
            constexprs: dict[str, Any] = {**dict.fromkeys(missing), "RELU": True}
            cases.append(
                AuditCase(
                    name=f"batch_norm_reduce/{name}" + (f" of {n_grads}" if n_grads > 1 else "") + f"/{shape}",
                    kernel=kernel,
                    signature=audit_signature(kernel, dtype, (*pointers, "x_ptr", "residual_ptr", "g_ptr"), missing),
                    constexprs=constexprs,
                    config=rows.config,
                    bytes_moved=(n_tensors + n_grads + stores) * n_rows * n_channels * dtype.itemsize
                    + partial_bytes
                    + vector_bytes(name, n_channels),
                    flops=(flops + n_grads - 1) * n_rows * n_channels,
                    divisible_by_16=("n_rows", "n_channels", "rows_per_program", *strides),
                    programs=math.prod(rows.grid),
                    loop_trips=(rows.split.tiles,),
                    allowed_spill_bytes=4 if (name, n_grads, dtype) == ("plain", 2, torch.float32) else 0,
                    allowed_spill_reason="with triton 3.9 on sm_90, where the assembler stops at 48 registers",
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
