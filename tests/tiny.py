"""Small models and batches that several tests use."""

from __future__ import annotations

import torch
from torch import Tensor

from fastjepa.model.jepa import JEPA, build_jepa
from fastjepa.model.networks import DetHead, ImageDecoder
from fastjepa.model.probes import build_probes


def tiny_jepa(*, dstc: int = 4, width: int = 2, projector: str | None = None, seed: int = 0) -> JEPA:
    torch.manual_seed(seed)
    sizes = f"{dstc}-6-5" if projector is None else projector
    return build_jepa(dobs=1, henc=width, hpre=width, dstc=dstc, std_coeff=10.0, cov_coeff=100.0, projector=sizes)


def tiny_model(*, dstc: int = 4, projector: str | None = None, seed: int = 0) -> tuple[JEPA, ImageDecoder, DetHead]:
    jepa = tiny_jepa(dstc=dstc, projector=projector, seed=seed)
    decoder, head = build_probes(dobs=1, dstc=dstc, hdet=3)
    return jepa, decoder, head


def tiny_batch(
    batch: int = 2, frames: int = 5, size: tuple[int, int] = (16, 16), seed: int = 1
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    video = torch.rand(batch, 1, frames, *size, generator=generator)
    digit_location = (torch.rand(batch, frames, 8, 8, generator=generator) > 0.9).float()
    return video, digit_location
