"""What is counted: a training step, an evaluation's batch and a step of a rollout, traced on tensors without memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from bench.recipe import COV_COEFF, STD_COEFF, Recipe
from bench.step_memory import fake_tensors
from bench.traffic.counting import Event, TrafficCounter
from bench.traffic.parts import part_of
from fastjepa.eb_jepa import OriginalStep
from fastjepa.fused.inference import Convolutions, InferenceEncoder, InferencePredictor
from fastjepa.model.context import CONTEXT
from fastjepa.model.jepa import JEPA, build_jepa
from fastjepa.model.losses import ProjectionPath
from fastjepa.model.networks import DetHead, ImageDecoder
from fastjepa.model.probes import build_probes
from fastjepa.model.step import TrainStep, build_optimizer
from fastjepa.moving_mnist import ClipSet
from fastjepa.training import evaluation as training_evaluation

Model = tuple[JEPA, ImageDecoder, DetHead]


@dataclass(frozen=True)
class Way:
    """How one variant computes."""

    name: str
    original: bool = False
    bf16: bool = False
    channels_last: bool = False
    fused: bool = False
    recompute: bool = False
    projection: ProjectionPath = "eager"
    folded: bool = False  # for inference
    own_convolutions: bool = False  # folded too, each with what surrounds it in one launch of ours


ORIGINAL = Way("original", original=True)
ONCE = Way("each thing once")
EAGER_BF16 = Way("each thing once, bf16, channels-last", bf16=True, channels_last=True)
FUSED = Way("fused", bf16=True, channels_last=True, fused=True, projection="fused")
RECOMPUTED = replace(FUSED, name="fused, recomputed", recompute=True)
FOLDED = replace(EAGER_BF16, name="bf16, channels-last, BatchNorm folded", folded=True)
OWN = Way("own convolutions, bf16", bf16=True, channels_last=True, own_convolutions=True)
STEP_WAYS = (ORIGINAL, ONCE, EAGER_BF16, RECOMPUTED, FUSED)
ROLLOUT_WAYS = (replace(ORIGINAL, name="eager"), FOLDED, FUSED, OWN)


def build_model(recipe: Recipe, way: Way) -> Model:
    """The JEPA and its probes, with BatchNorm folded if the way says so."""
    jepa = build_jepa(
        dobs=1, henc=recipe.henc, hpre=recipe.hpre, dstc=recipe.dstc, std_coeff=STD_COEFF, cov_coeff=COV_COEFF
    )
    if way.channels_last:
        for layer in (*jepa.encoder.modules(), *jepa.predictor.modules()):
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):  # not by Module.to, which swaps what a fake cannot
                layer.weight = nn.Parameter(layer.weight.detach().contiguous(memory_format=torch.channels_last))
    if way.fused:
        from fastjepa.fused.networks import FusedResNet5, FusedStateOnlyPredictor

        jepa.encoder = FusedResNet5.from_eager(jepa.encoder, recompute=way.recompute)
        jepa.predictor = FusedStateOnlyPredictor.from_eager(jepa.predictor, recompute=way.recompute)
    if way.own_convolutions or way.folded:
        with fake_tensors(beside_real_ones=True):  # in which kernels are let through
            convolutions: Convolutions = "fused" if way.own_convolutions else "eager"
            jepa.encoder = InferenceEncoder.from_eager(jepa.encoder, convolutions=convolutions)
            jepa.predictor = InferencePredictor.from_eager(jepa.predictor, convolutions=convolutions)
    return jepa, *build_probes(dobs=1, dstc=recipe.dstc)


def training_step(recipe: Recipe, way: Way) -> list[Event]:
    """One training step, the optimizer's included, whose state is there before."""
    with fake_tensors(beside_real_ones=True):
        model = build_model(recipe, way)
        # What the trainer uses on a GPU; the original's own default there is multi-tensor.
        kind: dict[str, Any] = {"foreach": True} if way.original else {"fused": True}
        make_step = OriginalStep if way.original else partial(TrainStep, projection=way.projection)
        step = make_step(
            *model,
            build_optimizer(*model, 1e-3, **kind),
            steps=recipe.steps,
            autocast_dtype=torch.bfloat16 if way.bf16 else None,
        )
        for module in model:
            for parameter in module.parameters():
                parameter.grad = torch.empty_like(parameter)
        assert step.optimizer is not None
        step.optimizer.step()
        video = torch.empty(recipe.batch, 1, recipe.frames, recipe.pixels, recipe.pixels)
        digit_location = torch.empty(recipe.batch, recipe.frames, DetHead.CELLS, DetHead.CELLS)
        with torch.autograd.set_detect_anomaly(True, check_nan=False), TrafficCounter(part_of) as counter:
            step(video, digit_location)
    return counter.events


def rollout_step(recipe: Recipe, way: Way) -> list[Event]:
    """One step of a rollout: a window of states in, the next state out, in eval mode.

    An inference network reads states where they lie, and writes the next behind them.
    """
    predictor: Any = build_model(recipe, way)[0].predictor.eval()
    if way.own_convolutions or way.folded:
        half = torch.autocast("cpu", torch.bfloat16, enabled=way.bf16)
        with fake_tensors(beside_real_ones=True), torch.no_grad(), half:
            states = torch.empty(recipe.batch, recipe.dstc, CONTEXT + 1, recipe.pixels, recipe.pixels)
            run, frames = predictor.ready_for(states, 1), predictor.in_frames(states)  # weights are folded here
            with TrafficCounter(part_of) as counter:
                predictor.step(run, frames[:CONTEXT], frames[CONTEXT:])
        return counter.events
    with fake_tensors(beside_real_ones=True), torch.no_grad():
        window = torch.empty(recipe.batch, recipe.pixels, recipe.pixels, CONTEXT * recipe.dstc).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=way.bf16):
            predictor.predictor(window)  # the first step casts weights, which autocast keeps for the others
            with TrafficCounter(part_of) as counter:
                predictor.predictor(window)
    return counter.events


def evaluation(recipe: Recipe, way: Way) -> list[Event]:
    """One evaluation of one batch, up to the probabilities that average precision ranks. BatchNorm is folded before."""
    folds = not (way.original or way.fused or way.own_convolutions)
    model = build_model(recipe, replace(way, folded=folds))
    with fake_tensors(beside_real_ones=True):
        video = torch.empty(recipe.batch, recipe.frames, recipe.pixels, recipe.pixels, dtype=torch.uint8)
        maps = torch.empty(recipe.batch, recipe.frames, DetHead.CELLS, DetHead.CELLS, dtype=torch.uint8)
        is_folded = patch.object(training_evaluation, "for_evaluation", lambda network, _: network)
        no_ranking = patch.object(training_evaluation, "average_precision", lambda p, _: p.new_empty(()))
        with is_folded, no_ranking:
            if way.own_convolutions or folds:  # the first one folds
                _evaluate(model, ClipSet(video, maps), recipe, way)
            with TrafficCounter(part_of) as counter:
                _evaluate(model, ClipSet(video, maps), recipe, way)
    return counter.events


def _evaluate(model: Model, clips: ClipSet, recipe: Recipe, way: Way) -> None:
    # In the end it reads its results, and shapes have no values.
    with contextlib.suppress(DataDependentOutputException):
        training_evaluation.evaluate(
            *model, clips, recipe.batch, original=way.original, autocast_dtype=torch.bfloat16 if way.bf16 else None
        )


Work = Callable[[Recipe, Way], list[Event]]
WORKS: dict[str, tuple[Work, tuple[Way, ...]]] = {
    "training step": (training_step, STEP_WAYS),
    "evaluation of a batch": (evaluation, (ORIGINAL, ONCE, EAGER_BF16, FUSED, OWN)),
    "rollout step": (rollout_step, ROLLOUT_WAYS),
}
