"""The fused passes one behind the other, forward and backward, on rows of one process or of one rank of several.

On several ranks (`shares`), what a pass over this rank's rows leaves is gathered, and merged in the order of the ranks
by the kernels of `kernels.moments`; all between the passes is then of all rows, and computed by every rank alike. Two
collectives forward, behind the passes 1 and 2 of the package; one backward, behind the third.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastjepa.kernels.moments.centred_linear import launch_centred_linear
from fastjepa.kernels.moments.fused import merged_moments, merged_sums, moments
from fastjepa.kernels.projected_losses.activations import Operands
from fastjepa.kernels.projected_losses.algebra import ProjectorParameters
from fastjepa.kernels.projected_losses.backward import group_size, slope_gradients
from fastjepa.kernels.projected_losses.forward import activation_moments
from fastjepa.kernels.projected_losses.hidden_affine import hidden_affine
from fastjepa.kernels.projected_losses.input_gradients import input_gradients
from fastjepa.kernels.projected_losses.losses import losses
from fastjepa.kernels.projected_losses.output_gradients import output_gradients
from fastjepa.kernels.projected_losses.reference import ProjectedLosses
from fastjepa.kernels.shares import Shares


class Kept(NamedTuple):
    """What the forward pass leaves for the backward one, besides its inputs."""

    mean: Tensor  # (T, D) fp64, of the rows
    inv_std: Tensor  # (T, H) fp64; this and the next five are of `hidden_affine`
    weight1_scatter: Tensor  # (T, H, D) fp64
    wide_weight2: Tensor  # (OUT, H) fp64
    centre: Tensor  # (T, 2, BLOCK_D) fp32; this and the next two are `Operands`
    slope: Tensor  # (T, 2, BLOCK_D, SIZE_H) in the rows' dtype
    offset: Tensor  # (T, SIZE_H) fp32
    mean_r: Tensor  # (SIZE_H,) fp32; this and the next two are of `losses`
    covariance: Tensor  # (OUT, OUT) fp64
    projected: Tensor  # (T, OUT, H) fp64


def forward_stages(
    tensors: Sequence[Tensor], params: ProjectorParameters, eps: float, shares: Shares | None = None
) -> tuple[ProjectedLosses, Kept]:
    """The losses of rows (N, D), z's and each prediction's, and what `backward_stages` needs."""
    n_rows, dtype = _n_rows(tensors, shares), tensors[0].dtype
    mean, scatter = moments(tensors)
    if shares is not None:
        mean, scatter = _moments_of_all(mean, scatter, len(tensors[0]), shares)
    affine = hidden_affine(params, mean, scatter, n_rows, eps, dtype)
    sums = _sum_of_all(activation_moments(tensors, affine.operands, affine.shift), shares)
    found = losses(sums, affine.shift, affine.wide_weight2, n_rows)
    results = ProjectedLosses(*found[:3], affine.batch_mean, affine.batch_var)
    kept = Kept(
        mean, affine.inv_std, affine.weight1_scatter, affine.wide_weight2, *affine.operands,
        found.mean_r, found.covariance, found.projected,
    )  # fmt: skip
    return results, kept


def backward_stages(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    tensors: Sequence[Tensor],
    params: ProjectorParameters,
    kept: Kept,
    shares: Shares | None = None,
) -> tuple[ProjectorParameters, list[Tensor]]:
    """Gradients of the parameters and of each tensor, in their dtypes, from those of the three losses."""
    n_rows, dtype = _n_rows(tensors, shares), tensors[0].dtype
    size_h = kept.offset.shape[1]
    out = output_gradients(
        *grads, kept.covariance, kept.projected, kept.wide_weight2, n_rows, size_h, dtype, params.weight2.dtype
    )
    ops = Operands(kept.centre, kept.slope, kept.offset)
    slopes, own = slope_gradients(tensors, ops, kept.mean_r, out)
    sums = _sum_of_all(own, shares)
    grad = input_gradients(
        params, sums, group_size(size_h, dtype), kept.mean, kept.inv_std, kept.weight1_scatter, ops.slope, n_rows
    )
    outs = [v if v.dtype == dtype else torch.empty_like(x) for x, v in zip(tensors, slopes, strict=True)]
    launch_centred_linear(tensors, grad.correction, slopes, outs)
    return ProjectorParameters(grad.weight1, grad.bias1, grad.bn_weight, grad.bn_bias, out.weight2), outs


def _n_rows(tensors: Sequence[Tensor], shares: Shares | None) -> int:
    own = tensors[0].shape[0]
    return own if shares is None else sum(shares.rows(own))


def _moments_of_all(mean: Tensor, scatter: Tensor, own: int, shares: Shares) -> tuple[Tensor, Tensor]:
    """Mean (T, D) and scatter (T, D, D) of the rows of all ranks, from those of this rank's `own` rows."""
    parts = shares.filled(shares.gather(torch.cat((mean.unsqueeze(-1), scatter), -1)))
    counts = shares.filled(shares.weights(own, mean))
    return merged_moments(parts[..., 0].contiguous(), parts[..., 1:].contiguous(), counts)


def _sum_of_all(own: Tensor, shares: Shares | None) -> Tensor:
    return own if shares is None else merged_sums(shares.gather(own))
