"""The small-matrix half of the projected losses: everything between two passes over the rows.

The projector is P(x) = W2·relu(BN(W1·x + b1)) on rows x of D channels, with `hidden` = H and `out` = O features. Index
t = 0 is the state z, t = 1..K are the predictions; a train-mode BatchNorm uses each tensor's own statistics. All sizes
here are at most 128, so everything is computed in float64: it costs nothing and keeps every cancellation harmless.

    N rows  T = 1+K tensors  D channels  H hidden  O out

Notation: μ, M2 mean and scatter Σ(x−μ)(x−μ)ᵀ of a tensor; inv = 1/sqrt(var+eps); A = γ·inv∘W1, so that the
BatchNorm output is y = A(x−μ) + β; r = relu(y); for each prediction Δ = r(z) − r(p).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

STD_EPS = 1e-4  # inside the square root of the standard-deviation hinge


class ProjectorParameters(NamedTuple):
    """The projector's parameters, any floating dtype."""

    weight1: Tensor  # (H, D)
    bias1: Tensor  # (H,)
    bn_weight: Tensor  # (H,)
    bn_bias: Tensor  # (H,)
    weight2: Tensor  # (O, H)


class Saved(NamedTuple):
    """What the forward passes over the rows leave for the backward ones; float64."""

    mean: Tensor  # (T, D) of the rows
    scatter: Tensor  # (T, D, D) of the rows
    mean_r: Tensor  # (H,) of r(z)
    scatter_r: Tensor  # (H, H) of r(z)
    delta_moments: Tensor  # (K, H, H): ΣΔΔᵀ


def merged_moments(mean: Tensor, scatter: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The moments (T, D), (T, D, D) of all rows from those of P parts, (P, T, D) and (P, T, D, D), of `rows` (P,) each.

    Chan, Golub and LeVeque 1983, for all parts at once; relative to the first, so that an offset costs no precision.
    """
    rows = rows.view(-1, 1, 1)
    apart = mean - mean[0]
    shift = (apart * (rows / rows.sum())).sum(0)
    apart = apart - shift
    return mean[0] + shift, scatter.sum(0) + torch.einsum("ptd,pte->tde", rows * apart, apart)


class HiddenAffine(NamedTuple):
    """Each tensor's first Linear and BatchNorm as one map y = A(x − μ) + β, with its statistics; float64."""

    slope: Tensor  # (T, H, D): A
    inv_std: Tensor  # (T, H)
    hidden_mean: Tensor  # (T, H): batch mean of W1·x + b1
    hidden_var: Tensor  # (T, H): its unbiased batch variance
    shift: Tensor  # (H,): a guess of the mean of r(z)


def hidden_affine(params: ProjectorParameters, mean: Tensor, scatter: Tensor, n_rows: int, eps: float) -> HiddenAffine:
    """BatchNorm statistics of the hidden layer from the mean (T, D) and scatter (T, D, D) of its input.

    `shift` is what the mean of r would be if y were Gaussian. Summing r − shift instead of r keeps Σrrᵀ free of
    cancellation: BatchNorm fixes the mean and variance of y, so the guess is off by about one standard deviation of y
    at most.
    """
    w1, b1 = params.weight1.double(), params.bias1.double()
    gamma, beta = params.bn_weight.double(), params.bn_bias.double()
    var = torch.einsum("hd,tde,he->th", w1, scatter, w1).clamp_min(0.0) / n_rows
    inv_std = torch.rsqrt(var + eps)
    y_std = (gamma.abs() * inv_std[0] * var[0].sqrt()).clamp_min(1e-30)
    ratio = beta / y_std
    gaussian_density = torch.exp(-0.5 * ratio.square()) * 0.3989422804014327
    return HiddenAffine(
        slope=(gamma * inv_std).unsqueeze(-1) * w1,
        inv_std=inv_std,
        hidden_mean=mean @ w1.T + b1,
        hidden_var=var * (n_rows / (n_rows - 1)),
        shift=y_std * gaussian_density + beta * torch.special.ndtr(ratio),
    )


def covariance(weight2: Tensor, scatter_r: Tensor, n_rows: int) -> Tensor:
    """Covariance (O, O) of f = W2·r from the scatter (H, H) of r."""
    w2 = weight2.double()
    return w2 @ scatter_r @ w2.T / (n_rows - 1)


def std_and_cov_from_moments(variance: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """(std_loss, cov_loss) = mean_j relu(1 − sqrt(var_j + 1e-4)), and the mean square of the off-diagonal covariance.

    From `variance` (O,) and `cov` (O, O) (VICReg, eq. 1–4). With a single feature there is no off-diagonal: 0.
    """
    n = cov.shape[0]
    off_diagonal = cov - torch.diag(cov.diagonal())
    return torch.relu(1.0 - torch.sqrt(variance + STD_EPS)).mean(), off_diagonal.square().sum() / max(n * (n - 1), 1)


def vc_covariance_gradient(cov: Tensor, grad_std: Tensor, grad_cov: Tensor) -> Tensor:
    """Gradient (O, O), symmetric, of grad_std·std_loss + grad_cov·cov_loss with respect to `cov`."""
    n = cov.shape[0]
    std = torch.sqrt(cov.diagonal() + STD_EPS)
    diagonal = torch.where(std < 1.0, -0.5 / (n * std), 0.0) * grad_std
    return (2.0 / (n * (n - 1))) * grad_cov * (cov - torch.diag(cov.diagonal())) + torch.diag(diagonal)


def prediction_losses(weight2: Tensor, delta_moments: Tensor, n_rows: int) -> Tensor:
    """(K,) mean squared difference of the projections: tr(W2·ΣΔΔᵀ·W2ᵀ)/(O·N), from ΣΔΔᵀ (K, H, H)."""
    w2 = weight2.double()
    return torch.einsum("oh,khi,oi->k", w2, delta_moments, w2) / (w2.shape[0] * n_rows)


class OutputGradients(NamedTuple):
    """What the backward passes over the rows need, and the gradient of W2; float64.

    dL/dr(z) = G(r − r̄) + Σ_k c_k·M·Δ_k and dL/dr(p_k) = −c_k·M·Δ_k.
    """

    variance: Tensor  # (H, H) symmetric: G
    gram: Tensor  # (H, H) symmetric: M = W2ᵀW2
    prediction: Tensor  # (K,): c
    weight2: Tensor  # (O, H): dL/dW2


def output_gradients(
    weight2: Tensor,
    scatter_r: Tensor,
    delta_moments: Tensor,
    n_rows: int,
    grad_std: Tensor,
    grad_cov: Tensor,
    grad_prediction: Tensor,
) -> OutputGradients:
    """Differentiate the losses down to r. `grad_*` are the gradients of the three loss outputs: (), (), (K,)."""
    w2 = weight2.double()
    n_out = w2.shape[0]
    grad_scatter = vc_covariance_gradient(covariance(w2, scatter_r, n_rows), grad_std.double(), grad_cov.double())
    grad_scatter = grad_scatter / (n_rows - 1)
    c = grad_prediction.double() * (2.0 / (n_out * n_rows))
    grad_w2 = 2.0 * grad_scatter @ w2 @ scatter_r + w2 @ torch.einsum("k,khi->hi", c, delta_moments)
    return OutputGradients(2.0 * w2.T @ grad_scatter @ w2, w2.T @ w2, c, grad_w2)


class InputGradients(NamedTuple):
    """Parameter gradients, and the correction that BatchNorm's backward makes to Aᵀdy; float64.

    dx = Aᵀdy − constant − linear·(x − μ).
    """

    weight1: Tensor  # (H, D)
    bias1: Tensor  # (H,): zero, since a shift of the hidden layer is undone by BatchNorm
    bn_weight: Tensor  # (H,)
    bn_bias: Tensor  # (H,)
    constant: Tensor  # (T, D)
    linear: Tensor  # (T, D, D)


def input_gradients(
    params: ProjectorParameters,
    affine: HiddenAffine,
    scatter: Tensor,
    sum_dy: Tensor,
    dy_x: Tensor,
    slope_sum: Tensor,
    n_rows: int,
) -> InputGradients:
    """Differentiate BatchNorm and the first layer.

    From Σdy over all rows and tensors (H,), and for each tensor Q = Σdy·(x−μ)ᵀ (T, H, D) and ΣAᵀdy (T, D).

    Σdy·x̂ = inv·rowsum(W1∘Q) and Σx̂(x−μ)ᵀ = inv∘(W1·M2), so no other sum over the rows is needed.
    """
    w1, gamma = params.weight1.double(), params.bn_weight.double()
    sum_dy_xhat = affine.inv_std * (w1 * dy_x).sum(-1)  # (T, H)
    gain = gamma * affine.inv_std  # (T, H)
    xhat_x = affine.inv_std.unsqueeze(-1) * (w1 @ scatter)  # (T, H, D)
    grad_w1 = gain.unsqueeze(-1) * (dy_x - (sum_dy_xhat / n_rows).unsqueeze(-1) * xhat_x)
    slope_t = affine.slope.transpose(1, 2)  # (T, D, H)
    return InputGradients(
        weight1=grad_w1.sum(0),
        bias1=torch.zeros_like(gamma),
        bn_weight=sum_dy_xhat.sum(0),
        bn_bias=sum_dy,
        constant=slope_sum / n_rows,
        linear=slope_t @ ((affine.inv_std * sum_dy_xhat / n_rows).unsqueeze(-1) * w1),
    )
