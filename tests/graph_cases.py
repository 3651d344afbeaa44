"""Small models, clips and states for the tests of CUDA graphs, which run on a CPU and, where there is one, a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastjepa.graphs import make_capturable
from fastjepa.model.jepa import JEPA, autoregressive_unroll, eval_mode
from fastjepa.model.step import TrainStep, build_optimizer
from fastjepa.moving_mnist import ClipSet
from tiny import tiny_jepa, tiny_model

EVERY_DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def some_clips(device: str = "cpu", n: int = 7, frames: int = 4, size: int = 16) -> ClipSet:
    generator = torch.Generator().manual_seed(3)
    video = torch.randint(0, 256, (n, frames, size, size), generator=generator, dtype=torch.uint8)
    maps = torch.randint(0, 2, (n, frames, 8, 8), generator=generator, dtype=torch.uint8)
    return ClipSet(video.to(device), maps.to(device))


def some_step(device: str = "cpu", **options: Any) -> TrainStep:
    jepa, decoder, head = tiny_model()
    model = (jepa.to(device), decoder.to(device), head.to(device))
    optimizer = make_capturable(build_optimizer(*model, lr=1e-3))
    return TrainStep(*model, optimizer, **{"steps": 2, **options})


def everything(step: TrainStep) -> list[Tensor]:
    """Parameters, buffers and Adam's state, in a fixed order."""
    assert step.optimizer is not None
    modules = (step.jepa, step.image_decoder, step.detection_head)
    tensors = [t for module in modules for t in module.state_dict().values()]
    return tensors + [t for state in step.optimizer.state.values() for t in state.values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def batches(count: int, device: str, ragged: bool = True) -> list[Tensor]:
    """Indices of changing clips; every third batch is smaller."""
    generator = torch.Generator().manual_seed(5)
    sizes = [2 if ragged and i % 3 == 2 else 3 for i in range(count)]
    return [torch.randint(0, 7, (size,), generator=generator).to(device) for size in sizes]


def trained_jepa(device: str = "cpu", **options: Any) -> JEPA:
    """With BatchNorm buffers and weights off their defaults."""
    jepa = tiny_jepa(**options)
    jepa.unroll(torch.rand(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(2)))
    return jepa.to(device)


def some_states(device: str = "cpu", batch: int = 2, frames: int = 3, size: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.rand(batch, 4, frames, *size, generator=torch.Generator().manual_seed(4)).to(device)


def literal_rollout(jepa: JEPA, states: Tensor, steps: int) -> Tensor:
    """The eager autoregressive unroll from the last two states."""
    with eval_mode(jepa):
        return autoregressive_unroll(jepa.predictor, states[:, :, -2:], None, steps, window=2)[0][-1]
