"""Drop-in losses for a JEPA's `regularizer` and `predcost` that never materialise the projections.

They share the projector with the module they replace, and serve any loop that calls the losses one by one, as
`JEPA.unroll` does. `TrainStep` goes further and computes all losses of a step in one op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.kernels.checks import require_available
from fastjepa.kernels.projected_losses import closed_form
from fastjepa.model.losses import HiddenLayer, Losses, ProjectionPath, closed_form_losses, hidden_layer
from fastjepa.model.running_stats import step_order


class _ClosedFormLoss(nn.Module):
    """A loss of projected states. In eval mode, with hooks, or with a projector that the closed form does not cover,
    the replaced module is called.
    """

    def __init__(self, eager: nn.Module, *, fused: bool) -> None:
        super().__init__()
        self.proj: Any = eager.proj
        self.fused = fused
        # In a tuple, so that it is not a submodule: its parameters are those of `proj` and must not count twice.
        self._eager = (eager,)
        self.training = eager.training

    @property
    def projection_path(self) -> ProjectionPath:
        """How the losses are computed."""
        return "fused" if self.fused else "closed_form"

    def extra_repr(self) -> str:
        """Which of the two implementations."""
        return self.projection_path

    def step_losses(self, predcost: nn.Module, state: Tensor, predictions: list[Tensor]) -> Losses | None:
        """All losses of a step in one call, where this and `predcost` are swapped-in losses of one projector that the
        closed form covers as it is now; otherwise None. Moves the projector's buffers as the original's calls do.
        """
        layers = hidden_layer(self.proj)
        if not isinstance(predcost, _ClosedFormLoss) or predcost.proj is not self.proj or isinstance(layers, str):
            return None
        order = step_order(len(predictions), with_vc=True)
        return closed_form_losses(layers, state, predictions, order, self._op(state.device))

    def _compute(self, state: Tensor, predictions: list[Tensor]) -> Losses | None:
        layers = hidden_layer(self.proj)
        if not isinstance(layers, HiddenLayer):
            return None
        order = range(1 + len(predictions))
        return closed_form_losses(layers, state, predictions, order, self._op(state.device))

    def _op(self, device: torch.device) -> Callable[..., Any]:
        if not self.fused:
            return closed_form.projected_losses
        require_available("projected_losses", device)
        from fastjepa.kernels.projected_losses.fused import projected_losses  # needs Triton

        return projected_losses


class ClosedFormVCLoss(_ClosedFormLoss):
    """The variance–covariance loss in closed form; arguments and results of `VCLoss`."""

    @property
    def std_coeff(self) -> float:
        """Weight of the standard deviation loss; that of the replaced module, so both change together."""
        return self._eager[0].std_coeff  # type: ignore[return-value]

    @property
    def cov_coeff(self) -> float:
        """Weight of the covariance loss."""
        return self._eager[0].cov_coeff  # type: ignore[return-value]

    def forward(self, state: Tensor, actions: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """State (B, D, T, H, W) → weighted loss, unweighted loss, {"std_loss", "cov_loss"}; all scalars."""
        computed = self._compute(state, [])
        if computed is None:
            return self._eager[0](state, actions)
        std_loss, cov_loss, _ = computed
        weighted = self.std_coeff * std_loss + self.cov_coeff * cov_loss
        return weighted, std_loss + cov_loss, {"std_loss": std_loss, "cov_loss": cov_loss}


class ClosedFormSquareLoss(_ClosedFormLoss):
    """The prediction loss in closed form; arguments and results of `SquareLossSeq`."""

    def forward(self, state: Tensor, prediction: Tensor) -> Tensor:
        """Two states (B, D, T, H, W) → a scalar."""
        computed = self._compute(state, [prediction])
        if computed is None:
            return self._eager[0](state, prediction)
        return computed.prediction_losses[0]


def swap_losses(jepa: Any, *, fused: bool) -> None:
    """Put closed-form losses in the places of a JEPA's published ones, which the caller has made sure of."""
    jepa.regularizer = ClosedFormVCLoss(jepa.regularizer, fused=fused)
    jepa.predcost = ClosedFormSquareLoss(jepa.predcost, fused=fused)
