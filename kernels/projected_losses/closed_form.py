"""The projected losses in closed form, in plain torch: the path that a CPU takes. Any dtype and device, no Triton.

The numbers and the gradients of `reference.projected_losses` from small moments (see `algebra`): it walks over the
pixels in chunks (see `chunks`) and keeps nothing of size (N, hidden), forward or backward.

Of rows on several ranks (`shares`), the sums of each pass are gathered, and all that follows is of all rows: two
collectives forward, one backward.

Under torch.compile the passes are traced, so that the compiler may fuse them; on a CPU, whose threads it cannot trace,
forward and backward are one op each instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from fastjepa.kernels.projected_losses import algebra, pixel_passes
from fastjepa.kernels.projected_losses.algebra import ProjectorParameters
from fastjepa.kernels.projected_losses.chunks import Chunking, chunking_for, columns, from_rows, same_layout
from fastjepa.kernels.projected_losses.reference import ProjectedLosses, check_shapes
from fastjepa.kernels.shares import Shares, refuse_compiled

Sums = TypeVar("Sums", pixel_passes.ActivationSums, pixel_passes.SlopeSums)


def projected_losses(
    z: Tensor,
    predictions: Sequence[Tensor],
    weight1: Tensor,
    bias1: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight2: Tensor,
    eps: float,
    shares: Shares | None = None,
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
        shares: where the rows are one rank's of several. Results are those of all rows, the same bits on each rank. So
            are gradients of rows; those of parameters are given by the first rank, and are zeros on the others.

    Raises:
        RuntimeError: shares under torch.compile.
        ValueError: a shape that does not fit.
    """
    check_shapes("projected_losses", z, predictions, weight1, weight2, shares)
    refuse_compiled(shares, "projected_losses")
    ones = weight1.new_ones(weight1.shape[0]) if bn_weight is None else bn_weight
    bias = weight1.new_zeros(weight1.shape[0]) if bias1 is None else bias1
    offset = weight1.new_zeros(weight1.shape[0]) if bn_bias is None else bn_bias
    return ProjectedLosses(*_ClosedForm.apply(eps, shares, weight1, bias, ones, offset, weight2, z, *predictions))


class _ClosedForm(torch.autograd.Function):
    """Two passes over the pixels forward, two backward. Saves the inputs and a few small matrices."""

    @staticmethod
    def forward(ctx: Any, eps: float, shares: Shares | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        opaque = _is_opaque(inputs)
        results = _forward_op(list(inputs), eps) if opaque else _forward(list(inputs), eps, shares)
        losses = ProjectedLosses(*results[: len(ProjectedLosses._fields)])
        ctx.save_for_backward(*inputs, *results[len(losses) :])
        ctx.eps, ctx.shares, ctx.n_inputs = eps, shares, len(inputs)
        ctx.mark_non_differentiable(losses.batch_means, losses.batch_vars)
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, saved = ctx.saved_tensors[: ctx.n_inputs], ctx.saved_tensors[ctx.n_inputs :]
        grad_losses = ProjectedLosses(*grads)
        given = (list(grad_losses[:3]), list(inputs), list(saved), ctx.eps)
        return (None, None, *(_backward_op(*given) if _is_opaque(inputs) else _backward(*given, ctx.shares)))


def _forward(inputs: list[Tensor], eps: float, shares: Shares | None = None) -> list[Tensor]:
    """From the parameters, z and the predictions: the fields of `ProjectedLosses`, then those of `algebra.Saved`."""
    params, tensors = _parameters_and_tensors(inputs)
    n_rows, chunking, dtype = _n_rows(tensors, shares), _chunking(tensors), tensors[0].dtype
    chunks = [columns(x, chunking) for x in same_layout(tensors, chunking)]
    means, scatters = zip(*(pixel_passes.row_moments(c, chunking) for c in chunks), strict=True)
    mean, scatter = _of_all_rows(torch.stack(means), torch.stack(scatters), _n_rows(tensors), shares)
    affine = algebra.hidden_affine(params, mean, scatter, n_rows, eps)
    centre = pixel_passes.centres(mean, scatter, n_rows, tensors[0].dtype)
    sums = _summed(pixel_passes.activation_sums(chunks, chunking, affine, mean, centre, params.bn_bias), shares)
    mean_r, scatter_r, delta_moments = pixel_passes.activation_moments(sums, affine, dtype, n_rows)
    cov = algebra.covariance(params.weight2, scatter_r, n_rows)
    std_loss, cov_loss = algebra.std_and_cov_from_moments(cov.diagonal(), cov)
    prediction = algebra.prediction_losses(params.weight2, delta_moments, n_rows)
    losses = ProjectedLosses(std_loss, cov_loss, prediction, affine.hidden_mean, affine.hidden_var)
    wide = pixel_passes.compute_dtype(dtype)
    saved = algebra.Saved(mean, scatter, mean_r, scatter_r, delta_moments)
    # A loss is a copy even where nothing changes. Traced by torch 2.11, a forward returns its intermediates as well; of
    # two results that are one tensor, autograd gives the gradient to the last, here an intermediate that no one uses.
    fresh = (x.to(wide, copy=True, memory_format=torch.contiguous_format) for x in losses)
    return [*fresh, *(x.contiguous() for x in saved)]


def _backward(
    grads: list[Tensor], inputs: list[Tensor], saved: list[Tensor], eps: float, shares: Shares | None = None
) -> list[Tensor]:
    """The gradient of each input, from those of the three losses."""
    mean, scatter, mean_r, scatter_r, delta_moments = algebra.Saved(*saved)
    params, tensors = _parameters_and_tensors(inputs)
    n_rows, chunking = _n_rows(tensors, shares), _chunking(tensors)
    affine = algebra.hidden_affine(params, mean, scatter, n_rows, eps)
    centre = pixel_passes.centres(mean, scatter, n_rows, tensors[0].dtype)
    out = algebra.output_gradients(params.weight2, scatter_r, delta_moments, n_rows, *grads)
    same = same_layout(tensors, chunking)
    chunks = [columns(x, chunking) for x in same]
    results = [torch.empty_like(x) for x in same]
    grad_chunks = [columns(x, chunking) for x in results]
    own = pixel_passes.slope_gradients(chunks, grad_chunks, chunking, affine, mean, centre, params.bn_bias, mean_r, out)
    sums = pixel_passes.centred_slope_sums(_summed(own, shares), affine, mean, centre)
    grad = algebra.input_gradients(params, affine, scatter, *sums, n_rows)
    pixel_passes.subtract_correction(chunks, grad_chunks, chunking, mean, centre, grad.constant, grad.linear)
    grad_params = ProjectorParameters(grad.weight1, grad.bias1, grad.bn_weight, grad.bn_bias, out.weight2)
    if shares is not None:
        grad_params = ProjectorParameters(*(shares.once(g) for g in grad_params))
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


def _n_rows(tensors: Sequence[Tensor], shares: Shares | None = None) -> int:
    """Rows of each tensor; with shares, of all ranks."""
    own = tensors[0].numel() // tensors[0].shape[1]
    return own if shares is None else sum(shares.rows(own))


def _chunking(tensors: Sequence[Tensor]) -> Chunking:
    return chunking_for(tensors[0].device.type, compiling=torch.compiler.is_compiling())


# -- One collective each, where rows lie on several ranks


def _of_all_rows(mean: Tensor, scatter: Tensor, own: int, shares: Shares | None) -> tuple[Tensor, Tensor]:
    """Mean (T, D) and scatter (T, D, D) of the rows of all ranks, from those of this rank's `own` rows."""
    if shares is None:
        return mean, scatter
    parts = shares.filled(shares.gather(torch.cat((mean.unsqueeze(-1), scatter), -1)))
    return algebra.merged_moments(parts[..., 0], parts[..., 1:], shares.filled(shares.weights(own, mean)))


def _summed(own: Sums, shares: Shares | None) -> Sums:
    """Sums over the rows of all ranks, from those over this rank's."""
    if shares is None:
        return own
    flat = shares.sum(torch.cat([x.flatten() for x in own]))
    sizes = [x.numel() for x in own]
    return type(own)(*(part.view(x.shape) for part, x in zip(flat.split(sizes), own, strict=True)))


# -- The same two functions as ops, into which torch.compile does not look


def _is_opaque(inputs: Sequence[Tensor]) -> bool:
    return torch.compiler.is_compiling() and _chunking(inputs).threads


@custom_op("fastjepa::projected_losses_closed_form", mutates_args=())
def _forward_op(inputs: list[Tensor], eps: float) -> list[Tensor]:
    return _forward(inputs, eps)


@custom_op("fastjepa::projected_losses_closed_form_backward", mutates_args=())
def _backward_op(grads: list[Tensor], inputs: list[Tensor], saved: list[Tensor], eps: float) -> list[Tensor]:
    return _backward(grads, inputs, saved, eps)


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
