"""One training step of Video JEPA with its probes: each thing done once, or literally as the original repeats it.

Shapes: video (B, C, T, H, W) in [0, 1]; digit_location (B, T, 8, 8) of 0 and 1; a state (B, D, T, H, W).
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.model.jepa import JEPA, detection_loss, parallel_step
from fastjepa.model.networks import DetHead, ImageDecoder
from fastjepa.model.projected_losses import ProjectionPath, projected_losses
from fastjepa.model.running_stats import repeated_updates
from fastjepa.profiling import span

ENCODER_CALLS = 3  # the original's: one for the JEPA, one for each probe


class StepLosses(NamedTuple):
    """The losses of one step, all scalars on the training device. total = jepa + recon + det, jepa = vc + pred."""

    total: Tensor
    jepa: Tensor
    vc: Tensor
    vc_unweighted: Tensor
    std: Tensor
    cov: Tensor
    pred: Tensor
    recon: Tensor
    det: Tensor

    def detach(self) -> StepLosses:
        """The same values, cut from the graph that computed them."""
        return StepLosses(*(loss.detach() for loss in self))


class TrainStep:
    """One optimisation step; usable without the trainer: `losses = step(video, digit_location)`.

    The default does each thing once: one encoding serves the JEPA and both probes, the state is projected once, and
    BatchNorm's running buffers are advanced to where the original's repeated calls leave them. `literal=True`
    repeats everything as the original does. Both compute the same losses, gradients and buffers. Nothing here waits
    for the device: the losses come back as tensors.

    Args:
        jepa: a `JEPA`, in train mode.
        image_decoder: the reconstruction probe, which sees the state detached.
        detection_head: the detection probe, likewise.
        optimizer: steps after each backward; None leaves the gradients in place (zeroed before each step).
        steps: prediction steps of the unroll, ≥ 1.
        literal: repeat the work as the original does.
        autocast_dtype: torch.bfloat16 runs the networks in bf16 autocast; losses are always computed in fp32 or better.
        projection: how the projected losses are computed; see `fastjepa.model.projected_losses.projected_losses`.

    Raises:
        ValueError: `steps` < 1, or `literal` with a projection other than "auto" and "eager".
    """

    def __init__(
        self,
        jepa: JEPA,
        image_decoder: ImageDecoder,
        detection_head: DetHead,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        steps: int,
        literal: bool = False,
        autocast_dtype: torch.dtype | None = None,
        projection: ProjectionPath = "auto",
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if literal and projection not in ("auto", "eager"):
            raise ValueError(f"the literal step projects eagerly; projection={projection!r} cannot be served")
        self.jepa = jepa
        self.image_decoder = image_decoder
        self.detection_head = detection_head
        self.optimizer = optimizer
        self.steps = steps
        self.literal = literal
        self.autocast_dtype = autocast_dtype
        self.projection = projection

    def __call__(self, video: Tensor, digit_location: Tensor) -> StepLosses:
        """Zero the gradients, compute losses and gradients, step the optimizer; returns the losses, detached."""
        self.zero_grad()
        losses = self.losses(video, digit_location)
        with span("backward"):
            losses.total.backward()
        if self.optimizer is not None:
            with span("optimizer"):
                self.optimizer.step()
        return losses.detach()

    def zero_grad(self) -> None:
        """Drop all gradients of the JEPA and the probes."""
        for module in (self.jepa, self.image_decoder, self.detection_head):
            module.zero_grad(set_to_none=True)

    def losses(self, video: Tensor, digit_location: Tensor) -> StepLosses:
        """The losses of one step, with graph. Moves BatchNorm's running buffers as one step of the original does.

        Raises:
            ValueError: shapes that do not fit, fewer than 3 frames.
            TypeError: a video that is not floating point.
        """
        check_batch(video, digit_location)
        if self.literal:
            return self._literal(video, digit_location)
        with self._autocast(video.device):
            with span("encode"), repeated_updates(self.jepa.encoder, ENCODER_CALLS):
                state = self.jepa.encoder(video)
            predictions = self._predict(state)
        regularizer: Any = self.jepa.regularizer
        predcost: Any = self.jepa.predcost
        with span("losses"):
            std, cov, preds = projected_losses(
                regularizer.proj, predcost.proj, state, predictions, path=self._projection_path()
            )
            vc = regularizer.std_coeff * std + regularizer.cov_coeff * cov
            pred = preds.sum() / self.steps
            jepa = vc + pred
            recon = self._reconstruct(state.detach(), video)
            det = self._detect(state.detach(), digit_location)
        return StepLosses(jepa + recon + det, jepa, vc, std + cov, std, cov, pred, recon, det)

    def _projection_path(self) -> ProjectionPath:
        """What was asked for; "auto" is what the regularizer says, if it was swapped in and says something."""
        if self.projection == "auto":
            return getattr(self.jepa.regularizer, "projection_path", "auto")
        return self.projection

    def _predict(self, state: Tensor) -> list[Tensor]:
        """The predicted sequences p¹..pᴷ, each (B, D, T, H, W), of the parallel unroll."""
        predictions, current = [], state
        for step in range(1, self.steps + 1):
            with span(f"prediction step {step}"):
                _, current = parallel_step(self.jepa.predictor, state, current, None)
            predictions.append(current)
        return predictions

    def _literal(self, video: Tensor, digit_location: Tensor) -> StepLosses:
        with self._autocast(video.device):
            _, unrolled = self.jepa.unroll(video, None, nsteps=self.steps, unroll_mode="parallel")
            recon_state = self.jepa.encode(video)
            det_state = self.jepa.encode(video)
        assert unrolled is not None
        jepa, vc, vc_unweighted, parts, pred = unrolled
        recon = self._reconstruct(recon_state, video)
        det = self._detect(det_state, digit_location)
        total = jepa + recon + det
        return StepLosses(total, jepa, vc, vc_unweighted, parts["std_loss"], parts["cov_loss"], pred, recon, det)

    def _reconstruct(self, state: Tensor, video: Tensor) -> Tensor:
        with self._autocast(video.device):
            image = self.image_decoder(state)
        return F.mse_loss(image.to(video.dtype), video)

    def _detect(self, state: Tensor, digit_location: Tensor) -> Tensor:
        with self._autocast(state.device):
            probabilities = self.detection_head(state)
        return detection_loss(probabilities, digit_location)

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


def build_optimizer(
    jepa: nn.Module, image_decoder: nn.Module, detection_head: nn.Module, lr: float, **options: Any
) -> torch.optim.Adam:
    """One Adam, as in the original: the JEPA at `lr`, the image decoder at `lr`/10, the detection head at `lr`.

    `options` go to `torch.optim.Adam` (`capturable`, `fused`).
    """
    return torch.optim.Adam(
        [
            {"params": list(jepa.parameters()), "lr": lr},
            {"params": list(image_decoder.parameters()), "lr": lr / 10},
            {"params": list(detection_head.parameters()), "lr": lr},
        ],
        lr=lr,
        **options,
    )


def check_batch(video: Tensor, digit_location: Tensor) -> None:
    """Raise ValueError or TypeError if the two do not form a training batch; looks at shapes and dtypes only."""
    if not video.is_floating_point():
        raise TypeError(f"video must be floating point in [0, 1], got {video.dtype}; divide uint8 video by 255")
    if video.dim() != 5:
        raise ValueError(f"video must be (B, C, T, H, W), got shape {tuple(video.shape)}")
    if video.shape[2] < 3:
        raise ValueError(f"training takes clips of at least 3 frames (two give the context), got T = {video.shape[2]}")
    wanted = (video.shape[0], video.shape[2], DetHead.CELLS, DetHead.CELLS)
    if tuple(digit_location.shape) != wanted:
        raise ValueError(f"digit_location must be (B, T, 8, 8) = {wanted}, got shape {tuple(digit_location.shape)}")
