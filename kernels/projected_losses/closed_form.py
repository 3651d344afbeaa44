"""The projected losses in closed form, in plain torch: the path that a CPU takes. Any dtype and device, no Triton.

The numbers and the gradients of `reference.projected_losses` from small moments (see `algebra`): it walks over the
pixels in chunks that stay in cache and stores nothing of size (N, hidden), forward or backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastjepa.kernels.projected_losses import algebra
from fastjepa.kernels.projected_losses.algebra import ProjectorParameters
from fastjepa.kernels.projected_losses.chunk_pool import map_groups
from fastjepa.kernels.projected_losses.reference import ProjectedLosses, as_rows, check_shapes

_CHUNK = 2048  # pixels: the three (hidden, chunk) temporaries then take 1.5 MB at 64 features in fp32 and stay in L2


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
        params, tensors = _parameters_and_tensors(inputs)
        n_rows = tensors[0].numel() // tensors[0].shape[1]
        columns = [_columns(x) for x in _same_layout(tensors)]
        means, scatters = zip(*(_moments(c) for c in columns), strict=True)
        mean, scatter = torch.stack(means), torch.stack(scatters)
        affine = algebra.hidden_affine(params, mean, scatter, n_rows, eps)
        mean_r, scatter_r, delta_moments = _activation_moments(columns, affine, mean, params.bn_bias, n_rows)
        cov = algebra.covariance(params.weight2, scatter_r, n_rows)
        std_loss, cov_loss = algebra.std_and_cov_from_moments(cov.diagonal(), cov)
        prediction = algebra.prediction_losses(params.weight2, delta_moments, n_rows)
        ctx.save_for_backward(*inputs, *algebra.Saved(mean, scatter, mean_r, scatter_r, delta_moments))
        ctx.eps, ctx.n_inputs, ctx.n_rows = eps, len(inputs), n_rows
        wide = _compute_dtype(tensors[0].dtype)
        losses = ProjectedLosses(std_loss, cov_loss, prediction, affine.hidden_mean, affine.hidden_var)
        losses = ProjectedLosses(*(x.to(wide) for x in losses))
        ctx.mark_non_differentiable(losses.batch_means, losses.batch_vars)
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, saved = ctx.saved_tensors[: ctx.n_inputs], ctx.saved_tensors[ctx.n_inputs :]
        mean, scatter, mean_r, scatter_r, delta_moments = algebra.Saved(*saved)
        params, tensors = _parameters_and_tensors(inputs)
        affine = algebra.hidden_affine(params, mean, scatter, ctx.n_rows, ctx.eps)
        grad_losses = ProjectedLosses(*grads)
        out = algebra.output_gradients(
            params.weight2,
            scatter_r,
            delta_moments,
            ctx.n_rows,
            grad_losses.std_loss,
            grad_losses.cov_loss,
            grad_losses.prediction_losses,
        )
        same = _same_layout(tensors)
        columns = [_columns(x) for x in same]
        results = [torch.empty_like(x) for x in same]
        grad_columns = [_columns(x) for x in results]
        sums = _slope_gradients(columns, grad_columns, affine, mean, params.bn_bias, mean_r, out)
        grad = algebra.input_gradients(params, affine, scatter, *sums, ctx.n_rows)
        _subtract_correction(columns, grad_columns, mean, grad.constant, grad.linear)
        grad_params = ProjectorParameters(grad.weight1, grad.bias1, grad.bn_weight, grad.bn_bias, out.weight2)
        grad_tensors = [_from_rows(g, x) if g.shape != x.shape else g for g, x in zip(results, tensors, strict=True)]
        return (None, *(g.to(p.dtype) for g, p in zip(grad_params, params, strict=True)), *grad_tensors)


def _parameters_and_tensors(inputs: Sequence[Tensor]) -> tuple[ProjectorParameters, Sequence[Tensor]]:
    """The tensors that the function was given, taken apart: the projector's, and z with the predictions."""
    n_params = len(ProjectorParameters._fields)
    return ProjectorParameters(*inputs[:n_params]), inputs[n_params:]


# -- Layout: a tensor is a list of (D, L) matrices, one per batch entry, in whatever memory order it has


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _same_layout(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, so that all can be walked in the same order without copying; else their rows, (N, D)."""
    if all(x.movedim(1, -1).is_contiguous() for x in tensors):
        return [as_rows(x) for x in tensors]
    long_maps = tensors[0].dim() > 2 and tensors[0][0, 0].numel() >= _CHUNK
    if long_maps and all(x.is_contiguous() for x in tensors):
        return list(tensors)
    return [as_rows(x).contiguous() for x in tensors]


def _columns(x: Tensor) -> list[Tensor]:
    matrices = [x.T] if x.dim() == 2 else x.flatten(2).unbind(0)
    return [chunk for matrix in matrices for chunk in matrix.split(_CHUNK, dim=1)]


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    shape = (like.shape[0], *like.shape[2:], like.shape[1])
    return rows.view(shape).movedim(-1, 1)


# -- The passes


def _moments(columns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (D,) and scatter (D, D) in float64: every chunk about its own centre, combined by Chan's formula."""
    wide = _compute_dtype(columns[0].dtype)

    def moments_of_group(group: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        found = []
        for chunk in group:
            x = chunk.to(wide)
            centre = x.mean(1, keepdim=True)
            x = x - centre
            # The centre is rounded; the exact chunk mean is centre + residual.
            residual = x.mean(1).double()
            scatter = (x @ x.T).double() - x.shape[1] * torch.outer(residual, residual)
            found.append((centre[:, 0].double() + residual, scatter))
        return found

    means, scatters = zip(*chain.from_iterable(map_groups(moments_of_group, columns)), strict=True)
    counts = [chunk.shape[1] for chunk in columns]
    n = torch.tensor(counts, dtype=torch.float64, device=columns[0].device).unsqueeze(1)
    chunk_means = torch.stack(means)
    mean = (n * chunk_means).sum(0) / n.sum()
    apart = chunk_means - mean
    return mean, torch.stack(scatters).sum(0) + (n * apart).T @ apart


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
    columns: Sequence[Sequence[Tensor]], affine: algebra.HiddenAffine, mean: Tensor, bn_bias: Tensor, n_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (H,) and scatter (H, H) of r(z), and ΣΔΔᵀ (K, H, H); float64."""
    affines = _affines(affine, mean, bn_bias, columns[0][0].dtype)
    wide = affines[0].slope.dtype
    shift = affine.shift.to(wide).unsqueeze(1)
    hidden = shift.shape[0]

    def moments_of_group(group: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor]:
        total = mean.new_zeros(hidden)
        second = mean.new_zeros(hidden, hidden)
        delta_moments = mean.new_zeros(len(columns) - 1, hidden, hidden)
        for chunks in group:
            r = affines[0](chunks[0])[1]
            for k, chunk in enumerate(chunks[1:]):
                delta = affines[k + 1](chunk)[1].sub_(r)
                delta_moments[k] += delta @ delta.T
            r -= shift
            total += r.sum(1)
            second += r @ r.T
        return total, second, delta_moments

    total, second, delta_moments = _sums(map_groups(moments_of_group, list(zip(*columns, strict=True))))
    residual = total / n_rows
    return residual + shift[:, 0], second - n_rows * torch.outer(residual, residual), delta_moments


def _slope_gradients(
    columns: Sequence[Sequence[Tensor]],
    grad_columns: Sequence[Sequence[Tensor]],
    affine: algebra.HiddenAffine,
    mean: Tensor,
    bn_bias: Tensor,
    mean_r: Tensor,
    out: algebra.OutputGradients,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write Aᵀdy of every tensor to `grad_columns`; return what `algebra.input_gradients` takes, in float64."""
    affines = _affines(affine, mean, bn_bias, columns[0][0].dtype)
    wide = affines[0].slope.dtype
    variance, gram = out.variance.to(wide), out.gram.to(wide)
    scaled_grams = [c * gram for c in out.prediction.to(wide)]
    centre_r = mean_r.to(wide).unsqueeze(1)

    def gradients_of_group(group: Sequence[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]) -> tuple[Tensor, Tensor]:
        sum_dy = torch.zeros_like(affine.inv_std)
        dy_x = torch.zeros_like(affine.slope)

        def reduce(t: int, dy: Tensor, x: Tensor, grad_chunk: Tensor) -> None:
            grad_chunk.copy_(affines[t].slope.T @ dy)
            sum_dy[t] += dy.sum(1)
            dy_x[t] += dy @ x.T

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

    pairs = list(zip(zip(*columns, strict=True), zip(*grad_columns, strict=True), strict=True))
    sum_dy, dy_x = _sums(map_groups(gradients_of_group, pairs))
    # The chunks were centred at the rounded mean.
    rounding = mean - torch.stack([a.centre[:, 0].double() for a in affines])
    dy_x -= sum_dy.unsqueeze(-1) * rounding.unsqueeze(1)
    return sum_dy.sum(0), dy_x, torch.einsum("th,thd->td", sum_dy, affine.slope)


def _subtract_correction(
    columns: Sequence[Sequence[Tensor]],
    grad_columns: Sequence[Sequence[Tensor]],
    mean: Tensor,
    constant: Tensor,
    linear: Tensor,
) -> None:
    """grad ← grad − constant − linear·(x − μ), in place."""
    wide = _compute_dtype(columns[0][0].dtype)
    centre = mean.to(wide)
    constant = constant - torch.einsum("tde,te->td", linear, mean - centre.double())
    for t, (chunks, grad_chunks) in enumerate(zip(columns, grad_columns, strict=True)):
        c, m, s = centre[t].unsqueeze(1), linear[t].to(wide), constant[t].to(wide).unsqueeze(1)

        def correct(group: Sequence[tuple[Tensor, Tensor]], c: Tensor = c, m: Tensor = m, s: Tensor = s) -> None:
            for chunk, grad_chunk in group:
                grad_chunk.copy_(grad_chunk.to(wide) - torch.addmm(s, m, chunk.to(wide) - c))

        map_groups(correct, list(zip(chunks, grad_chunks, strict=True)))


def _sums(groups: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """The sum over groups of each of their tensors, in the order of the groups."""
    return [torch.stack(tensors).sum(0) for tensors in zip(*groups, strict=True)]
