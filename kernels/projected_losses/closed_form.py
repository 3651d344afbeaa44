"""The projected losses in closed form, in plain torch: the path that a CPU takes. Any dtype and device, no Triton.

The numbers and the gradients of `reference.projected_losses` from small moments (see `algebra`): it walks over the
pixels in chunks (see `chunks`) and keeps nothing of size (N, hidden), forward or backward.

Under torch.compile the passes are traced, so that the compiler may fuse them; on a CPU, whose threads it cannot trace,
forward and backward are one op each instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from fastjepa.kernels.projected_losses import algebra, pixel_passes
from fastjepa.kernels.projected_losses.algebra import ProjectorParameters
from fastjepa.kernels.projected_losses.chunks import Chunking, chunking_for, columns, from_rows, same_layout
from fastjepa.kernels.projected_losses.reference import ProjectedLosses, check_shapes


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
    """std_loss and cov_loss of P(z), and the mean squared difference of P(z) and each P(prediction).

    P(x) = weight2·relu(BatchNorm(weight1·x + bias1)) on rows of D channels; BatchNorm in train mode, each tensor with
    its own batch statistics. Gradients flow into z, every prediction and all parameters. Closed form; see the module.

    Args:
        z: (B, D, T, H, W), (B, D, H, W) or rows (N, D), with N ≥ 2 rows in all; any layout and floating dtype.
        predictions: K ≥ 0 tensors of z's shape and dtype.
        weight1: (hidden, D).
        bias1: (hidden,), or None for none. It changes `batch_means` only.
        bn_weight: (hidden,), or None for ones.
        bn_bias: (hidden,), or None for zeros.
        weight2: (out, hidden), out ≥ 2.
        eps: BatchNorm's eps.

    Raises:
        ValueError: a shape that does not fit.
    """
    check_shapes("projected_losses", z, predictions, weight1, weight2)
    ones = weight1.new_ones(weight1.shape[0]) if bn_weight is None else bn_weight
    bias = weight1.new_zeros(weight1.shape[0]) if bias1 is None else bias1
    offset = weight1.new_zeros(weight1.shape[0]) if bn_bias is None else bn_bias
    return ProjectedLosses(*_ClosedForm.apply(eps, weight1, bias, ones, offset, weight2, z, *predictions))


class _ClosedForm(torch.autograd.Function):
    """Two passes over the pixels forward, two backward. Saves the inputs and a few small matrices."""

    @staticmethod
    def forward(ctx: Any, eps: float, *inputs: Tensor) -> tuple[Tensor, ...]:
        run = _forward_op if _is_opaque(inputs) else _forward
        results = run(list(inputs), eps)
        losses = ProjectedLosses(*results[: len(ProjectedLosses._fields)])
        ctx.save_for_backward(*inputs, *results[len(losses) :])
        ctx.eps, ctx.n_inputs = eps, len(inputs)
        ctx.mark_non_differentiable(losses.batch_means, losses.batch_vars)
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, saved = ctx.saved_tensors[: ctx.n_inputs], ctx.saved_tensors[ctx.n_inputs :]
        grad_losses = ProjectedLosses(*grads)
        run = _backward_op if _is_opaque(inputs) else _backward
        found = run(list(grad_losses[:3]), list(inputs), list(saved), ctx.eps)
        return (None, *found)


def _forward(inputs: list[Tensor], eps: float) -> list[Tensor]:
    """From the parameters, z and the predictions: the fields of `ProjectedLosses`, then those of `algebra.Saved`."""
    params, tensors = _parameters_and_tensors(inputs)
    n_rows, chunking = _n_rows(tensors), _chunking(tensors)
    chunks = [columns(x, chunking) for x in same_layout(tensors, chunking)]
    means, scatters = zip(*(pixel_passes.row_moments(c, chunking) for c in chunks), strict=True)
    mean, scatter = torch.stack(means), torch.stack(scatters)
    affine = algebra.hidden_affine(params, mean, scatter, n_rows, eps)
    mean_r, scatter_r, delta_moments = pixel_passes.activation_moments(
        chunks, chunking, affine, mean, params.bn_bias, n_rows
    )
    cov = algebra.covariance(params.weight2, scatter_r, n_rows)
    std_loss, cov_loss = algebra.std_and_cov_from_moments(cov.diagonal(), cov)
    prediction = algebra.prediction_losses(params.weight2, delta_moments, n_rows)
    losses = ProjectedLosses(std_loss, cov_loss, prediction, affine.hidden_mean, affine.hidden_var)
    wide = pixel_passes.compute_dtype(tensors[0].dtype)
    saved = algebra.Saved(mean, scatter, mean_r, scatter_r, delta_moments)
    # A loss is a copy even where nothing changes. Traced by torch 2.11, a forward returns its intermediates as well; of
    # two results that are one tensor, autograd gives the gradient to the last, here an intermediate that no one uses.
    fresh = (x.to(wide, copy=True, memory_format=torch.contiguous_format) for x in losses)
    return [*fresh, *(x.contiguous() for x in saved)]


def _backward(grads: list[Tensor], inputs: list[Tensor], saved: list[Tensor], eps: float) -> list[Tensor]:
    """The gradient of each input, from those of the three losses."""
    mean, scatter, mean_r, scatter_r, delta_moments = algebra.Saved(*saved)
    params, tensors = _parameters_and_tensors(inputs)
    n_rows, chunking = _n_rows(tensors), _chunking(tensors)
    affine = algebra.hidden_affine(params, mean, scatter, n_rows, eps)
    out = algebra.output_gradients(params.weight2, scatter_r, delta_moments, n_rows, *grads)
    same = same_layout(tensors, chunking)
    chunks = [columns(x, chunking) for x in same]
    results = [torch.empty_like(x) for x in same]
    grad_chunks = [columns(x, chunking) for x in results]
    sums = pixel_passes.slope_gradients(chunks, grad_chunks, chunking, affine, mean, params.bn_bias, mean_r, out)
    grad = algebra.input_gradients(params, affine, scatter, *sums, n_rows)
    pixel_passes.subtract_correction(chunks, grad_chunks, chunking, mean, grad.constant, grad.linear)
    grad_params = ProjectorParameters(grad.weight1, grad.bias1, grad.bn_weight, grad.bn_bias, out.weight2)
    return [
        *(g.to(p.dtype).contiguous() for g, p in zip(grad_params, params, strict=True)),
        *(_in_shape_of(x, g) for x, g in zip(tensors, results, strict=True)),
    ]


def _in_shape_of(x: Tensor, grad: Tensor) -> Tensor:
    return from_rows(grad, x) if grad.shape != x.shape else grad


def _parameters_and_tensors(inputs: Sequence[Tensor]) -> tuple[ProjectorParameters, Sequence[Tensor]]:
    """The tensors that the function was given, taken apart: the projector's, and z with the predictions."""
    n_params = len(ProjectorParameters._fields)
    return ProjectorParameters(*inputs[:n_params]), inputs[n_params:]


def _n_rows(tensors: Sequence[Tensor]) -> int:
    return tensors[0].numel() // tensors[0].shape[1]


def _chunking(tensors: Sequence[Tensor]) -> Chunking:
    return chunking_for(tensors[0].device.type, compiling=torch.compiler.is_compiling())


# -- The same two functions as ops, into which torch.compile does not look


def _is_opaque(inputs: Sequence[Tensor]) -> bool:
    return torch.compiler.is_compiling() and _chunking(inputs).threads


_forward_op = custom_op("fastjepa::projected_losses_closed_form", _forward, mutates_args=())
_backward_op = custom_op("fastjepa::projected_losses_closed_form_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(inputs: list[Tensor], eps: float) -> list[Tensor]:
    params, tensors = _parameters_and_tensors(inputs)
    (hidden, channels), n_tensors = params.weight1.shape, len(tensors)
    z, n_predictions = tensors[0], n_tensors - 1
    losses = ((), (), (n_predictions,), (n_tensors, hidden), (n_tensors, hidden))
    saved = (
        (n_tensors, channels),
        (n_tensors, channels, channels),
        (hidden,),
        (hidden, hidden),
        (n_predictions, hidden, hidden),
    )
    wide = pixel_passes.compute_dtype(z.dtype)
    return [z.new_empty(s, dtype=wide) for s in losses] + [z.new_empty(s, dtype=torch.float64) for s in saved]


@_backward_op.register_fake
def _(grads: list[Tensor], inputs: list[Tensor], saved: list[Tensor], eps: float) -> list[Tensor]:
    params, tensors = _parameters_and_tensors(inputs)
    results = [torch.empty_like(x) for x in same_layout(tensors, _chunking(tensors))]
    return [
        *(torch.empty_like(p, memory_format=torch.contiguous_format) for p in params),
        *(_in_shape_of(x, g) for x, g in zip(tensors, results, strict=True)),
    ]
