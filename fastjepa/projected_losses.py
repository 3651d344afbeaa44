"""The projected losses of a training step, each state projected once, by one of several paths to the same numbers.

The original projects the state 1 + steps times. Here it is projected once, and the projector's BatchNorm buffers are
moved as the original's calls would move them: VC(z); then z, p¹, z, p², …
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.losses import project, std_and_cov_loss
from fastjepa.running_stats import BatchStatisticsRecorder, fold_updates, updating_batch_norms

ProjectionPath = Literal["auto", "eager"]


class Losses(NamedTuple):
    """std_loss and cov_loss of the projected state, scalars; prediction_losses (K,), one for each prediction."""

    std_loss: Tensor
    cov_loss: Tensor
    prediction_losses: Tensor


def projected_losses(
    regularizer: nn.Module,
    predcost: nn.Module,
    state: Tensor,
    predictions: Sequence[Tensor],
    *,
    path: ProjectionPath = "auto",
) -> Losses:
    """The unweighted losses of one parallel unroll, differentiable in everything; moves the projectors' buffers.

    Args:
        regularizer: a `VCLoss`, or anything like it: `proj`, `std_coeff` and `cov_coeff`.
        predcost: a `SquareLossSeq`, or anything like it: `proj`.
        state: z (B, D, T, H, W).
        predictions: p¹..pᴷ, of the same shape.
        path: "eager" materialises the projections; "auto" chooses.
    """
    return _eager(regularizer.proj, predcost.proj, state, predictions)  # type: ignore[arg-type]


def _eager(vc_proj: nn.Module, pred_proj: nn.Module, state: Tensor, predictions: Sequence[Tensor]) -> Losses:
    shared = vc_proj is pred_proj
    with BatchStatisticsRecorder(pred_proj) as recorder:
        target, target_stats = recorder.call(lambda: project(pred_proj, state))
        losses, prediction_stats = [], []
        for prediction in predictions:
            projected, statistics = recorder.call(lambda p=prediction: project(pred_proj, p))  # type: ignore[misc]
            losses.append(F.mse_loss(projected, target))
            prediction_stats.append(statistics)
    std_loss, cov_loss = std_and_cov_loss(target if shared else project(vc_proj, state))
    for i, layer in enumerate(updating_batch_norms(pred_proj)):
        calls = [target_stats[i]] if shared else []  # VC(z)
        for statistics in prediction_stats:
            calls += [target_stats[i], statistics[i]]
        fold_updates(layer, calls)
    return Losses(std_loss, cov_loss, torch.stack(losses) if losses else target.new_zeros(0))
