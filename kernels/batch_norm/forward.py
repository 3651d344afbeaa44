"""The op `fastjepa::batch_norm_forward`: one pass that applies BatchNorm (+ residual) (+ ReLU) to rows (M, C).

The package has the maths; `backward` the gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa.kernels.batch_norm.backward import batch_norm_backward
from fastjepa.kernels.batch_norm.channel_vectors import RESIDUAL_POINTERS, ChannelVectors, vector_bytes
from fastjepa.kernels.batch_norm.relu import apply_relu
from fastjepa.kernels.batch_norm.tiling import (
    check_inputs,
    form,
    load_affine,
    recipe_cases,
    row_launch,
    rows_of_program,
)
from fastjepa.kernels.checks import require_available
from fastjepa.kernels.launch import TRITON_TYPE, AuditCase, audit_signature, kernel_op, launch_kernel


@triton.jit
def _batch_norm_forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (n_rows, n_channels)
    residual_ptr,  # (n_rows, n_channels) or None
    out_ptr,  # (n_rows, n_channels)
    mean_ptr,  # (n_channels,), like all that follow
    var_ptr,
    weight_ptr,  # weight and bias may both be None
    bias_ptr,
    residual_mean_ptr,  # None: the residual is added as it is
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
    mean, _, scale, bias = load_affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, offs_c, mask_c)
    if residual_mean_ptr is not None:
        residual_mean, _, residual_scale, residual_bias = load_affine(
            residual_mean_ptr, residual_var_ptr, residual_weight_ptr, residual_bias_ptr, residual_eps, offs_c, mask_c
        )
        bias += residual_bias

    row = 0
    while row < rows:
        offs = (first_row + row) * n_channels + offs_tile
        mask = (offs_n < rows - row)[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        out = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            if residual_mean_ptr is not None:
                residual = (residual - residual_mean[None, :]) * residual_scale[None, :]
            out += residual
        if RELU:
            out = apply_relu(out)
        tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)
        row += BLOCK_N


def _fake_forward(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@kernel_op("fastjepa::batch_norm_forward", fake=_fake_forward)
def batch_norm_forward(
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
) -> Tensor:
    """relu?( BN(x; mean, var, weight, bias) [+ residual] [+ BN(residual; residual_mean, ...)] ), differentiable.

    Args:
        x: (n_rows, n_channels), contiguous, fp32, bf16 or fp16, at most 1024 channels.
        residual: None, or like x.
        mean, var: (n_channels,), the biased variance. They get no gradient of their own: see batch_statistics.
        weight, bias: (n_channels,), or both None.
        residual_mean, residual_var: the statistics of the residual's own BatchNorm, or both None to add it as it is.
        residual_weight, residual_bias: its parameters, or both None.
        eps, residual_eps: added to the variances.
        batch_statistics: mean and var are those of x itself, so the gradient for x goes through them too (training
            mode). Otherwise they are constants (running statistics).
        residual_batch_statistics: the same for the residual's.
        relu: apply the ReLU.
        The (n_channels,) vectors are fp32 or have x's dtype.

    Returns:
        (n_rows, n_channels) in x's dtype.

    Raises:
        RuntimeError: the kernels cannot run on x's device.
        TypeError, ValueError: an argument has another dtype, shape, layout or device; the message names it.
    """
    op = "batch_norm_forward"
    require_available(op, x.device)
    vectors = ChannelVectors(mean, var, weight, bias, residual_mean, residual_var, residual_weight, residual_bias)
    n_rows, n_channels = check_inputs(op, x, {"residual": residual}, vectors)
    rows = row_launch(f"forward/{form(residual, residual_mean)}", n_rows, n_channels, x.dtype)
    out = torch.empty_like(x)
    launch_kernel(
        _batch_norm_forward_kernel,
        rows.grid,
        rows.config,
        x_ptr=x,
        residual_ptr=residual,
        out_ptr=out,
        **vectors.pointers(),
        eps=eps,
        residual_eps=residual_eps,
        n_rows=n_rows,
        n_channels=n_channels,
        rows_per_program=rows.split.rows_per_program,
        RELU=relu,
    )
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, *rest, eps, residual_eps, batch_statistics, residual_batch_statistics, relu = inputs
    vectors = ChannelVectors(*rest)
    ctx.has_residual = residual is not None
    # A final residual is needed for the ReLU's mask only.
    kept_residual = residual if relu or vectors.residual_mean is not None else None
    ctx.save_for_backward(x, kept_residual, *vectors)
    ctx.scalars = (eps, residual_eps, batch_statistics, residual_batch_statistics, relu)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, residual, *rest = ctx.saved_tensors
    vectors = ChannelVectors(*rest)
    grad_out = grad_out.contiguous()
    grad_x, found, sums = batch_norm_backward([grad_out], x, residual, *vectors, *ctx.scalars)
    grad_residual: Tensor | None = found
    if not ctx.has_residual:
        grad_residual = None
    elif residual is None:  # a final residual and no ReLU: its gradient is that of the output
        grad_residual = grad_out
    return (grad_x, grad_residual, *parameter_gradients(vectors, sums), *(None for _ in ctx.scalars))


def parameter_gradients(vectors: ChannelVectors, sums: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of all `ChannelVectors` from the sums of `batch_norm_backward`; None for the statistics, whose part
    is in the gradient of x.
    """
    weight, bias = vectors.weight, vectors.bias
    residual_weight, residual_bias = vectors.residual_weight, vectors.residual_bias
    return (
        None,
        None,
        None if weight is None else sums[1].to(weight.dtype),
        None if bias is None else sums[0].to(bias.dtype),
        None,
        None,
        None if residual_weight is None else sums[2].to(residual_weight.dtype),
        None if residual_bias is None else sums[3].to(residual_bias.dtype),
    )


batch_norm_forward.register_autograd(_backward, setup_context=_setup_context)


def audit_cases() -> list[AuditCase]:
    """The forward kernel in its three forms at the recipe's shapes, for the static audit."""
    kernel = _batch_norm_forward_kernel
    absent: dict[str, tuple[str, ...]] = {
        "plain": ("residual_ptr", *RESIDUAL_POINTERS),
        "residual": RESIDUAL_POINTERS,
        "normalized_residual": (),
    }
    cases = []
    for n_rows, n_channels, dtype in recipe_cases():
        for name, absent_pointers in absent.items():
            n_tensors = 2 if name == "plain" else 3
            rows = row_launch(f"forward/{name}", n_rows, n_channels, dtype)
            cases.append(
                AuditCase(
                    name=f"batch_norm_forward/{name}/{TRITON_TYPE[dtype]}/{n_rows}x{n_channels}",
                    kernel=kernel,
                    signature=audit_signature(kernel, dtype, ("x_ptr", "residual_ptr", "out_ptr"), absent_pointers),
                    constexprs={**dict.fromkeys(absent_pointers), "RELU": True},
                    config=rows.config,
                    bytes_moved=n_tensors * n_rows * n_channels * dtype.itemsize + vector_bytes(name, n_channels),
                    flops=(8 if name == "normalized_residual" else 3 + n_tensors) * n_rows * n_channels,
                    divisible_by_16=("n_rows", "n_channels", "rows_per_program"),
                    programs=math.prod(rows.grid),
                    loop_trips=(rows.split.tiles,),
                )
            )
    return cases
