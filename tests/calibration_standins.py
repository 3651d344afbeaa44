"""Stand-ins for candidates, which go through the very code paths of a calibration, and a setting to ask about."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import torch

from fastjepa.calibration.children import Limits
from fastjepa.calibration.choice import EAGER, Choice
from fastjepa.calibration.setting import Setting, sources_hash
from fastjepa.calibration.trial import Trial
from fastjepa.trials.work import Tensors

LIMITS = Limits(total=100.0, start=60.0, candidate=5.0)


def some_setting(**changes: Any) -> Setting:
    setting = Setting(
        gpu="Some GPU", driver="1", torch="2", triton="3", cuda="4", cudnn="5", fastjepa="6", sources=sources_hash(),
        dobs=1, henc=2, hpre=2, dstc=4, projector="4-6-5", batch=1, frames=3, height=8, width=8, steps=1,
        precision="fp32", matmul_tf32=False, cudnn_tf32=False, purpose="train", deterministic=True, benchmark=False,
    )  # fmt: skip
    return dataclasses.replace(setting, **changes)


def trial(choice: Choice, milliseconds: float | None = None, status: Any = "exact", **fields: Any) -> Trial:
    reference = 10.0 if milliseconds is not None else None
    return Trial(choice, status, milliseconds=milliseconds, reference_milliseconds=reference, **fields)


class StandIn:
    """Takes so many seconds, and is off by so much."""

    def __init__(self, seconds: float, error: float = 0.0) -> None:
        self.seconds, self.error = seconds, error

    def run(self) -> None:
        time.sleep(self.seconds)

    def results(self) -> Tensors:
        return {"numbers": torch.arange(1.0, 5.0) * (1 + self.error)}


GRAPH, CHANNELS_LAST = Choice(cuda_graph=True), Choice(channels_last=True)
BOTH = Choice(cuda_graph=True, channels_last=True)


def of_every_kind(
    setting: Setting, choice: Choice, batch: int, device: torch.device, dtype: torch.dtype, draw: int
) -> StandIn:
    """Fused blocks with fused losses crash in a graph and hang without; alone, blocks have no memory and losses are
    wrong. The closed form is slow. A graph is fast, channels-last a little, and both are fastest.
    """
    if choice.batch_norm and choice.losses == "fused":
        if choice.cuda_graph:
            os.abort()
        time.sleep(1000.0)
    if choice.batch_norm:
        raise torch.OutOfMemoryError("CUDA out of memory") if choice.cuda_graph else MemoryError
    if choice.losses == "fused":
        return StandIn(0.0, error=1e-3)
    if choice.losses == "closed_form":
        return StandIn(0.3)
    return StandIn({EAGER: 0.03, CHANNELS_LAST: 0.01, GRAPH: 0.004, BOTH: 0.0}[choice])


def only_channels_last(
    setting: Setting, choice: Choice, batch: int, device: torch.device, dtype: torch.dtype, draw: int
) -> StandIn:
    """Nothing but channels-last works."""
    if choice not in (EAGER, CHANNELS_LAST):
        raise RuntimeError("this does not work")
    return StandIn(0.02 if choice == EAGER else 0.0)


def many(setting: Setting, choice: Choice, batch: int, device: torch.device, dtype: torch.dtype, draw: int) -> StandIn:
    """All parts together, without recomputation, are fastest; the closed form is wrong; a graph alone fails."""
    if choice == GRAPH:
        raise RuntimeError("this does not work")
    parts = choice.batch_norm + (choice.losses == "fused") + choice.cuda_graph + choice.channels_last
    milliseconds = 2.0 - 0.3 * parts - 0.3 * (choice.batch_norm and not choice.recompute)
    return StandIn(milliseconds / 1e3, error=1e-3 * (choice.losses == "closed_form"))


MANY_BEST = Choice(batch_norm=True, losses="fused", cuda_graph=True, channels_last=True)


def all_work(
    setting: Setting, choice: Choice, batch: int, device: torch.device, dtype: torch.dtype, draw: int
) -> StandIn:
    """A graph and channels-last each make it faster."""
    return StandIn((8.0 - 4 * choice.cuda_graph - 2 * choice.channels_last) / 1e3)


class LayeredStandIn(StandIn):
    """Own convolutions in all layers, some of which are faster than torch's."""

    def __init__(self, seconds: float, faster: tuple[str, ...]) -> None:
        super().__init__(seconds)
        self.faster = faster

    def faster_layers(self) -> tuple[str, ...]:
        return self.faster


SOME_LAYERS = ("encoder.conv1", "predictor.enc1.conv1", "predictor.up1")
SOME = Choice(cuda_graph=True, convolutions=",".join(SOME_LAYERS))


def some_layers_faster(
    setting: Setting, choice: Choice, batch: int, device: torch.device, dtype: torch.dtype, draw: int
) -> StandIn:
    """Own convolutions are faster in three layers alone, and with just those a rollout is fastest."""
    milliseconds = {SOME.convolutions: 2.0, "all": 8.0, "": 20.0}[choice.convolutions] + 4 * (not choice.cuda_graph)
    if choice.convolutions == "all":
        return LayeredStandIn(milliseconds / 1e3, SOME_LAYERS)
    return StandIn(milliseconds / 1e3)


def nothing(
    setting: Setting, choice: Choice, batch: int, device: torch.device, dtype: torch.dtype, draw: int
) -> StandIn:
    """The process ends at once, as where the GPU is somebody else's."""
    os._exit(3)
