"""The two losses of Video JEPA, eager and literal. Both read a state (B, D, T, H, W) as rows of D, one per pixel.

Losses are computed in fp32 or better: rows of a bf16 state are upcast, and autocast is off inside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STD_EPS = 1e-4  # inside the square root of the standard deviation


def state_rows(state: Tensor) -> Tensor:
    """(B, D, T, H, W) → (B·T·H·W, D); a view if the memory is channels-last. Raises ValueError on another rank."""
    if state.dim() != 5:
        raise ValueError(f"expected a state (B, D, T, H, W), got shape {tuple(state.shape)}")
    return state.permute(0, 2, 3, 4, 1).flatten(0, 3)


def project(proj: nn.Module, state: Tensor) -> Tensor:
    """The projected rows of a state (B, D, T, H, W), (B·T·H·W, F), in fp32 or better whatever autocast says."""
    with torch.autocast(state.device.type, enabled=False):
        rows = state_rows(state)
        return proj(rows.to(torch.promote_types(rows.dtype, torch.float32)))


def std_and_cov_loss(features: Tensor) -> tuple[Tensor, Tensor]:
    """Hinge on each feature's standard deviation, and mean square of the off-diagonal covariance (VICReg, eq. 1–4).

    features (N, F), N ≥ 2 → two scalars. With a single feature there is no off-diagonal and the second is 0.
    """
    n, f = features.shape
    if n < 2:
        raise ValueError(f"the variance of {n} row is undefined; at least 2 are needed")
    with torch.autocast(features.device.type, enabled=False):
        centred = features - features.mean(dim=0)
        cov = centred.T @ centred / (n - 1)
    std = (centred.square().sum(dim=0) / (n - 1) + STD_EPS).sqrt()
    std_loss = F.relu(1 - std).mean()
    off_diagonal = cov - torch.diag(torch.diagonal(cov))
    return std_loss, off_diagonal.square().sum() / max(f * (f - 1), 1)


class VCLoss(nn.Module):
    """The variance–covariance loss of the projected state, which keeps states from collapsing."""

    def __init__(self, std_coeff: float, cov_coeff: float, proj: nn.Module | None = None) -> None:
        super().__init__()
        self.std_coeff = std_coeff
        self.cov_coeff = cov_coeff
        self.proj: nn.Module = nn.Identity() if proj is None else proj

    def forward(self, state: Tensor, actions: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """State (B, D, T, H, W) → weighted loss, unweighted loss, {"std_loss", "cov_loss"}; all scalars.

        `actions` is accepted, because `JEPA.unroll` passes it to every regularizer, and not used.
        """
        std_loss, cov_loss = std_and_cov_loss(project(self.proj, state))
        weighted = self.std_coeff * std_loss + self.cov_coeff * cov_loss
        return weighted, std_loss + cov_loss, {"std_loss": std_loss, "cov_loss": cov_loss}


class SquareLossSeq(nn.Module):
    """Mean squared difference of two projected states. Gradients flow into both: nothing is stopped."""

    def __init__(self, proj: nn.Module | None = None) -> None:
        super().__init__()
        self.proj: nn.Module = nn.Identity() if proj is None else proj

    def forward(self, state: Tensor, prediction: Tensor) -> Tensor:
        """Two states (B, D, T, H, W) → a scalar."""
        target = project(self.proj, state)  # the state goes first: BatchNorm buffers remember the order
        return F.mse_loss(project(self.proj, prediction), target)
