"""`python -m bench step`: one training step, from the original's to everything at once, each improvement a bar.

Every variant includes the ones above it, up to the CUDA graph; then come peers, whose rows say what they were given.
All start from the same weights and take real optimiser steps, so errors are those of the first step: its losses
(relative to their total), and its gradients of encoder, predictor and projector, against float64, by their norms.
(Handing those gradients out costs each variant one copy of 9 MB a call.) cuDNN runs as in the trainer, deterministic,
but where a variant's name says otherwise. The work of a row is what any implementation must do, each thing once; the
original's own is 12.6 TFLOP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench import evaluation
from bench.harness import suite
from bench.harness.case import Case, Work
from bench.harness.variants import COMPILE_MAX, Computation, Tensors, Variant, always, needs_cuda, needs_kernels
from bench.recipe import GRAPH, Model, Recipe, arithmetic, build_model, make_batch, make_clips, step_work
from bench.recipe_suite import add_recipe_options, chosen_recipe
from fastjepa.eb_jepa import OriginalStep
from fastjepa.fused.losses import swap_losses
from fastjepa.fused.swap import accelerate
from fastjepa.graphs import GraphedTrainStep
from fastjepa.model.losses import ProjectionPath
from fastjepa.model.step import StepLosses, TrainStep, build_optimizer
from fastjepa.optional_packages import require_packages

LEARNING_RATE = 1e-3
ORIGINAL, EAGER_BF16, COMPILED = "original", "bf16, channels-last", "torch.compile(max-autotune)"


@dataclass(frozen=True)
class Way:
    """How one variant runs the step."""

    original: bool = False
    projection: ProjectionPath = "auto"
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    fused_blocks: bool = False
    recompute: bool = True  # of fused blocks
    graph: bool = False
    fastest: bool = False  # cuDNN's fastest algorithms, not the trainer's deterministic ones


def as_graph(way: Way) -> Way:
    """The same, as a CUDA graph."""
    return replace(way, graph=True)


class Step:
    """A training step as a benchmark's computation: it moves its own model, built from the seed."""

    def __init__(self, recipe: Recipe, way: Way, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.way = way
        model = build_model(recipe, device, dtype)
        jepa = model[0]
        if way.channels_last:
            networks: tuple[Any, ...] = (jepa.encoder, jepa.predictor, model[1])
            for network in networks:
                network.to(memory_format=torch.channels_last)
        if way.fused_blocks:
            accelerate(jepa, backend="fused", recompute="on" if way.recompute else "off", verbose=False)
        elif way.projection == "fused":
            swap_losses(jepa, fused=True)
        half = way.precision == "bf16"
        kind = OriginalStep if way.original else partial(TrainStep, projection=way.projection)
        self.step = kind(
            *model,
            build_optimizer(*model, LEARNING_RATE, fused=device.type == "cuda"),
            steps=recipe.steps,
            autocast_dtype=torch.bfloat16 if half else None,
        )
        if way.compile:
            # The whole forward as one graph: the networks, the unroll, the losses and the buffers' advance.
            compiled = torch.compile(self.step.losses, mode=COMPILE_MAX, fullgraph=True, dynamic=False)
            self.step.losses = compiled  # type: ignore[method-assign]

        self.graphed: GraphedTrainStep | None = None
        if way.graph:
            # It gathers its batch itself: the same one.
            self.graphed = GraphedTrainStep(self.step, make_clips(recipe, device), dtype=dtype)
            self.indices = torch.arange(recipe.batch, device=device)

    def __call__(self, inputs: Tensors) -> Tensors:
        """One optimisation step; its losses and its gradients, each group of parameters as one tensor."""
        with arithmetic(self.way.precision, fastest=self.way.fastest):
            if self.graphed is None:
                losses = self.step(inputs["video"], inputs["digit_location"])
            else:
                losses = self.graphed(self.indices)
        return results(self.step, losses)


def results(step: TrainStep, losses: StepLosses) -> Tensors:
    """What is compared between variants: the total and its terms, and gradients by group, by the parameters' names.

    The terms are one tensor, so their errors are relative to the largest: of a single number, eager's error is one draw
    that may be 0 by luck, and no measure for others.
    """
    jepa: Any = step.jepa
    vc = jepa.regularizer
    terms = torch.stack(
        (losses.total, vc.std_coeff * losses.std, vc.cov_coeff * losses.cov, losses.pred, losses.recon, losses.det)
    )
    groups = {"encoder": jepa.encoder, "predictor": jepa.predictor, "projector": jepa.predcost.proj}
    return {"losses": terms} | {f"gradient of {name}": _gradients(module) for name, module in groups.items()}


def _gradients(module: nn.Module) -> Tensor:
    parameters = dict(module.named_parameters())
    return torch.cat([_gradient(parameters[name]).flatten() for name in sorted(parameters)])


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def truth(recipe: Recipe, inputs: Tensors) -> Tensors:
    """The first step in float64. On a CPU, where sizes are small, it is the original's. On a GPU, which has not the
    memory for that, the losses are in closed form, which the tests show equal to 1e-9, and the networks' activations
    are computed again in the backward pass: at B = 64 they are 71 GB.
    """
    video = inputs["video"]
    on_cpu = video.device.type == "cpu"
    model: Model = build_model(recipe, video.device, torch.float64)
    if not on_cpu:
        keep_inputs_only(model[0])
    kind = OriginalStep if on_cpu else partial(TrainStep, projection="closed_form")
    step = kind(*model, steps=recipe.steps)
    return results(step, step(video, inputs["digit_location"]))


def keep_inputs_only(jepa: Any) -> None:
    """Let the encoder and each call of the predictor keep their inputs for the backward pass, and nothing else.

    Running buffers are then advanced twice a call; no result of a step in training mode depends on them.
    """
    for network in (jepa.encoder, jepa.predictor):
        network.forward = partial(checkpoint, network.forward, use_reentrant=False)


def make_case(recipe: Recipe, note: str = "") -> Case:
    """The training step of one recipe."""
    work = step_work(recipe)

    return Case(
        suite="step",
        name=f"{recipe}{note}",
        make_inputs=partial(make_batch, recipe),
        truth=partial(truth, recipe),
        work=partial(_work, recipe),
        baseline=ORIGINAL,
        eager={"fp32": ORIGINAL, "tf32": "TF32", "bf16": EAGER_BF16},
        phase="step",
        measure="norm",
        repeatable=False,
        rates={
            "samples_per_second": float(recipe.batch),
            "teraflops_per_second_of_the_original": work.original_flops / 1e12,
        },
    )


def _work(recipe: Recipe, phase: str, dtype: torch.dtype) -> Work:
    return step_work(recipe).once(dtype)


def make_variants(recipe: Recipe, device: torch.device) -> list[Variant]:
    """The waterfall, then the peers. On a GPU what is not bf16 is tf32, but for the original."""
    base = "tf32" if device.type == "cuda" else "fp32"
    half = Way(projection="closed_form", precision="bf16", channels_last=True)
    blocks = replace(half, projection="fused", fused_blocks=True)
    ways: list[tuple[str, Way, Callable[[torch.device], str | None], str]] = [
        (ORIGINAL, Way(original=True), always, ""),
        ("TF32", Way(original=True, precision="tf32"), needs_cuda, ""),
        ("each thing once", Way(projection="eager", precision=base), always, ""),
        ("closed-form losses", Way(projection="closed_form", precision=base), always, ""),
        ("channels-last", Way(projection="closed_form", channels_last=True), needs_cpu, ""),
        (EAGER_BF16, half, always, ""),
        ("fused losses", replace(half, projection="fused"), needs_kernels, ""),
        ("fused blocks", blocks, needs_kernels, ""),
        (GRAPH, replace(blocks, graph=True), needs_kernels, ""),
        (f"{GRAPH}, activations kept", replace(blocks, graph=True, recompute=False), needs_kernels, ""),
        (f"{GRAPH}, cuDNN's fastest", replace(blocks, graph=True, fastest=True), needs_kernels, ""),
        ("original, cuDNN's fastest", Way(original=True, fastest=True), needs_cuda, _FASTEST),
        (COMPILED, replace(half, compile=True), needs_cuda, _PLAIN),
        (
            f"{COMPILED}, cuDNN's fastest",
            replace(half, compile=True, fastest=True),
            needs_cuda,
            f"{_PLAIN}; {_FASTEST}",
        ),
        (f"{COMPILED}, in a CUDA graph", replace(half, compile=True, graph=True), needs_cuda, _CAPTURED),
        (f"{COMPILED}, fused losses", replace(half, projection="fused", compile=True), needs_kernels, _FUSED_LOSSES),
    ]
    dtypes = {"bf16": torch.bfloat16}  # of the activations; batches are fp32
    return [
        Variant(
            name, partial(build, recipe, way), way.precision, dtypes.get(way.precision, torch.float32), available,
            given=given,
        )
        for name, way, available, given in ways
    ]  # fmt: skip


# What peers are given, so that no ratio is one of maths that the other could have had.
_FASTEST = "cuDNN's fastest algorithms, deterministic or not"
_MATHS = "each thing once, the losses in closed form, bf16 autocast, channels-last, the whole forward as one FX graph"
_PLAIN = f"{_MATHS}; no CUDA graph"
_CAPTURED = f"{_MATHS}, captured with backward and optimizer in one CUDA graph as ours is"
_FUSED_LOSSES = _PLAIN.replace("in closed form", "by our kernels")


def needs_cpu(device: torch.device) -> str | None:
    """Availability of what a GPU has in a better form further down."""
    return None if device.type == "cpu" else "a CPU's bar: on a GPU channels-last comes with bf16"


def build(recipe: Recipe, way: Way, device: torch.device) -> Computation:
    """The computation of one variant (a module-level function, so that it can be sent to another process)."""
    return Step(recipe, way, device)


def main(argv: Sequence[str]) -> int:
    """The command line; not 0 if a variant failed."""
    parser = suite.make_parser("step", __doc__ or "")
    add_recipe_options(parser)
    parser.add_argument("--eval", action="store_true", help="afterwards the evaluation too (python -m bench eval)")
    args = parser.parse_args(argv)
    if args.eval:
        require_packages("the evaluation", "torchmetrics")
    options = suite.resolve("step", parser, args, argv)
    recipe = chosen_recipe(parser, args, options.device)
    note = " (quick)" if options.quick else ""
    status = suite.run(options, parser, [(make_case(recipe, note), make_variants(recipe, options.device))])
    if args.eval:
        status = max(status, evaluation.run(options, parser, recipe, note))
    return status
