"""Losses of a batch that lies on several ranks: every rank has the value for the whole batch, and the gradient with
respect to its own part of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastjepa.kernels.projected_losses.algebra import std_and_cov_from_moments
from fastjepa.kernels.shares import Shares


def global_mean(means: Tensor, shares: Shares) -> Tensor:
    """Means over the whole batch from those over each rank's part of it, any shape: weighted by how much that is."""
    out: Tensor = _Mean.apply(means, shares)
    return out


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, means: Tensor, shares: Shares) -> Tensor:
        ctx.share = shares.share
        return shares.sum(means * shares.share)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.share, None


def global_std_and_cov_loss(features: Tensor, shares: Shares) -> tuple[Tensor, Tensor]:
    """`reference.std_and_cov_loss` of the features of all ranks, of which these (N, F) are this rank's; two scalars."""
    variance, cov = _Covariance.apply(features, shares)
    return std_and_cov_from_moments(variance, cov)


class _Covariance(torch.autograd.Function):
    """Variances (F,) and covariance (F, F). In both Σ(x − mean) = 0, so that the mean has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, shares: Shares) -> tuple[Tensor, Tensor]:
        n = sum(shares.rows(len(features)))
        if n < 2:
            raise ValueError(f"the variance of {n} row is undefined; at least 2 are needed")
        # On x − pivot, a row of each rank's own: exact for values near each other, so that a common offset costs
        # no precision.
        pivot = features[0]
        centred = features - pivot
        own_mean = centred.mean(0)
        centred -= own_mean
        with torch.autocast(features.device.type, enabled=False):
            scatter = centred.T @ centred
            # Squares apart from the diagonal: a matrix product may be in TF32.
            own = torch.cat((pivot[None], own_mean[None], centred.square().sum(0)[None], scatter))
            parts = shares.filled(shares.gather(own))
            weights = shares.filled(shares.weights(len(features), features)).unsqueeze(1)
            apart = parts[:, 1] + (parts[:, 0] - parts[0, 0])
            shift = (apart * (weights / n)).sum(0)
            apart = apart - shift
            squares = (parts[:, 2] + weights * apart.square()).sum(0)
            cov = parts[:, 3:].sum(0) + (weights * apart).T @ apart
        ctx.save_for_backward(features, pivot, shift + (parts[0, 0] - pivot))
        ctx.n = n
        return squares / (n - 1), cov / (n - 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_variance: Tensor, grad_cov: Tensor) -> tuple[Tensor | None, ...]:
        features, pivot, mean = ctx.saved_tensors
        symmetric = grad_cov + grad_cov.T + torch.diag(2 * grad_variance)
        return (features - pivot).sub_(mean) @ (symmetric / (ctx.n - 1)), None
