"""The definition of the projected losses, in plain torch: every projection is materialised. Any dtype and device.

In float64 it is the truth of the tests, at any other precision the eager result that other paths are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.kernels.projected_losses import algebra
from fastjepa.kernels.shares import Shares


class ProjectedLosses(NamedTuple):
    """Losses of a state z and K predictions under one projector, and the BatchNorm statistics of the 1+K calls."""

    std_loss: Tensor  # ()
    cov_loss: Tensor  # ()
    prediction_losses: Tensor  # (K,): mean squared difference of the projections of z and of each prediction
    batch_means: Tensor  # (1+K, hidden): batch mean of the first Linear's output, for z, p1..pK; detached
    batch_vars: Tensor  # (1+K, hidden): its unbiased batch variance, as running buffers take it; detached


def as_rows(x: Tensor) -> Tensor:
    """(B, D, ...) or (N, D) → (N, D), channels last; a view where the memory allows it."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def std_and_cov_loss(features: Tensor) -> tuple[Tensor, Tensor]:
    """Hinge on each feature's standard deviation, and mean square of the off-diagonal covariance (VICReg, eq. 1–4).

    features (N, F), N ≥ 2 → two scalars. With a single feature there is no off-diagonal and the second is 0.
    """
    n = features.shape[0]
    if n < 2:
        raise ValueError(f"the variance of {n} row is undefined; at least 2 are needed")
    with torch.autocast(features.device.type, enabled=False):
        centred = features - features.mean(dim=0)
        cov = centred.T @ centred / (n - 1)
    # Not the diagonal of cov: a matrix product may be in TF32.
    return algebra.std_and_cov_from_moments(centred.square().sum(dim=0) / (n - 1), cov)


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
    """The definition: project every tensor, then compare. Arguments and results as in `closed_form`.

    Half-precision inputs are projected at their own precision; the losses are computed from the projections in fp32.
    """
    dtype = z.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    means, variances, projections = [], [], []
    for x in (z, *predictions):
        h = F.linear(as_rows(x), weight1.to(dtype), None if bias1 is None else bias1.to(dtype))
        variance, mean = torch.var_mean(h.detach().to(wide), dim=0)
        means.append(mean)
        variances.append(variance)
        y = F.batch_norm(
            h,
            None,
            None,
            None if bn_weight is None else bn_weight.to(wide),
            None if bn_bias is None else bn_bias.to(wide),
            training=True,
            eps=eps,
        )
        projections.append(F.linear(F.relu(y), weight2.to(dtype)).to(wide))
    std_loss, cov_loss = std_and_cov_loss(projections[0])
    differences = [F.mse_loss(projections[0], p) for p in projections[1:]]
    return ProjectedLosses(
        std_loss,
        cov_loss,
        torch.stack(differences) if differences else projections[0].new_zeros(0),
        torch.stack(means),
        torch.stack(variances),
    )


def check_shapes(
    op: str,
    z: Tensor,
    predictions: Sequence[Tensor],
    weight1: Tensor,
    weight2: Tensor,
    shares: Shares | None = None,
) -> None:
    """Raise a ValueError that names the argument if the shapes do not fit together.

    `shares`: whose rows these are part of, which together must be 2 or more.
    """
    if z.dim() < 2:
        raise ValueError(f"{op}: z has shape {tuple(z.shape)}; accepted: (B, D, T, H, W), (B, D, H, W) or (N, D)")
    n_rows = z.numel() // max(z.shape[1], 1)
    n_rows = n_rows if shares is None else sum(shares.rows(n_rows))
    if n_rows < 2:
        raise ValueError(f"{op}: z has shape {tuple(z.shape)}, which is {n_rows} row(s); a variance needs at least 2")
    for k, p in enumerate(predictions):
        if p.shape != z.shape or p.dtype != z.dtype:
            raise ValueError(
                f"{op}: predictions[{k}] is {tuple(p.shape)} {p.dtype}; it must be as z: {tuple(z.shape)} {z.dtype}"
            )
    if weight1.dim() != 2 or weight1.shape[1] != z.shape[1]:
        raise ValueError(f"{op}: weight1 has shape {tuple(weight1.shape)}; accepted: (hidden, {z.shape[1]})")
    if weight2.dim() != 2 or weight2.shape[1] != weight1.shape[0] or weight2.shape[0] < 2:
        raise ValueError(
            f"{op}: weight2 has shape {tuple(weight2.shape)}; accepted: (out, {weight1.shape[0]}) with out ≥ 2"
        )
