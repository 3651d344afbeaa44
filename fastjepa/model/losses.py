"""The two losses of Video JEPA, and those of a whole training step with each state projected once.

A state (B, D, T, H, W) is read as rows of D, one per pixel. Losses are computed in fp32 or better, and autocast is off
inside; the projector computes in the dtype of its parameters. The formula of the variance–covariance loss is
`kernels.projected_losses.reference.std_and_cov_loss`.

The original projects the state 1 + steps times. `projected_losses` projects it once, and moves the projector's
BatchNorm buffers as the original's calls would: VC(z); then z, p¹, z, p², …
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.kernels.projected_losses import closed_form
from fastjepa.kernels.projected_losses.reference import as_rows, std_and_cov_loss
from fastjepa.kernels.shares import current_shares
from fastjepa.model.batch_norm import has_hooks
from fastjepa.model.networks import Projector
from fastjepa.model.running_stats import BatchStatistics, advance_buffers, calls_in_order, step_order

ProjectionPath = Literal["auto", "eager", "closed_form", "fused"]


def state_rows(state: Tensor) -> Tensor:
    """(B, D, T, H, W) → (B·T·H·W, D); a view if the memory is channels-last. Raises ValueError on another rank."""
    if state.dim() != 5:
        raise ValueError(f"expected a state (B, D, T, H, W), got shape {tuple(state.shape)}")
    return as_rows(state)


def project(proj: nn.Module, state: Tensor) -> Tensor:
    """The projected rows of a state (B, D, T, H, W), (B·T·H·W, F), in fp32 or better whatever autocast says; computed
    in the dtype of the projector's parameters.
    """
    with torch.autocast(state.device.type, enabled=False):
        rows = state_rows(state)
        own = next((parameter.dtype for parameter in proj.parameters()), None)
        projected = proj(rows.to(own or torch.promote_types(rows.dtype, torch.float32)))
        return projected.to(torch.promote_types(projected.dtype, torch.float32))


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


class Group(Protocol):
    """The processes among which each batch is split, as `fastjepa.distributed.group.BatchGroup` has them."""

    sync_stats: bool  # BatchNorm and the losses take the statistics of the whole batch, not of each process's part

    def batch(self, own: int, clips: int | None) -> AbstractContextManager[None]:
        """Around the forward pass of `own` of `clips` clips (None: all have as many); ValueError for other clips."""

    def mean(self, means: Tensor) -> Tensor:
        """Means over the whole batch from each process's, any shape, differentiable."""

    def std_and_cov_loss(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """`std_and_cov_loss` of the features of all, of which (N, F) are this process's."""

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum over all."""


class Losses(NamedTuple):
    """std_loss and cov_loss of the projected state, scalars; prediction_losses (K,), one for each prediction."""

    std_loss: Tensor
    cov_loss: Tensor
    prediction_losses: Tensor


class HiddenLayer(NamedTuple):
    """The layers of a projector with one hidden layer, Linear → BatchNorm1d → ReLU → Linear without bias."""

    linear1: nn.Linear
    batch_norm: nn.BatchNorm1d
    linear2: nn.Linear


def hidden_layer(projector: nn.Module, *, any_mode: bool = False) -> HiddenLayer | str:
    """The projector's layers if the closed form covers it as it is now; otherwise why it does not.

    `any_mode` looks at the structure only, not at whether the projector is in eval mode now.
    """
    net = getattr(projector, "net", None)
    if not isinstance(net, nn.Sequential) or not _is_its_net(projector):
        return f"{type(projector).__name__} is not a Sequential `net`"
    if any(has_hooks(module) for module in projector.modules()):
        return "the projector has hooks"
    layers: list[Any] = list(net)
    # Exact types: a subclass, which a reparametrisation makes, may compute something else.
    if [type(layer) for layer in layers] != [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]:
        names = " → ".join(type(layer).__name__ for layer in layers)
        return f"the projector is {names}, not Linear → BatchNorm1d → ReLU → Linear"
    found = HiddenLayer(layers[0], layers[1], layers[3])
    if found.linear2.out_features < 2:
        return "the projector has a single feature, which has no covariances"
    if found.linear2.bias is not None:
        return "the projector's last Linear has a bias"
    if not (any_mode or found.batch_norm.training) and found.batch_norm.track_running_stats:
        return "the projector is in eval mode, where it uses running statistics and not the batch's"
    return found


_tried: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _is_its_net(projector: Any) -> bool:
    """Whether a projector computes what its `net` does: ours is known to, another is tried, once, on a copy."""
    if type(projector).forward is Projector.forward or type(projector) is nn.Sequential:
        return True
    if projector not in _tried:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
                copies: list[Any] = [copy.deepcopy(projector).cpu().double().train() for _ in range(2)]
                features = next(layer.in_features for layer in copies[0].modules() if isinstance(layer, nn.Linear))
                rows = torch.randn(8, features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
                _tried[projector] = torch.equal(copies[0](rows), copies[1].net(rows))
        except Exception:  # whatever code of the user's raises
            _tried[projector] = False
    return _tried[projector]


def projected_losses(
    vc_proj: nn.Module,
    pred_proj: nn.Module,
    state: Tensor,
    predictions: Sequence[Tensor],
    *,
    path: ProjectionPath = "auto",
    group: Group | None = None,
) -> Losses:
    """The unweighted losses of one parallel unroll, differentiable in everything; moves the projectors' buffers.

    Args:
        vc_proj, pred_proj: the projectors of the two losses; one module in a published JEPA.
        state, predictions: z and p¹..pᴷ, each (B, D, T, H, W).
        path: "eager" materialises the projections; "closed_form" needs only moments of the rows. "auto" takes the
            closed form on a CPU, where it was measured faster and smaller (bench/results), and eager elsewhere.
        group: inside its `batch`, losses and buffers are those of the whole batch. The gradients of states are exact;
            those of parameters are parts, whose sum over the processes is the whole.

    Raises:
        ValueError: an unknown path, or one that does not cover these projectors; the message says why.
    """
    if path not in get_args(ProjectionPath):
        raise ValueError(f"projection must be one of {', '.join(get_args(ProjectionPath))}; got {path!r}")
    if path == "fused":
        raise ValueError("projection='fused' takes the losses that fastjepa.accelerate(jepa) swaps in")
    layers = hidden_layer(vc_proj) if vc_proj is pred_proj else "the two losses have different projectors"
    if path == "eager" or (path == "auto" and (state.device.type != "cpu" or isinstance(layers, str))):
        return _eager(vc_proj, pred_proj, state, predictions, group)
    if isinstance(layers, str):
        raise ValueError(f"projection={path!r} is not supported: {layers}; use 'eager' or 'auto'")
    return closed_form_losses(layers, state, predictions, step_order(len(predictions), with_vc=True))


def closed_form_losses(
    layers: HiddenLayer,
    state: Tensor,
    predictions: Sequence[Tensor],
    order: Sequence[int],
    compute: Callable[..., Any] = closed_form.projected_losses,
) -> Losses:
    """The losses without materialised projections; moves the projector's buffers as its calls in `order` would, where
    0 is the state and k the k-th prediction.

    `compute` is the closed form in plain torch, which gets states in fp32 or better, or an op that upcasts itself.
    """
    linear1, norm, linear2 = layers
    wide = torch.promote_types(linear1.weight.dtype, torch.float32)
    if compute is closed_form.projected_losses:
        dtype = torch.promote_types(state.dtype, wide)
        state, predictions = state.to(dtype), [prediction.to(dtype) for prediction in predictions]
    given = (linear1.weight, linear1.bias, norm.weight, norm.bias, linear2.weight)
    parameters = [None if parameter is None else parameter.to(wide) for parameter in given]
    with torch.autocast(state.device.type, enabled=False):
        found = compute(state, predictions, *parameters, norm.eps, shares=current_shares())
    calls = [BatchStatistics(*call) for call in zip(found.batch_means, found.batch_vars, strict=True)]
    advance_buffers(norm, order, calls)
    return Losses(found.std_loss, found.cov_loss, found.prediction_losses)


def _eager(
    vc_proj: nn.Module, pred_proj: nn.Module, state: Tensor, predictions: Sequence[Tensor], group: Group | None
) -> Losses:
    shared = vc_proj is pred_proj
    order = step_order(len(predictions), with_vc=shared)
    calls = [partial(project, pred_proj, x) for x in (state, *predictions)]
    target, *projected = calls_in_order(pred_proj, order, calls)
    features = target if shared else project(vc_proj, state)
    std_loss, cov_loss = std_and_cov_loss(features) if group is None else group.std_and_cov_loss(features)
    losses = [F.mse_loss(prediction, target) for prediction in projected]
    prediction_losses = torch.stack(losses) if losses else target.new_zeros(0)
    if losses and group is not None:
        prediction_losses = group.mean(prediction_losses)
    return Losses(std_loss, cov_loss, prediction_losses)
