"""The op `fastjepa::batch_norm_backward`: the gradient of `batch_norm_forward` in two passes over the rows.

With c = x − mean, x̂ = c·rstd and g = Σ grads masked by the ReLU (`relu`), whose input is computed again:

    ∂bias = Σ g,   ∂weight = Σ g·x̂,
    ∂x = weight·rstd·(g − ∂bias/n − x̂·∂weight/n)        batch statistics: mean and var depend on x
    ∂x = weight·rstd·g                                    running statistics

and the same for a normalised residual, with its own statistics and the same g. The first pass makes the sums
(`reduce`); the second, here, writes ∂x. A residual that is added as it is has the gradient g.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa.kernels.batch_norm.across_ranks import sums_across_ranks
from fastjepa.kernels.batch_norm.channel_vectors import RESIDUAL_POINTERS, ChannelVectors, vector_bytes
from fastjepa.kernels.batch_norm.reduce import MAX_GRADIENTS, reduce_gradients
from fastjepa.kernels.batch_norm.relu import relu_gradient
from fastjepa.kernels.batch_norm.tiling import (
    check_inputs,
    form,
    load_affine,
    load_gradient,
    recipe_cases,
    row_launch,
    rows_of_program,
)
from fastjepa.kernels.checks import check_tensor, require_available
from fastjepa.kernels.launch import TRITON_TYPE, AuditCase, audit_signature, kernel_op, launch_kernel
from fastjepa.kernels.shares import Shares


@triton.jit
def _batch_norm_grad_kernel(  # type: ignore[no-untyped-def]
    grad_out_ptr,  # (n_rows, n_channels): its gradient, rows grad_out_stride_n apart; or g if RELU is False
    x_ptr,  # (n_rows, n_channels)
    residual_ptr,  # (n_rows, n_channels) or None: raw, with its own BatchNorm
    grad_x_ptr,  # (n_rows, n_channels)
    grad_residual_ptr,  # (n_rows, n_channels) or None, as the residual
    sums_ptr,  # (2 or more, n_channels): Σ g, Σ g·x̂ [, Σ g·(normalised residual)]
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
    grad_out_stride_n,
    n_rows,
    n_channels,
    rows_per_program,
    BATCH_STATISTICS: tl.constexpr,
    RESIDUAL_BATCH_STATISTICS: tl.constexpr,
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
    mean_g = tl.load(sums_ptr + offs_c, mask=mask_c, other=0.0) / n_rows
    slope = tl.load(sums_ptr + n_channels + offs_c, mask=mask_c, other=0.0) / n_rows * rstd
    if residual_ptr is not None:
        residual_mean, residual_rstd, residual_scale, residual_bias = load_affine(
            residual_mean_ptr, residual_var_ptr, residual_weight_ptr, residual_bias_ptr, residual_eps, offs_c, mask_c
        )
        bias += residual_bias
        residual_sum = tl.load(sums_ptr + 2 * n_channels + offs_c, mask=mask_c, other=0.0)
        residual_slope = residual_sum / n_rows * residual_rstd

    row = 0
    while row < rows:
        offs = (first_row + row) * n_channels + offs_tile
        mask = (offs_n < rows - row)[:, None] & mask_c[None, :]
        g = load_gradient(grad_out_ptr, grad_out_stride_n, first_row + row, offs_n, offs_c, mask)
        c = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        if residual_ptr is not None:
            r = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32) - residual_mean[None, :]
        if RELU:
            out = c * scale[None, :] + bias[None, :]
            if residual_ptr is not None:
                out += r * residual_scale[None, :]
            g = relu_gradient(g, out)
        grad_x = g
        if BATCH_STATISTICS:
            grad_x = (g - mean_g[None, :]) - c * slope[None, :]
        grad_x *= scale[None, :]
        tl.store(grad_x_ptr + offs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if residual_ptr is not None:
            grad_residual = g
            if RESIDUAL_BATCH_STATISTICS:
                grad_residual = (g - mean_g[None, :]) - r * residual_slope[None, :]
            grad_residual *= residual_scale[None, :]
            tl.store(grad_residual_ptr + offs, grad_residual.to(grad_residual_ptr.dtype.element_ty), mask=mask)
        row += BLOCK_N


def _fake_backward(
    grads: list[Tensor],
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual_mean: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    n_sums = 2 if residual_mean is None else 4
    grad_residual = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), grad_residual, x.new_empty((n_sums, x.shape[1]), dtype=torch.float32)


@kernel_op("fastjepa::batch_norm_backward", fake=_fake_backward)
def batch_norm_backward(
    grads: list[Tensor],
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual_mean: Tensor | None,
    residual_var: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
    eps: float,
    residual_eps: float,
    batch_statistics: bool,
    residual_batch_statistics: bool,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `fastjepa::batch_norm_forward`, whose other arguments these are. Not differentiable.

    Args:
        grads: 1 to 4 gradients of the output, which are added: (n_rows, n_channels) in x's dtype, each row contiguous;
            rows may lie in a wider tensor.
        residual: as in the forward op, but None for a final residual without a ReLU: its gradient is that of the
            output.

    Returns:
        grad_x: like x.
        grad_residual: like x, or (0,) without a residual.
        sums: (2 or 4, n_channels) fp32: the gradients of bias, weight [, residual_weight, residual_bias].

    Raises:
        RuntimeError, TypeError, ValueError: as the forward op.
    """
    vectors = ChannelVectors(mean, var, weight, bias, residual_mean, residual_var, residual_weight, residual_bias)
    options = (eps, residual_eps, batch_statistics, residual_batch_statistics, relu)
    grad_x, grad_residual, sums = both_passes(grads, x, residual, vectors, options)
    return grad_x, x.new_empty(0) if grad_residual is None else grad_residual, sums


def both_passes(
    grads: list[Tensor],
    x: Tensor,
    residual: Tensor | None,
    vectors: ChannelVectors,
    options: tuple[float, float, bool, bool, bool],
    shares: Shares | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`batch_norm_backward`, also of rows on several ranks: between the passes, one collective.

    Args:
        options: eps, residual_eps, batch_statistics, residual_batch_statistics, relu.
        shares: which part of the rows is whose. Sums are those over this rank's rows.

    Returns:
        grad_x, grad_residual (None without a residual), sums.
    """
    op = "batch_norm_backward"
    require_available(op, x.device)
    n_rows, n_channels = check_inputs(op, x, {"residual": residual}, vectors)
    _check_gradients(op, grads, x)
    eps, residual_eps, batch_statistics, residual_batch_statistics, relu = options
    residual_mean = vectors.residual_mean
    final_residual = residual is not None and residual_mean is None
    g, sums = reduce_gradients(grads, x, residual, vectors, eps, residual_eps, relu=relu)
    of_all_rows = sums
    if shares is not None and (batch_statistics or residual_batch_statistics):
        of_all_rows = sums_across_ranks(sums, n_rows, shares)
    grad_out = grads[0]
    if g is not None:  # the mask is done, and with it all that a final residual is for
        grad_out, relu = g, False
        residual = None if final_residual else residual
    grad_x = torch.empty_like(x)
    grad_residual = None if residual is None else torch.empty_like(x)
    rows = row_launch(f"grad/{form(residual, residual_mean)}", n_rows, n_channels, x.dtype)
    launch_kernel(
        _batch_norm_grad_kernel,
        rows.grid,
        rows.config,
        grad_out_ptr=grad_out,
        x_ptr=x,
        residual_ptr=residual,
        grad_x_ptr=grad_x,
        grad_residual_ptr=grad_residual,
        sums_ptr=of_all_rows,
        **vectors.pointers(),
        eps=eps,
        residual_eps=residual_eps,
        grad_out_stride_n=grad_out.stride(0),
        n_rows=n_rows,
        n_channels=n_channels,
        rows_per_program=rows.split.rows_per_program,
        BATCH_STATISTICS=batch_statistics,
        RESIDUAL_BATCH_STATISTICS=residual_batch_statistics,
        RELU=relu,
    )
    if final_residual:
        grad_residual = g
    return grad_x, grad_residual, sums


def _check_gradients(op: str, grads: list[Tensor], x: Tensor) -> None:
    if not 1 <= len(grads) <= MAX_GRADIENTS:
        raise ValueError(f"{op}: there are {len(grads)} gradients of one output; accepted: 1 to {MAX_GRADIENTS}")
    for i, grad in enumerate(grads):
        name, shape = f"grads[{i}]", (x.shape[0], x.shape[1])
        check_tensor(op, name, grad, shape=shape, dtypes=(x.dtype,), device=x.device)
        if grad.stride(1) != 1 and x.shape[1] > 1:
            raise ValueError(f"{op}: {name} has strides {grad.stride()}; accepted: contiguous rows")


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "batch_norm_act: its gradient cannot be differentiated again (double backward). Use nn.BatchNorm2d, or "
        "batch_norm.reference.batch_norm_act, where a second derivative is needed"
    )


batch_norm_backward.register_autograd(_refuse_double_backward)


def audit_cases() -> list[AuditCase]:
    """The second pass in its forms at the recipe's shapes, for the static audit."""
    kernel = _batch_norm_grad_kernel
    full_size = ("grad_out_ptr", "x_ptr", "residual_ptr", "grad_x_ptr", "grad_residual_ptr")
    residual = ("residual_ptr", "grad_residual_ptr", *RESIDUAL_POINTERS)
    # (case, TILINGS key, full-size tensors moved, RELU, flops per element, absent pointers); after a reduction that
    # stored g, for a residual that is added as it is or of several gradients, the second pass has no ReLU.
    forms: list[tuple[str, str, int, bool, int, tuple[str, ...]]] = [
        ("plain", "plain", 3, True, 8, residual),
        ("masked", "plain", 3, False, 5, residual),
        ("normalized_residual", "normalized_residual", 5, True, 14, ()),
        ("normalized_residual masked", "normalized_residual", 5, False, 11, ()),
    ]
    cases = []
    for n_rows, n_channels, dtype in recipe_cases():
        for case, key, n_tensors, relu, flops, absent in forms:
            rows = row_launch(f"grad/{key}", n_rows, n_channels, dtype)
            constexprs: dict[str, Any] = {**dict.fromkeys(absent), "RELU": relu}
            cases.append(
                AuditCase(
                    name=f"batch_norm_grad/{case}/{TRITON_TYPE[dtype]}/{n_rows}x{n_channels}",
                    kernel=kernel,
                    signature=audit_signature(kernel, dtype, full_size, absent),
                    constexprs=constexprs | {"BATCH_STATISTICS": True, "RESIDUAL_BATCH_STATISTICS": True},
                    config=rows.config,
                    bytes_moved=n_tensors * n_rows * n_channels * dtype.itemsize
                    + vector_bytes(key, n_channels)
                    + 4 * (4 if key == "normalized_residual" else 2) * n_channels,
                    flops=flops * n_rows * n_channels,
                    divisible_by_16=("n_rows", "n_channels", "rows_per_program", "grad_out_stride_n"),
                    programs=math.prod(rows.grid),
                    loop_trips=(rows.split.tiles,),
                )
            )
    return cases
