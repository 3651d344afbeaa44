"""How well digits are located in a predicted future: average precision by horizon, and the probes' losses.

Shapes: video (B, C, T, H, W), state (B, D, T, H, W), digit maps and probabilities (B, T, 8, 8).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.distributed.ranks import Ranks
from fastjepa.fused.inference import for_evaluation
from fastjepa.graphs import GraphedRollout
from fastjepa.model.jepa import JEPA, eval_mode, own_method, parallel_tails
from fastjepa.model.networks import DetHead, ImageDecoder
from fastjepa.model.probes import detection_loss
from fastjepa.moving_mnist import Clips, sequential_batches
from fastjepa.optional_packages import needed_for
from fastjepa.profiling import span

MAX_HORIZONS = 7  # AP_0 … AP_6, as published


@dataclass(frozen=True)
class Evaluation:
    """One evaluation. AP_s scores detections in frames predicted s + 1 steps ahead or more.

    `ap` is computed in each batch and averaged, as the original reports it, and so depends a little on the batch size;
    `pooled_ap` ranks all cells of the whole set together. Batches without a single digit have no AP and are left out.
    """

    recon_loss: float  # mean squared error of decoded frames, averaged over clips
    det_loss: float  # binary cross-entropy of the digit maps, averaged over clips
    ap: tuple[float, ...]
    pooled_ap: tuple[float, ...]
    positive_share: float  # share of cells that hold a digit, in the frames that AP_0 scores: the AP of guessing

    @property
    def map(self) -> float:
        """Mean of AP over the horizons."""
        return sum(self.ap) / len(self.ap)

    @property
    def pooled_map(self) -> float:
        """Mean of the pooled AP over the horizons."""
        return sum(self.pooled_ap) / len(self.pooled_ap)

    def as_row(self) -> dict[str, float]:
        """The metrics as columns of a CSV row."""
        row = {"val_recon_loss": self.recon_loss, "val_det_loss": self.det_loss}
        row |= {f"ap_{s}": value for s, value in enumerate(self.ap)} | {"map": self.map}
        row |= {f"pooled_ap_{s}": value for s, value in enumerate(self.pooled_ap)} | {"pooled_map": self.pooled_map}
        return row | {"positive_share": self.positive_share}


def horizons_of(frames: int) -> int:
    """How many AP_s a clip of T frames gives: T - 3, at least 1 and at most 7. Raises ValueError for T < 3."""
    if frames < 3:
        raise ValueError(f"evaluation takes clips of at least 3 frames, got T = {frames}")
    return min(MAX_HORIZONS, max(1, frames - 3))


def average_precision(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Area under the precision–recall curve as a step function, float64; NaN if no target is positive.

    probabilities and targets: of one shape, in [0, 1] and {0, 1}.

    Raises:
        MissingPackageError: torchmetrics is not installed.
    """
    with needed_for("evaluation"):
        from torchmetrics.functional.classification import binary_average_precision
    targets = targets.flatten().long()
    # torchmetrics counts in the default dtype; float32 would round the result to 7 digits.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        ap = binary_average_precision(probabilities.flatten(), targets, validate_args=False)
    finally:
        torch.set_default_dtype(before)
    return torch.where(targets.any(), ap.double(), torch.nan)


def rollout_tails(predictor: nn.Module, state: Tensor, steps: int) -> Iterator[Tensor]:
    """The frames of a parallel rollout that each step computes anew, in eval mode.

    With frozen BatchNorm, prediction i of step k + 1 equals prediction i of step k for i < k: only the tail changes.
    For s = 0 … steps - 1 this yields the predictions of frames s + 2 … T - 1 after s + 1 steps, (B, D, T - 2 - s,
    H, W), equal to `unroll(..., return_all_steps=True)[s][:, :, s:]`. For ten frames the seven steps that AP needs
    cost 35 predictor frames; the original's eight full steps cost 72.

    Raises:
        ValueError: fewer than 3 frames, or more steps than predictable frames (T - 2).
        RuntimeError: the predictor is in training mode, where batch statistics make every frame change.
    """
    if predictor.training:
        raise RuntimeError("the de-duplicated rollout needs the predictor in eval mode")
    frames = state.shape[2]
    if not 1 <= steps <= frames - 2:
        raise ValueError(f"steps must be between 1 and T - 2 = {frames - 2}, got {steps}")
    tails = own_method(predictor, "tails") or partial(parallel_tails, predictor)
    yield from tails(state, steps)


def evaluate(
    jepa: JEPA,
    image_decoder: ImageDecoder,
    detection_head: DetHead,
    clips: Clips,
    batch_size: int,
    *,
    autocast_dtype: torch.dtype | None = None,
    original: bool = False,
    rollout: GraphedRollout | None = None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Evaluate on `clips`, in eval mode, on their device. The modules' modes are left as they were.

    Args:
        jepa, image_decoder, detection_head: the model.
        clips: at least one.
        batch_size: clips at a time; the last batch may be smaller.
        autocast_dtype: torch.bfloat16 runs everything in bf16 autocast.
        original: encode for each metric and roll every frame out at every step, as the original does; the default
            encodes once and computes each predicted frame once, with BatchNorm folded into the convolutions.
        rollout: of this JEPA; predicts what is rolled out of a batch in one launch, by the same code. Kept from one
            evaluation to the next, it records once for each size of a batch; weights that have changed in place are
            seen, also where it folds BatchNorm.
        ranks: processes that share the batches, each with the same model and clips. Every batch is one process's, and
            all have the evaluation of all: the same as one process's, bit for bit on the same hardware.

    Raises:
        ValueError: no clips, or clips of fewer than 3 frames; a rollout of another predictor, or with
            `original`.
        MissingPackageError: torchmetrics is not installed.
    """
    if len(clips) == 0:
        raise ValueError("there are no clips to evaluate")
    if rollout is not None:
        if original:
            raise ValueError("original=True rolls every frame out at every step; `rollout` is for the other evaluation")
        if rollout.predictor is not jepa.predictor:
            raise ValueError("`rollout` is of another predictor than that of `jepa`")
        rollout.refresh()
    horizons = horizons_of(clips.n_frames)
    ranks = ranks or Ranks()
    found: list[_OfBatch] = []
    with span("evaluation"), eval_mode(jepa, image_decoder, detection_head):
        encoder, predictor = jepa.encoder, jepa.predictor
        if not original:
            encoder = for_evaluation(encoder, "encoder")
            predictor = for_evaluation(predictor, "predictor") if rollout is None else predictor  # or the rollout's
        batches = sequential_batches(len(clips), batch_size, clips.device)
        for indices in batches[ranks.rank :: ranks.size]:
            with span("data"):
                video, digit_location = clips.batch(indices)
            probabilities, targets = [], []
            with torch.autocast(video.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
                with span("encode"):
                    state = encoder(video)
                image = image_decoder(encoder(video) if original else state)
                detected = detection_head(encoder(video) if original else state)
                if original:
                    steps, _ = jepa.unroll(
                        video, None, nsteps=video.shape[2] - 2, compute_loss=False, return_all_steps=True
                    )
                    tails: Iterable[Tensor] = (steps[s][:, :, s:] for s in range(horizons))
                elif rollout is None:
                    tails = rollout_tails(predictor, state, horizons)
                else:
                    tails = rollout.tails(state, horizons, copy=False)  # read before the next batch overwrites them
                for s, tail in enumerate(tails):
                    probabilities.append(detection_head(tail))
                    targets.append(digit_location[:, 2 + s :])
            recon = F.mse_loss(image.to(video.dtype), video)
            means = torch.stack((recon, detection_loss(detected, digit_location), digit_location[:, 2:].mean()))
            found.append(_OfBatch(len(indices), means, probabilities, targets))
        return _evaluation_of(_of_all_batches(found, ranks, clips.device), horizons)


class _OfBatch(NamedTuple):
    """What one batch gives, before average precision is taken."""

    clips: int
    means: Tensor  # (3,): reconstruction and detection losses, share of positive cells
    probabilities: list[Tensor]  # of each horizon s: (B, T - 2 - s, 8, 8)
    targets: list[Tensor]  # likewise

    def to(self, device: torch.device) -> _OfBatch:
        moved = ([tensor.to(device) for tensor in tensors] for tensors in (self.probabilities, self.targets))
        return _OfBatch(self.clips, self.means.to(device), *moved)


def _of_all_batches(found: list[_OfBatch], ranks: Ranks, device: torch.device) -> list[_OfBatch]:
    """Those of all processes, in the order of the batches, of which process r has every size-th from r on."""
    if ranks.alone:
        return found
    of_all = ranks.gather([batch.to(torch.device("cpu")) for batch in found])
    return [batch.to(device) for group in zip_longest(*of_all) for batch in group if batch is not None]


def _evaluation_of(batches: list[_OfBatch], horizons: int) -> Evaluation:
    per_batch = [
        torch.stack([average_precision(b.probabilities[s], b.targets[s]) for b in batches]).nanmean()
        for s in range(horizons)
    ]
    pooled = [
        average_precision(torch.cat([b.probabilities[s] for b in batches]), torch.cat([b.targets[s] for b in batches]))
        for s in range(horizons)
    ]
    clips = sum(batch.clips for batch in batches)
    weights = [batch.clips / clips for batch in batches]
    clip_means = torch.stack([batch.means for batch in batches], dim=1).double()
    means = clip_means @ torch.tensor(weights, dtype=torch.float64, device=clip_means.device)
    recon_loss, det_loss, positive_share = means.tolist()
    return Evaluation(
        recon_loss,
        det_loss,
        tuple(torch.stack(per_batch).tolist()),
        tuple(torch.stack(pooled).tolist()),
        positive_share,
    )
