"""The projected losses of a training step, each state projected once, by one of several paths to the same numbers.

The original projects the state 1 + steps times. Here it is projected once, and the projector's BatchNorm buffers are
moved as the original's calls would move them: VC(z); then z, p¹, z, p², …
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.distributed.batch_norm import global_statistics
from fastjepa.distributed.losses import global_mean, global_std_and_cov_loss
from fastjepa.kernels.checks import require_available
from fastjepa.kernels.projected_losses import closed_form
from fastjepa.kernels.projected_losses.reference import std_and_cov_loss
from fastjepa.kernels.shares import Shares
from fastjepa.model.losses import project
from fastjepa.model.running_stats import BatchStatistics, BatchStatisticsRecorder, advance_buffers

ProjectionPath = Literal["auto", "eager", "closed_form", "fused"]


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
    if not isinstance(net, nn.Sequential):
        return f"{type(projector).__name__} has no Sequential `net`"
    match list(net):
        # Exact types: a subclass may compute something else.
        case [linear1, norm, relu, linear2] if (
            type(linear1) is nn.Linear
            and type(norm) is nn.BatchNorm1d
            and type(relu) is nn.ReLU
            and type(linear2) is nn.Linear
        ):
            if linear2.bias is not None:
                return "the projector's last Linear has a bias"
            if linear2.out_features < 2:
                return "the projector has one output, which has no covariance"
            if not (any_mode or norm.training) and norm.track_running_stats:
                return "the projector is in eval mode, where it uses running statistics and not the batch's"
            return HiddenLayer(linear1, norm, linear2)
    names = " → ".join(type(layer).__name__ for layer in net)
    return f"the projector is {names}, not Linear → BatchNorm1d → ReLU → Linear"


def shared_layers(vc_proj: nn.Module, pred_proj: nn.Module) -> HiddenLayer | str:
    """The layers if the closed form covers a step with these projectors as they are now; otherwise why it does not."""
    return hidden_layer(vc_proj) if vc_proj is pred_proj else "the two losses have different projectors"


def projected_losses(
    vc_proj: nn.Module,
    pred_proj: nn.Module,
    state: Tensor,
    predictions: Sequence[Tensor],
    *,
    path: ProjectionPath = "auto",
    shares: Shares | None = None,
) -> Losses:
    """The unweighted losses of one parallel unroll, differentiable in everything; moves the projectors' buffers.

    Args:
        vc_proj: the projector of the variance–covariance loss.
        pred_proj: the projector of the prediction losses; the same module in a published JEPA.
        state: z (B, D, T, H, W).
        predictions: p¹..pᴷ, of the same shape.
        path: "eager" materialises the projections; "closed_form" needs only moments of the rows, in plain torch;
            "fused" is the closed form as Triton kernels. "auto" takes the closed form on a CPU, where it was measured
            faster and smaller (bench/results), and eager elsewhere. States below fp32 are upcast, except in "fused".
        shares: where the clips are one rank's of several: losses, statistics and buffers are those of all of them. The
            gradients of states are exact; those of parameters are parts, whose sum over the ranks is the whole.

    Raises:
        ValueError: an unknown path, or one that does not cover these projectors; the message says why.
        RuntimeError: "fused" where kernels cannot run.
    """
    if path not in get_args(ProjectionPath):
        raise ValueError(f"projection must be one of {', '.join(get_args(ProjectionPath))}; got {path!r}")
    layers = shared_layers(vc_proj, pred_proj)
    if path == "auto":
        path = "closed_form" if state.device.type == "cpu" and isinstance(layers, HiddenLayer) else "eager"
    if path == "eager":
        return _eager(vc_proj, pred_proj, state, predictions, shares)
    if isinstance(layers, str):
        raise ValueError(f"projection={path!r} cannot be served: {layers}; use 'eager' or 'auto'")
    losses, calls = losses_from_moments(layers, state, predictions, fused=path == "fused", shares=shares)
    order = [calls[0]]  # VC(z)
    for prediction in calls[1:]:
        order += [calls[0], prediction]
    advance_buffers(layers.batch_norm, order)
    return losses


def losses_from_moments(
    layers: HiddenLayer,
    state: Tensor,
    predictions: Sequence[Tensor],
    *,
    fused: bool,
    shares: Shares | None = None,
) -> tuple[Losses, list[BatchStatistics]]:
    """The losses without materialised projections, and the batch statistics of z, p¹..pᴷ; buffers do not move.

    shares: as in `projected_losses`.
    """
    compute = closed_form.projected_losses
    if fused:
        require_available("projected_losses", state.device)
        from fastjepa.kernels.projected_losses.fused import projected_losses as compute  # needs Triton
    else:
        dtype = torch.promote_types(state.dtype, torch.float32)
        state, predictions = state.to(dtype), [prediction.to(dtype) for prediction in predictions]
    linear1, norm, linear2 = layers
    with torch.autocast(state.device.type, enabled=False):
        found = compute(
            state, predictions, linear1.weight, linear1.bias, norm.weight, norm.bias, linear2.weight, norm.eps,
            shares=shares,
        )  # fmt: skip
    calls = [BatchStatistics(*call) for call in zip(found.batch_means, found.batch_vars, strict=True)]
    return Losses(found.std_loss, found.cov_loss, found.prediction_losses), calls


def _eager(
    vc_proj: nn.Module, pred_proj: nn.Module, state: Tensor, predictions: Sequence[Tensor], shares: Shares | None
) -> Losses:
    shared = vc_proj is pred_proj
    with nullcontext() if shares is None else global_statistics(shares):
        with BatchStatisticsRecorder(pred_proj) as recorder:
            target, target_stats = recorder.call(lambda: project(pred_proj, state))
            losses, prediction_stats = [], []
            for prediction in predictions:
                projected, statistics = recorder.call(lambda p=prediction: project(pred_proj, p))  # type: ignore[misc]
                losses.append(F.mse_loss(projected, target))
                prediction_stats.append(statistics)
        features = target if shared else project(vc_proj, state)
    std_loss, cov_loss = std_and_cov_loss(features) if shares is None else global_std_and_cov_loss(features, shares)
    prediction_losses = torch.stack(losses) if losses else target.new_zeros(0)
    if losses and shares is not None:
        prediction_losses = global_mean(prediction_losses, shares)
    for i, layer in enumerate(recorder.layers):
        calls = [target_stats[i]] if shared else []  # VC(z)
        for statistics in prediction_stats:
            calls += [target_stats[i], statistics[i]]
        advance_buffers(layer, calls)
    return Losses(std_loss, cov_loss, prediction_losses)
