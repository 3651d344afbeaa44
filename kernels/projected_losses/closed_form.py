"""The projected losses in closed form, in plain torch: the path that a CPU takes. Any dtype and device, no Triton.

The numbers and the gradients of `reference.projected_losses` from small moments (see `algebra`): it walks over the
pixels in chunks (see `chunks`) and keeps nothing of size (N, hidden), forward or backward.

Under torch.compile the passes are traced, so that the compiler may fuse them; on a CPU, whose threads it cannot trace,
forward and backward are one op each instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from fastjepa.kernels.projected_losses import algebra
from fastjepa.kernels.projected_losses.algebra import ProjectorParameters
from fastjepa.kernels.projected_losses.chunks import (
    Chunking,
    chunking_for,
    columns,
    from_rows,
    row_products,
    row_sums,
    same_layout,
)
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
    means, scatters = zip(*(_moments(c, chunking) for c in chunks), strict=True)
    mean, scatter = torch.stack(means), torch.stack(scatters)
    affine = algebra.hidden_affine(params, mean, scatter, n_rows, eps)
    mean_r, scatter_r, delta_moments = _activation_moments(chunks, chunking, affine, mean, params.bn_bias, n_rows)
    cov = algebra.covariance(params.weight2, scatter_r, n_rows)
    std_loss, cov_loss = algebra.std_and_cov_from_moments(cov.diagonal(), cov)
    prediction = algebra.prediction_losses(params.weight2, delta_moments, n_rows)
    losses = ProjectedLosses(std_loss, cov_loss, prediction, affine.hidden_mean, affine.hidden_var)
    wide = _compute_dtype(tensors[0].dtype)
    saved = algebra.Saved(mean, scatter, mean_r, scatter_r, delta_moments)
    return [*(x.to(wide).contiguous() for x in losses), *(x.contiguous() for x in saved)]


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
    sums = _slope_gradients(chunks, grad_chunks, chunking, affine, mean, params.bn_bias, mean_r, out)
    grad = algebra.input_gradients(params, affine, scatter, *sums, n_rows)
    _subtract_correction(chunks, grad_chunks, chunking, mean, grad.constant, grad.linear)
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


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    wide = _compute_dtype(z.dtype)
    return [z.new_empty(s, dtype=wide) for s in losses] + [z.new_empty(s, dtype=torch.float64) for s in saved]


@_backward_op.register_fake
def _(grads: list[Tensor], inputs: list[Tensor], saved: list[Tensor], eps: float) -> list[Tensor]:
    params, tensors = _parameters_and_tensors(inputs)
    results = [torch.empty_like(x) for x in same_layout(tensors, _chunking(tensors))]
    return [
        *(torch.empty_like(p, memory_format=torch.contiguous_format) for p in params),
        *(_in_shape_of(x, g) for x, g in zip(tensors, results, strict=True)),
    ]


# -- The passes


def _moments(chunks: Sequence[Tensor], chunking: Chunking) -> tuple[Tensor, Tensor]:
    """Mean (D,) and scatter (D, D) in float64: every chunk about its own centre, combined by Chan's formula."""
    wide = _compute_dtype(chunks[0].dtype)

    def moments_of_group(group: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        found = []
        for chunk in group:
            x = chunk.to(wide)
            centre = x.mean(1, keepdim=True)
            x = x - centre
            # The centre is rounded; the exact chunk mean is centre + residual.
            residual = row_sums(x) / x.shape[1]
            scatter = row_products(x, x) - x.shape[1] * torch.outer(residual, residual)
            found.append((centre[:, 0].double() + residual, scatter))
        return found

    means, scatters = zip(*chain.from_iterable(chunking.map(moments_of_group, chunks)), strict=True)
    chunk_means = torch.stack(means)
    n = _counts(chunks, chunk_means)
    mean = (n * chunk_means).sum(0) / n.sum()
    apart = chunk_means - mean
    return mean, torch.stack(scatters).sum(0) + (n * apart).T @ apart


def _counts(chunks: Sequence[Tensor], like: Tensor) -> Tensor:
    """The pixels in every chunk, (n_chunks, 1). Made where `like` is: a copy from the host would wait for a GPU."""
    runs = [(count, len(list(run))) for count, run in groupby(chunk.shape[1] for chunk in chunks)]
    return torch.cat([like.new_full((times, 1), count) for count, times in runs])


class _ChunkAffine(NamedTuple):
    """y = slope·(x − centre) + offset at the compute precision; offset carries what rounding took from the centre."""

    centre: Tensor  # (D, 1)
    slope: Tensor  # (H, D)
    offset: Tensor  # (H, 1)

    def __call__(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """(x − centre, relu(y))."""
        x = chunk.to(self.slope.dtype) - self.centre
        return x, torch.addmm(self.offset, self.slope, x).relu_()


def _affines(affine: algebra.HiddenAffine, mean: Tensor, bn_bias: Tensor, dtype: torch.dtype) -> list[_ChunkAffine]:
    wide = _compute_dtype(dtype)
    centre = mean.to(wide)
    offset = bn_bias.double() - torch.einsum("thd,td->th", affine.slope, mean - centre.double())
    return [
        _ChunkAffine(c.unsqueeze(1), s, o.unsqueeze(1))
        for c, s, o in zip(centre, affine.slope.to(wide), offset.to(wide), strict=True)
    ]


def _activation_moments(
    tensors: Sequence[Sequence[Tensor]],
    chunking: Chunking,
    affine: algebra.HiddenAffine,
    mean: Tensor,
    bn_bias: Tensor,
    n_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (H,) and scatter (H, H) of r(z), and ΣΔΔᵀ (K, H, H); float64."""
    affines = _affines(affine, mean, bn_bias, tensors[0][0].dtype)
    wide = affines[0].slope.dtype
    shift = affine.shift.to(wide).unsqueeze(1)
    hidden = shift.shape[0]

    def moments_of_group(group: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor]:
        total = mean.new_zeros(hidden)
        second = mean.new_zeros(hidden, hidden)
        delta_moments = mean.new_zeros(len(tensors) - 1, hidden, hidden)
        for chunks in group:
            r = affines[0](chunks[0])[1]
            for k, chunk in enumerate(chunks[1:]):
                delta = affines[k + 1](chunk)[1].sub_(r)
                delta_moments[k] += row_products(delta, delta)
            r -= shift
            total += row_sums(r)
            second += row_products(r, r)
        return total, second, delta_moments

    total, second, delta_moments = _sums(chunking.map(moments_of_group, list(zip(*tensors, strict=True))))
    residual = total / n_rows
    return residual + shift[:, 0], second - n_rows * torch.outer(residual, residual), delta_moments


def _slope_gradients(
    tensors: Sequence[Sequence[Tensor]],
    grad_tensors: Sequence[Sequence[Tensor]],
    chunking: Chunking,
    affine: algebra.HiddenAffine,
    mean: Tensor,
    bn_bias: Tensor,
    mean_r: Tensor,
    out: algebra.OutputGradients,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write Aᵀdy of every tensor to `grad_tensors`; return what `algebra.input_gradients` takes, in float64."""
    affines = _affines(affine, mean, bn_bias, tensors[0][0].dtype)
    wide = affines[0].slope.dtype
    variance, gram = out.variance.to(wide), out.gram.to(wide)
    scaled_grams = [c * gram for c in out.prediction.to(wide)]
    centre_r = mean_r.to(wide).unsqueeze(1)

    def gradients_of_group(group: Sequence[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]) -> tuple[Tensor, Tensor]:
        sum_dy = torch.zeros_like(affine.inv_std)
        dy_x = torch.zeros_like(affine.slope)

        def reduce(t: int, dy: Tensor, x: Tensor, grad_chunk: Tensor) -> None:
            grad_chunk.copy_(affines[t].slope.T @ dy)
            sum_dy[t] += row_sums(dy)
            dy_x[t] += row_products(dy, x)

        for chunks, grad_chunks in group:
            x_z, r_z = affines[0](chunks[0])
            dr_z = variance @ (r_z - centre_r)
            for k, chunk in enumerate(chunks[1:]):
                x, r = affines[k + 1](chunk)
                dr = scaled_grams[k] @ (r - r_z)
                dr_z -= dr
                reduce(k + 1, torch.ops.aten.threshold_backward(dr, r, 0), x, grad_chunks[k + 1])
            reduce(0, torch.ops.aten.threshold_backward(dr_z, r_z, 0), x_z, grad_chunks[0])
        return sum_dy, dy_x

    pairs = list(zip(zip(*tensors, strict=True), zip(*grad_tensors, strict=True), strict=True))
    sum_dy, dy_x = _sums(chunking.map(gradients_of_group, pairs))
    # The chunks were centred at the rounded mean.
    rounding = mean - torch.stack([a.centre[:, 0].double() for a in affines])
    dy_x -= sum_dy.unsqueeze(-1) * rounding.unsqueeze(1)
    return sum_dy.sum(0), dy_x, torch.einsum("th,thd->td", sum_dy, affine.slope)


def _subtract_correction(
    tensors: Sequence[Sequence[Tensor]],
    grad_tensors: Sequence[Sequence[Tensor]],
    chunking: Chunking,
    mean: Tensor,
    constant: Tensor,
    linear: Tensor,
) -> None:
    """grad ← grad − constant − linear·(x − μ), in place."""
    wide = _compute_dtype(tensors[0][0].dtype)
    centre = mean.to(wide)
    constant = constant - torch.einsum("tde,te->td", linear, mean - centre.double())
    for t, (chunks, grad_chunks) in enumerate(zip(tensors, grad_tensors, strict=True)):
        c, m, s = centre[t].unsqueeze(1), linear[t].to(wide), constant[t].to(wide).unsqueeze(1)

        def correct(group: Sequence[tuple[Tensor, Tensor]], c: Tensor = c, m: Tensor = m, s: Tensor = s) -> None:
            for chunk, grad_chunk in group:
                grad_chunk.copy_(grad_chunk.to(wide) - torch.addmm(s, m, chunk.to(wide) - c))

        chunking.map(correct, list(zip(chunks, grad_chunks, strict=True)))


def _sums(groups: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """The sum over groups of each of their tensors, in the order of the groups."""
    if len(groups) == 1:
        return list(groups[0])
    return [torch.stack(tensors).sum(0) for tensors in zip(*groups, strict=True)]
