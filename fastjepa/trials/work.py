"""The work that candidates compete in: one training step, or one rollout, of the published network at given sizes.

Weights and data are drawn from a seed on the CPU, so every candidate, eager and float64 start from the same numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastjepa.calibration.choice import Choice
from fastjepa.calibration.setting import Setting, ambient_tf32, set_tf32
from fastjepa.fused.swap import accelerate
from fastjepa.graphs import GraphedRollout, GraphedTrainStep
from fastjepa.measuring.norms import GRADIENT
from fastjepa.model.jepa import JEPA, build_jepa
from fastjepa.model.losses import ProjectionPath
from fastjepa.model.networks import DetHead, ImageDecoder
from fastjepa.model.probes import build_probes
from fastjepa.model.step import StepLosses, TrainStep, build_optimizer
from fastjepa.moving_mnist import ClipSet
from fastjepa.trials.layers import faster_layers, pairs_of_networks

Tensors = dict[str, Tensor]
SEED, LEARNING_RATE = 2025, 1e-3
STD_COEFF, COV_COEFF = 10.0, 100.0  # of the recipe; they cost nothing


class Work(Protocol):
    """`run()` does it once more; `results()` are those of the last run."""

    def run(self) -> None:
        """Do it once, without waiting for the device."""
        ...

    def results(self) -> Tensors:
        """What is compared, by name."""
        ...


@runtime_checkable
class LayeredWork(Work, Protocol):
    """Work by own convolutions in every layer, each of which torch's convolutions could do too."""

    def faster_layers(self) -> tuple[str, ...]:
        """The names, as of `calibration.layers` and sorted, of the layers that are faster by own convolutions."""
        ...


# (setting, choice, clips in a batch, device, floating dtype of weights and data, which draw of them) → work
Maker = Callable[[Setting, Choice, int, torch.device, torch.dtype, int], Work]


def make_work(
    setting: Setting, choice: Choice, batch: int, device: torch.device, dtype: torch.dtype, draw: int = 0
) -> Work:
    """The real work; raises whatever the candidate raises when it is built."""
    kind = Step if setting.purpose == "train" else Rollout
    return kind(setting, choice, batch, device, dtype, draw)


@contextlib.contextmanager
def arithmetic(setting: Setting) -> Iterator[None]:
    """The settings of PyTorch under which the work will run."""
    cudnn = torch.backends.cudnn
    before = *ambient_tf32(), cudnn.deterministic, cudnn.benchmark
    _set_arithmetic(setting.matmul_tf32, setting.cudnn_tf32, setting.deterministic, setting.benchmark)
    try:
        yield
    finally:
        _set_arithmetic(*before)


def _set_arithmetic(matmul_tf32: bool, cudnn_tf32: bool, deterministic: bool, benchmark: bool) -> None:
    set_tf32(matmul_tf32, cudnn_tf32)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark


class Step:
    """A training step, as the trainer makes it. In float64 it is the truth: losses in closed form, for less memory."""

    def __init__(
        self, setting: Setting, choice: Choice, batch: int, device: torch.device, dtype: torch.dtype, draw: int = 0
    ) -> None:
        seed = SEED + draw
        jepa, decoder, head = _model(setting, seed)
        model = (jepa.to(device, dtype), decoder.to(device, dtype), head.to(device, dtype))
        projection: ProjectionPath = "closed_form" if dtype == torch.float64 else choice.losses
        accelerate(jepa, choice=choice, verbose=False)
        self.optimizer = build_optimizer(*model, LEARNING_RATE)
        self.step = TrainStep(
            *model, self.optimizer, steps=setting.steps, projection=projection, autocast_dtype=_autocast(setting, dtype)
        )
        self.dtype = dtype
        self.losses: StepLosses | None = None
        self.graphed: GraphedTrainStep | None = None
        self.clips: ClipSet | None = None
        if setting.dobs == 1:
            self.clips = _clips(setting, batch, seed).to(device)
            self.indices = torch.arange(batch, device=device)
        else:
            self.video = _video(setting, batch, seed).to(device, dtype)
            self.digit_location = _digit_maps(setting, batch, seed).to(device, dtype)
        if choice.cuda_graph:
            if self.clips is None:
                raise ValueError(f"a graphed step takes clips of one channel, and these have {setting.dobs}")
            self.graphed = GraphedTrainStep(self.step, self.clips, dtype=dtype)

    def run(self) -> None:
        """One optimisation step."""
        if self.graphed is not None:
            self.losses = self.graphed(self.indices, copy=False)
        elif self.clips is not None:
            self.losses = self.step(*self.clips.batch(self.indices, self.dtype))
        else:
            self.losses = self.step(self.video, self.digit_location)

    def results(self) -> Tensors:
        """The losses' terms as one tensor, and by network: gradients, and BatchNorm's buffers.

        Gradients are read from Adam, whose first moment is a tenth of the first step's gradient: those of a graph are
        not to be seen from outside.
        """
        losses, jepa = self.losses, self.step.jepa
        assert losses is not None
        source: Any = jepa
        terms = (losses.total, losses.std, losses.cov, losses.pred, losses.recon, losses.det)
        found = {"losses": torch.stack([term.detach().double() for term in terms]).to(self.dtype)}
        groups: dict[str, nn.Module] = {
            "encoder": source.encoder, "predictor": source.predictor, "projector": source.predcost.proj,
            "image decoder": self.step.image_decoder, "detection head": self.step.detection_head,
        }  # fmt: skip
        for name, module in groups.items():
            parameters = dict(module.named_parameters())
            moments = [self.optimizer.state[parameters[key]]["exp_avg"].flatten() for key in sorted(parameters)]
            found[GRADIENT + name] = torch.cat(moments)
            buffers = {key: value for key, value in module.named_buffers() if value.is_floating_point()}
            if buffers:
                found[f"buffers of {name}"] = torch.cat([buffers[key].flatten() for key in sorted(buffers)])
        return {name: tensor.detach().clone() for name, tensor in found.items()}


class Rollout:
    """A video encoded, and rolled out. With a graph: encoded, then rolled out in one launch with BatchNorm folded."""

    def __init__(
        self, setting: Setting, choice: Choice, batch: int, device: torch.device, dtype: torch.dtype, draw: int = 0
    ) -> None:
        seed = SEED + draw
        jepa = _model(setting, seed)[0]
        _move_buffers(jepa, seed)
        self.jepa = jepa.to(device, dtype).eval()
        accelerate(self.jepa, choice=choice, purpose="inference", verbose=False)
        self.steps, self.autocast_dtype = setting.steps, _autocast(setting, dtype)
        self.video = _video(setting, batch, seed).to(device, dtype)
        self.graphed = GraphedRollout(self.jepa, self.steps, fold_batch_norm=True) if choice.cuda_graph else None
        self.states: Tensor | None = None

    @torch.no_grad()
    def run(self) -> None:
        """Encode and predict."""
        with torch.autocast(self.video.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            if self.graphed is None:
                self.states = self.jepa.rollout(self.video, steps=self.steps)
            else:
                self.states = self.graphed(self.jepa.encode(self.video), copy=False)

    def results(self) -> Tensors:
        """The last state of the video, and the predicted ones."""
        assert self.states is not None
        return {
            "encoded": self.states[:, :, -self.steps - 1].clone(),
            "predicted": self.states[:, :, -self.steps :].clone(),
        }

    def faster_layers(self) -> tuple[str, ...]:
        """See LayeredWork."""
        dtype = self.autocast_dtype or self.video.dtype
        device, networks = self.video.device, (self.jepa.encoder, self.jepa.predictor)
        tf32 = device.type == "cuda" and ambient_tf32()[1]
        return faster_layers(pairs_of_networks(*networks, self.video, dtype, tf32=tf32), device)


def _autocast(setting: Setting, dtype: torch.dtype) -> torch.dtype | None:
    return torch.bfloat16 if setting.precision == "bf16" and dtype == torch.float32 else None


def _model(setting: Setting, seed: int) -> tuple[JEPA, ImageDecoder, DetHead]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        jepa = build_jepa(
            dobs=setting.dobs, henc=setting.henc, hpre=setting.hpre, dstc=setting.dstc, projector=setting.projector,
            std_coeff=STD_COEFF, cov_coeff=COV_COEFF,
        )  # fmt: skip
        return jepa, *build_probes(dobs=setting.dobs, dstc=setting.dstc)


def _move_buffers(jepa: nn.Module, seed: int) -> None:
    """Statistics that are not those of a BatchNorm that has seen nothing: folding 0 and 1 would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    for layer in jepa.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.copy_(0.1 * torch.randn(layer.num_features, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=generator))


def _clips(setting: Setting, batch: int, seed: int) -> ClipSet:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, setting.frames, setting.height, setting.width)
    video = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return ClipSet(video, _digit_maps(setting, batch, seed).to(torch.uint8))


def _video(setting: Setting, batch: int, seed: int) -> Tensor:
    shape = (batch, setting.dobs, setting.frames, setting.height, setting.width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _digit_maps(setting: Setting, batch: int, seed: int) -> Tensor:
    shape = (batch, setting.frames, DetHead.CELLS, DetHead.CELLS)
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.03).float()
