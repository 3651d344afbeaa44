"""The two losses of Video JEPA, eager. Both read a state (B, D, T, H, W) as rows of D, one per pixel.

Losses are computed in fp32 or better: rows of a bf16 state are upcast, and autocast is off inside. The formula of the
variance–covariance loss is `kernels.projected_losses.reference.std_and_cov_loss`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.kernels.projected_losses.reference import as_rows, std_and_cov_loss


def state_rows(state: Tensor) -> Tensor:
    """(B, D, T, H, W) → (B·T·H·W, D); a view if the memory is channels-last. Raises ValueError on another rank."""
    if state.dim() != 5:
        raise ValueError(f"expected a state (B, D, T, H, W), got shape {tuple(state.shape)}")
    return as_rows(state)


def project(proj: nn.Module, state: Tensor) -> Tensor:
    """The projected rows of a state (B, D, T, H, W), (B·T·H·W, F), in fp32 or better whatever autocast says."""
    with torch.autocast(state.device.type, enabled=False):
        rows = state_rows(state)
        return proj(rows.to(torch.promote_types(rows.dtype, torch.float32)))


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
