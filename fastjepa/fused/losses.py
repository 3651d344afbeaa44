"""Drop-in losses for a JEPA's `regularizer` and `predcost` that never materialise the projections.

They share the projector with the module they replace, and serve any loop that calls the losses one by one, as
`JEPA.unroll` does. `TrainStep` goes further and computes all losses of a step in one op.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastjepa.distributed.batch_norm import current_shares
from fastjepa.model.projected_losses import HiddenLayer, Losses, ProjectionPath, hidden_layer, losses_from_moments
from fastjepa.model.running_stats import BatchStatistics, advance_buffers


class _ClosedFormLoss(nn.Module):
    """A loss of projected states. In eval mode the projector uses running statistics, which have no closed form: the
    replaced module is called then.
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
        """How the losses are computed; a `TrainStep` whose `projection` is "auto" follows it."""
        return "fused" if self.fused else "closed_form"

    def extra_repr(self) -> str:
        """Which of the two implementations."""
        return self.projection_path

    def _compute(self, state: Tensor, predictions: list[Tensor]) -> tuple[Losses, list[BatchStatistics]] | None:
        layers = hidden_layer(self.proj)
        if not isinstance(layers, HiddenLayer):
            return None
        losses, calls = losses_from_moments(layers, state, predictions, fused=self.fused, shares=current_shares())
        advance_buffers(layers.batch_norm, calls)
        return losses, calls


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
        std_loss, cov_loss, _ = computed[0]
        weighted = self.std_coeff * std_loss + self.cov_coeff * cov_loss
        return weighted, std_loss + cov_loss, {"std_loss": std_loss, "cov_loss": cov_loss}


class ClosedFormSquareLoss(_ClosedFormLoss):
    """The prediction loss in closed form; arguments and results of `SquareLossSeq`."""

    def forward(self, state: Tensor, prediction: Tensor) -> Tensor:
        """Two states (B, D, T, H, W) → a scalar."""
        computed = self._compute(state, [prediction])
        if computed is None:
            return self._eager[0](state, prediction)
        return computed[0].prediction_losses[0]
