"""What a model predicts for a few clips, as arrays to draw."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastjepa.figures.data import RolloutArrays
from fastjepa.model.jepa import JEPA, eval_mode
from fastjepa.model.networks import DetHead, ImageDecoder
from fastjepa.moving_mnist import Clips
from fastjepa.training.evaluation import rollout_tails


def rollout_arrays(jepa: JEPA, image_decoder: ImageDecoder, detection_head: DetHead, clips: Clips) -> RolloutArrays:
    """Decoded one-step predictions and full rollout of every frame from the third on, with detections.

    The full rollout sees only the first two frames of each clip. Decoded images are clipped to [0, 1].
    """
    with eval_mode(jepa, image_decoder, detection_head):
        video, digit_location = clips.batch(torch.arange(len(clips), device=clips.device))
        tails = list(rollout_tails(jepa.predictor, jepa.encoder(video), video.shape[2] - 2))
        # The last rollout: frame s + 2 became final in step s, as the first frame of that step's tail.
        rollout = torch.cat([tail[:, :, :1] for tail in tails], dim=2)
        return RolloutArrays(
            video=_numpy(video)[:, 0],
            one_step=_numpy(image_decoder(tails[0]).clamp(0, 1))[:, 0],
            rollout=_numpy(image_decoder(rollout).clamp(0, 1))[:, 0],
            detections=_numpy(detection_head(rollout)),
            digit_maps=digit_location.to(torch.uint8).cpu().numpy(),
        )


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
