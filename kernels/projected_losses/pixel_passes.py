"""The passes of the closed form over the pixels, in plain torch; `closed_form` puts them together.

A tensor is the list of its chunks (D, L), as `chunks.columns` gives them, the same list for each of the T = 1+K
tensors: z, then the predictions. Sums are float64, everything of size (hidden, L) has the dtype of `compute_dtype`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fastjepa.kernels.projected_losses import algebra
from fastjepa.kernels.projected_losses.chunks import Chunking, row_products, row_sums


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_moments(chunks: Sequence[Tensor], chunking: Chunking) -> tuple[Tensor, Tensor]:
    """Mean (D,) and scatter (D, D) in float64: every chunk about its own mean, combined by Chan's formula.

    Products are float64 too: of two groups of rows, d apart in every channel, the scatter is d² of what it is within a
    group, and the variance of a hidden feature that hardly tells the groups apart is the small difference.
    """

    def moments_of_group(group: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        found = []
        for chunk in group:
            x = chunk.double()
            mean = x.mean(1, keepdim=True)
            x = x - mean
            found.append((mean[:, 0], row_products(x, x)))
        return found

    means, scatters = zip(*chain.from_iterable(chunking.map(moments_of_group, chunks)), strict=True)
    chunk_means = torch.stack(means)
    n = _counts(chunks, chunk_means)
    mean = (n * chunk_means).sum(0) / n.sum()
    apart = chunk_means - mean
    return mean, torch.stack(scatters).sum(0) + (n * apart).T @ apart


def _counts(chunks: Sequence[Tensor], like: Tensor) -> Tensor:
    """The pixels in every chunk, (n_chunks, 1). Made where `like` is: a copy from the host would wait for a GPU."""
    counts: list[int] = [chunk.shape[1] for chunk in chunks]
    # One fill for all that are alike, and one for each change of length, at the end of every batch entry.
    starts = [i for i, count in enumerate(counts) if i == 0 or count != counts[i - 1]]
    ends = [*starts[1:], len(counts)]
    return torch.cat([like.new_full((end - start, 1), counts[start]) for start, end in zip(starts, ends, strict=True)])


def centres(mean: Tensor, scatter: Tensor, n_rows: int, dtype: torch.dtype) -> Tensor:
    """What the passes subtract from x (T, D): the mean, rounded, where it is far from zero, and nothing elsewhere.

    A value subtracted from one of about its size leaves an exact difference, and rows far from zero keep their
    precision. Subtracted from rows near zero it would round them away: of two groups of rows, one at 0 and one at d,
    the first would keep no more digits than the second. Without it, both have what eager has.
    """
    variance = scatter.diagonal(dim1=-2, dim2=-1) / n_rows
    return torch.where(mean.square() >= 16 * variance, mean.to(compute_dtype(dtype)).to(mean.dtype), 0.0)


class _ChunkAffine(NamedTuple):
    """y = slope·(x − centre) + offset at the compute precision; offset carries what rounding took from the centre."""

    centre: Tensor  # (D, 1)
    slope: Tensor  # (H, D)
    offset: Tensor  # (H, 1)

    def __call__(self, chunk: Tensor) -> tuple[Tensor, Tensor]:
        """(x − centre, relu(y))."""
        x = chunk.to(self.slope.dtype) - self.centre
        return x, torch.addmm(self.offset, self.slope, x).relu_()


def _affines(
    affine: algebra.HiddenAffine, mean: Tensor, centre: Tensor, bn_bias: Tensor, dtype: torch.dtype
) -> list[_ChunkAffine]:
    wide = compute_dtype(dtype)
    slope = affine.slope.to(wide)
    # With the slope as it is rounded, so that y is β where x is μ.
    offset = bn_bias.double() - torch.einsum("thd,td->th", slope.double(), mean - centre)
    return [
        _ChunkAffine(c.unsqueeze(1), s, o.unsqueeze(1))
        for c, s, o in zip(centre.to(wide), slope, offset.to(wide), strict=True)
    ]


class ActivationSums(NamedTuple):
    """Sums over the rows, with the shift s of `algebra.HiddenAffine`; float64."""

    total: Tensor  # (H,): Σ(r−s) of z
    second: Tensor  # (H, H): Σ(r−s)(r−s)ᵀ of z
    delta_moments: Tensor  # (K, H, H): ΣΔΔᵀ


def activation_sums(
    tensors: Sequence[Sequence[Tensor]],
    chunking: Chunking,
    affine: algebra.HiddenAffine,
    mean: Tensor,
    centre: Tensor,
    bn_bias: Tensor,
) -> ActivationSums:
    """The pass over the rows of which `activation_moments` makes moments."""
    affines = _affines(affine, mean, centre, bn_bias, tensors[0][0].dtype)
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

    return ActivationSums(*_sums(chunking.map(moments_of_group, list(zip(*tensors, strict=True)))))


def activation_moments(
    sums: ActivationSums, affine: algebra.HiddenAffine, dtype: torch.dtype, n_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (H,) and scatter (H, H) of r(z), and ΣΔΔᵀ (K, H, H); float64. `dtype`: of the rows that were summed."""
    residual = sums.total / n_rows
    centred = sums.second - n_rows * torch.outer(residual, residual)
    return residual + affine.shift.to(compute_dtype(dtype)), centred, sums.delta_moments


class SlopeSums(NamedTuple):
    """Sums over the rows; float64."""

    dy: Tensor  # (T, H): Σdy
    dy_x: Tensor  # (T, H, D): Σdy(x−c)ᵀ, with the centres c


def slope_gradients(
    tensors: Sequence[Sequence[Tensor]],
    grad_tensors: Sequence[Sequence[Tensor]],
    chunking: Chunking,
    affine: algebra.HiddenAffine,
    mean: Tensor,
    centre: Tensor,
    bn_bias: Tensor,
    mean_r: Tensor,
    out: algebra.OutputGradients,
) -> SlopeSums:
    """Write Aᵀdy of every tensor to `grad_tensors`; return the sums of which `centred_slope_sums` are made."""
    affines = _affines(affine, mean, centre, bn_bias, tensors[0][0].dtype)
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
    return SlopeSums(*_sums(chunking.map(gradients_of_group, pairs)))


def centred_slope_sums(
    sums: SlopeSums, affine: algebra.HiddenAffine, mean: Tensor, centre: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What `algebra.input_gradients` takes, in float64."""
    dy_x = sums.dy_x - sums.dy.unsqueeze(-1) * (mean - centre).unsqueeze(1)
    return sums.dy.sum(0), dy_x, torch.einsum("th,thd->td", sums.dy, affine.slope)


def subtract_correction(
    tensors: Sequence[Sequence[Tensor]],
    grad_tensors: Sequence[Sequence[Tensor]],
    chunking: Chunking,
    mean: Tensor,
    centre: Tensor,
    constant: Tensor,
    linear: Tensor,
) -> None:
    """grad ← grad − constant − linear·(x − μ), in place."""
    wide = compute_dtype(tensors[0][0].dtype)
    constant = constant - torch.einsum("tde,te->td", linear, mean - centre)
    for t, (chunks, grad_chunks) in enumerate(zip(tensors, grad_tensors, strict=True)):
        c, m, s = centre[t].to(wide).unsqueeze(1), linear[t].to(wide), constant[t].to(wide).unsqueeze(1)

        def correct(group: Sequence[tuple[Tensor, Tensor]], c: Tensor = c, m: Tensor = m, s: Tensor = s) -> None:
            for chunk, grad_chunk in group:
                grad_chunk.copy_(grad_chunk.to(wide) - torch.addmm(s, m, chunk.to(wide) - c))

        chunking.map(correct, list(zip(chunks, grad_chunks, strict=True)))


def _sums(groups: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """The sum over groups of each of their tensors, in the order of the groups."""
    if len(groups) == 1:
        return list(groups[0])
    return [torch.stack(tensors).sum(0) for tensors in zip(*groups, strict=True)]
