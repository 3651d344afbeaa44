"""The function to call: the projected losses as fused Triton kernels. The package has the maths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastjepa.kernels.checks import check_tensor, require_available
from fastjepa.kernels.launch import kernel_op
from fastjepa.kernels.moments.fused import linear_operands, moments, subtract_centred_linear
from fastjepa.kernels.projected_losses import algebra
from fastjepa.kernels.projected_losses.activations import MAX_D, MAX_HIDDEN, operands
from fastjepa.kernels.projected_losses.algebra import ProjectorParameters, Saved
from fastjepa.kernels.projected_losses.backward import slope_gradients
from fastjepa.kernels.projected_losses.forward import activation_moments
from fastjepa.kernels.projected_losses.reference import ProjectedLosses, as_rows, check_shapes

_OP = "projected_losses"
_DTYPES = (torch.float32, torch.bfloat16)


def _forward_fake(z: Tensor, predictions: list[Tensor], weight1: Tensor, *_: object) -> list[Tensor]:
    (hidden, channels), n_tensors = weight1.shape, 1 + len(predictions)
    fp32_shapes: tuple[tuple[int, ...], ...] = ((), (), (len(predictions),), (n_tensors, hidden), (n_tensors, hidden))
    fp64_shapes: tuple[tuple[int, ...], ...] = (
        (n_tensors, channels),
        (n_tensors, channels, channels),
        (hidden,),
        (hidden, hidden),
        (len(predictions), hidden, hidden),
    )
    return [z.new_empty(s, dtype=torch.float32) for s in fp32_shapes] + [
        z.new_empty(s, dtype=torch.float64) for s in fp64_shapes
    ]


@kernel_op("fastjepa::projected_losses", _forward_fake)
def _forward(
    z: Tensor,
    predictions: list[Tensor],
    weight1: Tensor,
    bias1: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    weight2: Tensor,
    eps: float,
) -> list[Tensor]:
    """Rows (N, D) in; the fields of `ProjectedLosses`, then those of `algebra.Saved`, which the backward op needs."""
    params = ProjectorParameters(weight1, bias1, bn_weight, bn_bias, weight2)
    tensors, n_rows = [z, *predictions], z.shape[0]
    mean, scatter = moments(tensors)
    affine = algebra.hidden_affine(params, mean, scatter, n_rows, eps)
    mean_r, scatter_r, delta_moments = activation_moments(
        tensors, operands(affine, mean, bn_bias, z.dtype), affine.shift
    )
    cov = algebra.covariance(weight2, scatter_r, n_rows)
    std_loss, cov_loss = algebra.std_and_cov_from_moments(cov.diagonal(), cov)
    prediction = algebra.prediction_losses(weight2, delta_moments, n_rows)
    results = ProjectedLosses(std_loss, cov_loss, prediction, affine.hidden_mean, affine.hidden_var)
    saved = Saved(mean, scatter, mean_r, scatter_r, delta_moments)
    # A padded matrix is cut to size by a view; outputs own their memory, contiguous as the fake op says.
    return [
        *(x.float().contiguous() for x in results),
        *(x.clone(memory_format=torch.contiguous_format) for x in saved),
    ]


def _backward_fake(
    grad_std: Tensor,
    grad_cov: Tensor,
    grad_prediction: Tensor,
    z: Tensor,
    predictions: list[Tensor],
    *params_eps_saved: Any,
) -> list[Tensor]:
    params = params_eps_saved[: len(ProjectorParameters._fields)]
    return [torch.empty_like(x) for x in (*params, z, *predictions)]


@kernel_op("fastjepa::projected_losses_backward", _backward_fake)
def _backward(
    grad_std: Tensor,
    grad_cov: Tensor,
    grad_prediction: Tensor,
    z: Tensor,
    predictions: list[Tensor],
    weight1: Tensor,
    bias1: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    weight2: Tensor,
    eps: float,
    saved: list[Tensor],
) -> list[Tensor]:
    """Gradients of `ProjectorParameters`, of z and of each prediction, in their dtypes; `saved` are `Saved`."""
    params = ProjectorParameters(weight1, bias1, bn_weight, bn_bias, weight2)
    mean, scatter, mean_r, scatter_r, delta_moments = Saved(*saved)
    tensors, n_rows = [z, *predictions], z.shape[0]
    out = algebra.output_gradients(weight2, scatter_r, delta_moments, n_rows, grad_std, grad_cov, grad_prediction)
    affine = algebra.hidden_affine(params, mean, scatter, n_rows, eps)
    slopes, sum_dy, dy_x, slope_sum = slope_gradients(tensors, operands(affine, mean, bn_bias, z.dtype), mean_r, out)
    grad = algebra.input_gradients(params, affine, scatter, sum_dy, dy_x, slope_sum, n_rows)
    grad_params = ProjectorParameters(grad.weight1, grad.bias1, grad.bn_weight, grad.bn_bias, out.weight2)
    correction = linear_operands(mean, grad.constant, grad.linear, z.dtype)
    grad_tensors = [
        subtract_centred_linear(x, correction, t, v, v if v.dtype == x.dtype else torch.empty_like(x))
        for t, (x, v) in enumerate(zip(tensors, slopes, strict=True))
    ]
    return [*(g.to(p.dtype) for g, p in zip(grad_params, params, strict=True)), *grad_tensors]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    z, predictions, *params, eps = inputs
    ctx.n_predictions, ctx.eps = len(predictions), eps
    saved = Saved(*output[len(ProjectedLosses._fields) :])
    ctx.save_for_backward(z, *predictions, *ProjectorParameters(*params), *saved)


def _autograd_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    n_predictions, n_params = ctx.n_predictions, len(ProjectorParameters._fields)
    z, *rest = ctx.saved_tensors
    predictions, rest = rest[:n_predictions], rest[n_predictions:]
    params, saved = ProjectorParameters(*rest[:n_params]), rest[n_params:]
    # Nothing flows through the batch statistics, nor through what was saved.
    grad_std, grad_cov, grad_prediction, *_ = grads
    found = _backward(grad_std, grad_cov, grad_prediction, z, predictions, *params, ctx.eps, saved)
    grad_params, grad_z, grad_predictions = (
        ProjectorParameters(*found[:n_params]),
        found[n_params],
        found[n_params + 1 :],
    )
    return (grad_z, grad_predictions, *grad_params, None)


def _no_double_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    raise RuntimeError(f"{_OP} (fused) has first derivatives only; kernels.projected_losses.reference has all")


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
_backward.register_autograd(_no_double_backward)


def projected_losses(
    z: Tensor,
    predictions: Sequence[Tensor],
    weight1: Tensor,
    bias1: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight2: Tensor,
    eps: float,
) -> ProjectedLosses:
    """std_loss and cov_loss of P(z), and the mean squared difference of P(z) and each P(prediction), fused.

    Same function, arguments and results as `closed_form.projected_losses`; first derivatives only. Rows
    that are contiguous in memory (channels-last tensors, or rows (N, D)) are read in place; any other layout is copied
    to rows once.

    Args:
        z: (B, D, T, H, W), (B, D, H, W) or rows (N, D), fp32 or bf16, D ≤ 64, N ≥ 2 rows in all.
        predictions: K ≥ 0 tensors of z's shape and dtype.
        weight1: (hidden, D), hidden ≤ 128; parameters are fp32, or all may have z's dtype.
        bias1: (hidden,), or None for none.
        bn_weight: (hidden,), or None for ones.
        bn_bias: (hidden,), or None for zeros.
        weight2: (out, hidden), 2 ≤ out ≤ 128.
        eps: BatchNorm's eps.

    Returns:
        fp32 losses and batch statistics.

    Raises:
        RuntimeError: kernels cannot run on z's device, or a second derivative is asked for.
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    check_tensor(_OP, "z", z, dtypes=_DTYPES)
    require_available(_OP, z.device)
    for k, p in enumerate(predictions):
        check_tensor(_OP, f"predictions[{k}]", p, dtypes=_DTYPES, device=z.device)
    param_dtypes = tuple(dict.fromkeys((torch.float32, z.dtype)))
    check_tensor(_OP, "weight1", weight1, shape=(None, None), dtypes=param_dtypes, device=z.device)
    hidden = weight1.shape[0]
    check_tensor(_OP, "weight2", weight2, shape=(None, hidden), dtypes=param_dtypes, device=z.device)
    check_shapes(_OP, z, predictions, weight1, weight2)
    for name, size, limit in (
        ("D (channels of z)", z.shape[1], MAX_D),
        ("hidden (rows of weight1)", hidden, MAX_HIDDEN),
        ("out (rows of weight2)", weight2.shape[0], MAX_HIDDEN),
    ):
        if not 1 <= size <= limit:
            raise ValueError(f"{_OP}: {name} is {size}; the fused kernels accept 1 to {limit}")
    vectors = {}
    for name, vector, fill in (("bias1", bias1, 0.0), ("bn_weight", bn_weight, 1.0), ("bn_bias", bn_bias, 0.0)):
        if vector is None:
            vector = weight1.new_full((hidden,), fill)
        check_tensor(_OP, name, vector, shape=(hidden,), dtypes=param_dtypes, device=z.device)
        vectors[name] = vector
    params = ProjectorParameters(weight1=weight1, weight2=weight2, **vectors)
    rows = [as_rows(x).contiguous() for x in (z, *predictions)]
    found = _forward(rows[0], rows[1:], *params, float(eps))
    std_loss, cov_loss, prediction_losses, batch_means, batch_vars = found[: len(ProjectedLosses._fields)]
    # Not `_replace`, which torch.compile of torch 2.11 cannot trace.
    return ProjectedLosses(std_loss, cov_loss, prediction_losses, batch_means.detach(), batch_vars.detach())
