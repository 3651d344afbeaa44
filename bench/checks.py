"""`python -m bench checks`: a small correctness check for every kernel and dtype, and whether graphs equal plain calls.

The cases are those of the other suites at small, odd sizes, so a minute says whether the kernels of a new GPU or a new
Triton can be trusted at all; `status` is what matters in these rows, not the time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from bench import batch_norm, convolution, frame_windows, moments, networks, projected_losses, rollout, step
from bench.harness.case import Case
from bench.harness.variants import Computation, Tensors, Variant, always, needs_kernels
from bench.recipe import Recipe, make_batch
from bench.recipe_suite import run_suite
from fastjepa.graphs.train_step import make_capturable

# Nothing divides anything: tiles have ragged ends, maps are resized on the way up, vectors are not aligned.
ODD = Recipe(batch=3, frames=5, pixels=18, henc=5, hpre=6, dstc=7, steps=2)
# For graphs, sizes at which nothing is resized: the gradient of a bilinear resize is summed on a GPU in no fixed order.
EVEN = replace(ODD, pixels=16)
DIFFERENCES = "numbers that differ"


def without_peers(variants: Sequence[Variant]) -> list[Variant]:
    """Eager and the kernels; torch.compile has nothing to show here and takes long."""
    return [variant for variant in variants if "compile" not in variant.name]


def graph_case(name: str, make_inputs: Callable[..., Tensors]) -> Case:
    """Plain calls against a graph of the same: the number of numbers that differ must be 0."""
    return Case(
        suite="checks", name=name, make_inputs=make_inputs, truth=_none, work=_no_work, baseline="", eager={},
        phase="both", repeatable=False,
    )  # fmt: skip


def _none(inputs: Tensors) -> Tensors:
    return {DIFFERENCES: torch.zeros(1, dtype=torch.float64, device=next(iter(inputs.values())).device)}


def _no_work(phase: str, dtype: torch.dtype) -> None:
    return None


def differences(plain: Tensors, graphed: Tensors) -> Tensors:
    """How many numbers of one are not those of the other, bit for bit."""
    counts = [(plain[name] != graphed[name]).sum() for name in plain]
    return {DIFFERENCES: torch.stack(counts).sum().float().reshape(1)}


def graphed_step(recipe: Recipe, way: step.Way, device: torch.device) -> Computation:
    """Three steps of two models from equal weights, one of them as a graph; losses and gradients are compared."""
    plain, graphed = step.Step(recipe, way, device), step.Step(recipe, step.as_graph(way), device)
    assert plain.step.optimizer is not None
    make_capturable(plain.step.optimizer)  # the same arithmetic as in the graph

    def compute(inputs: Tensors) -> Tensors:
        found = [differences(plain(inputs), graphed(inputs))[DIFFERENCES] for _ in range(3)]
        return {DIFFERENCES: torch.stack(found).sum(0)}

    return compute


def graphed_rollout(recipe: Recipe, way: rollout.Way, device: torch.device) -> Computation:
    """A rollout of four frames, plainly and as a graph."""
    plain = rollout.build(recipe, 4, way, device)
    graphed = rollout.build(recipe, 4, rollout.as_graph(way), device)
    return lambda inputs: differences(plain(inputs), graphed(inputs))


def step_inputs(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Tensors:
    """A batch in fp32, whatever the dtype of the activations."""
    return make_batch(recipe, device, torch.float32)


def states_inputs(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Two states."""
    return rollout.make_states(recipe, device, dtype)


def graph_plans(recipe: Recipe) -> Iterator[tuple[Case, list[Variant]]]:
    """The training step and the rollout, eager and fused."""
    half = {"precision": "bf16", "channels_last": True}
    fused = {"projection": "fused", "fused_blocks": True}
    steps: list[tuple[str, step.Way, Callable[[torch.device], str | None]]] = [
        ("eager", step.Way(projection="eager"), always),
        ("closed form bf16", step.Way(projection="closed_form", **half), always),  # type: ignore[arg-type]
        ("fused", step.Way(**fused), needs_kernels),  # type: ignore[arg-type]
        ("fused bf16", step.Way(**fused, **half), needs_kernels),  # type: ignore[arg-type]
    ]
    yield (
        graph_case("graphed training step = plain", partial(step_inputs, recipe)),
        [Variant(name, partial(graphed_step, recipe, way), available=available) for name, way, available in steps],
    )
    rollouts: list[tuple[str, rollout.Way, Callable[[torch.device], str | None]]] = [
        ("eager", rollout.Way(), always),
        ("fused", rollout.Way(fused=True), needs_kernels),
        (rollout.OWN, rollout.Way(own_convolutions=True), needs_kernels),
        (f"{rollout.OWN} bf16", rollout.Way(own_convolutions=True, bf16=True), needs_kernels),
    ]
    yield (
        graph_case("graphed rollout = plain", partial(states_inputs, recipe)),
        [
            Variant(name, partial(graphed_rollout, recipe, way), available=available)
            for name, way, available in rollouts
        ],
    )


def plans(recipe: Recipe, note: str = "") -> Iterator[tuple[Case, list[Variant]]]:
    """Kernels first, then the networks made of them, then the graphs. The sizes are always the odd ones."""
    kernels: Iterator[tuple[Case, Sequence[Variant]]] = itertools.chain(
        [(projected_losses.make_case(ODD), projected_losses.make_variants())],
        *(module.plans(ODD) for module in (batch_norm, frame_windows, moments)),
        convolution.odd_plans(),
        networks.plans(ODD),
    )
    for case, variants in kernels:
        yield replace(case, suite="checks", name=f"{case.suite}: {case.name}"), without_peers(variants)
    yield from graph_plans(EVEN)


def main(argv: Sequence[str]) -> int:
    """The command line; not 0 if a check failed to run. A wrong result is a row "inexact"."""
    return run_suite("checks", __doc__ or "", argv, plans)
