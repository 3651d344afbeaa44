"""`python -m bench eval`: one evaluation, as the original computes it and deduplicated.

Both give the same metrics; the de-duplicated one rolls out 35 predictor frames per clip of ten, not 72, encodes once,
not four times, and folds BatchNorm into the convolutions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from bench.harness import suite
from bench.harness.case import Case, Work
from bench.harness.variants import Computation, Tensors, Variant, always, needs_cuda, needs_kernels
from bench.recipe import Recipe, arithmetic, build_model, make_clips
from bench.recipe_suite import run_suite
from fastjepa.fused.swap import Purpose, accelerate
from fastjepa.graphs import GraphedRollout
from fastjepa.moving_mnist import ClipSet
from fastjepa.optional_packages import require_packages
from fastjepa.training.evaluation import evaluate

ORIGINAL = "original"
BATCHES = 2


@dataclass(frozen=True)
class Way:
    """How one variant evaluates."""

    original: bool = False
    precision: str = "fp32"
    kernels: str = ""  # "fused" or "inference": the networks that take the place of the plain ones
    graph: bool = False  # the rollout of a batch in one launch


def make_inputs(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Tensors:
    """The bytes of two batches of clips, video (N, T, H, W) and digit maps (N, T, 8, 8)."""
    clips = make_clips(recipe, device, BATCHES)
    return {"video": clips.video, "digit_maps": clips.digit_maps}


class WideClips(ClipSet):
    """Clips whose batches are float64, for the reference."""

    def batch(self, indices: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """See ClipSet."""
        return super().batch(indices, torch.float64)


class Evaluate:
    """An evaluation as a benchmark's computation.

    Compared are the losses and every detection of the rollout. Not AP: a function of ranks, it jumps when two scores
    trade places.
    """

    def __init__(self, recipe: Recipe, way: Way, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.recipe, self.way = recipe, way
        self.clips = WideClips if dtype == torch.float64 else ClipSet
        self.model = build_model(recipe, device, dtype)
        settle(self.model[0], recipe)
        if way.kernels:
            purpose: Purpose = "inference" if way.kernels == "inference" else "train"
            accelerate(self.model[0], backend="fused", purpose=purpose, verbose=False)
        self.rollout = GraphedRollout(self.model[0], fold_batch_norm=True) if way.graph else None
        self.detections: list[Tensor] = []
        self.model[2].register_forward_hook(lambda module, inputs, out: self.detections.append(out.flatten()))

    def __call__(self, inputs: Tensors) -> Tensors:
        """The losses and all detections, batch by batch and horizon by horizon."""
        self.detections.clear()
        with arithmetic(self.way.precision):
            found = evaluate(
                *self.model,
                self.clips(inputs["video"], inputs["digit_maps"]),
                self.recipe.batch,
                autocast_dtype=torch.bfloat16 if self.way.precision == "bf16" else None,
                original=self.way.original,
                rollout=self.rollout,
            )
        losses = {"recon_loss": found.recon_loss, "det_loss": found.det_loss}
        scalars = {name: torch.tensor(value, dtype=torch.float32) for name, value in losses.items()}
        return {**scalars, "detections": torch.cat(self.detections)}


def settle(jepa: nn.Module, recipe: Recipe) -> None:
    """Give BatchNorm's running buffers the statistics of one small random clip, as training would: the same on every
    device, because they are computed on the CPU.
    """
    small = replace(recipe, batch=1)
    model = build_model(small, torch.device("cpu"))[0]
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = 1.0
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        model.predictor(model.encoder(torch.rand(1, 1, 3, recipe.pixels, recipe.pixels, generator=generator)))
    statistics = {name: value for name, value in model.named_buffers() if name in dict(jepa.named_buffers())}
    jepa.load_state_dict(statistics, strict=False)


def truth(recipe: Recipe, inputs: Tensors) -> Tensors:
    """The original evaluation in float64."""
    found = Evaluate(recipe, Way(original=True), inputs["video"].device, torch.float64)(inputs)
    return {name: x.double() for name, x in found.items()}


def build(recipe: Recipe, way: Way, device: torch.device) -> Computation:
    """The computation of one variant (a module-level function, so that it can be sent to another process)."""
    return Evaluate(recipe, way, device)


def _unknown_work(phase: str, dtype: torch.dtype) -> Work | None:
    return None


def make_case(recipe: Recipe, note: str = "") -> Case:
    """The evaluation of two batches of one recipe."""
    return Case(
        suite="eval",
        name=f"{recipe}, {BATCHES} batches{note}",
        make_inputs=partial(make_inputs, recipe),
        truth=partial(truth, recipe),
        work=_unknown_work,
        baseline=ORIGINAL,
        eager={"fp32": ORIGINAL, "tf32": "TF32", "bf16": "bf16"},
        phase="evaluation",
        rates={"clips_per_second": float(BATCHES * recipe.batch)},
    )


def make_variants(recipe: Recipe) -> list[Variant]:
    """The original's evaluation, the de-duplicated one, and that one with less precision, fused kernels and graphs."""
    ways: list[tuple[str, Way, Callable[[torch.device], str | None]]] = [
        (ORIGINAL, Way(original=True), always),
        ("each thing once", Way(), always),
        ("TF32", Way(precision="tf32"), needs_cuda),
        ("bf16", Way(precision="bf16"), needs_cuda),
        ("bf16, rollouts as a graph", Way(precision="bf16", graph=True), needs_cuda),
        ("fused bf16", Way(precision="bf16", kernels="fused"), needs_kernels),
        ("fused bf16, rollouts as a graph", Way(precision="bf16", kernels="fused", graph=True), needs_kernels),
        ("folded convolutions bf16", Way(precision="bf16", kernels="inference"), needs_kernels),
        (
            "folded convolutions bf16, rollouts as a graph",
            Way(precision="bf16", kernels="inference", graph=True),
            needs_kernels,
        ),
    ]
    return [Variant(name, partial(build, recipe, way), way.precision, available=found) for name, way, found in ways]


def plans(recipe: Recipe, note: str = "") -> list[tuple[Case, list[Variant]]]:
    """The one case."""
    return [(make_case(recipe, note), make_variants(recipe))]


def run(options: suite.Options, parser: argparse.ArgumentParser, recipe: Recipe, note: str) -> int:
    """Measure the evaluation of `recipe` with the options of another suite; not 0 if a variant failed."""
    return suite.run(replace(options, suite="eval", only=(), variants=()), parser, plans(recipe, note))


def main(argv: Sequence[str]) -> int:
    """The command line; not 0 if a variant failed. Raises MissingPackageError without torchmetrics."""
    require_packages("the evaluation", "torchmetrics")
    return run_suite("eval", __doc__ or "", argv, plans)
