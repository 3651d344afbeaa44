"""`python -m bench rollout`: predicting k frames from two, one after another, as a user who waits for them sees it.

z_{t+1} = f(z_{t-1}, z_t), from two encoded frames (B, D, 2, H, W) to k predicted ones (B, D, k, H, W), with the
predictor in eval mode. Times are latencies of single calls; p50 and p99. BatchNorm's running buffers are settled as in
a trained network, so that states neither grow nor die over a hundred steps. "Folded convolutions" are our own kernels,
with BatchNorm folded in and everything around a convolution in its launch.

Beside its time a row says what a step of the network launches (`launches_per_step`) and what it moves for each clip,
whose next frame it predicts (`bytes_per_frame`), as `python -m bench traffic` counts them on shapes; not of what
torch.compile makes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from bench.evaluation import settle
from bench.folding import folded_batch_norm
from bench.harness import suite
from bench.harness.case import Case, Work
from bench.harness.variants import Computation, Tensors, Variant, always, needs_cuda, needs_kernels
from bench.recipe import TINY, Recipe, arithmetic, build_model, count
from bench.traffic import totals
from bench.traffic import work as work_of_traffic
from fastjepa.fused.inference import InferencePredictor
from fastjepa.graphs import GraphedRollout
from fastjepa.model.context import CONTEXT
from fastjepa.model.networks import StateOnlyPredictor

EAGER, EAGER_BF16, OWN = "eager", "eager bf16", "folded convolutions"
Available = Callable[[torch.device], str | None]


@dataclass(frozen=True)
class Way:
    """How one variant predicts a step. `folded`: BatchNorm in the convolutions' weights; `own_convolutions`: by our
    kernels too.
    """

    bf16: bool = False
    folded: bool = False
    compile: bool = False
    fused: bool = False
    graph: bool = False
    own_convolutions: bool = False


def as_graph(way: Way) -> Way:
    """The same, as a CUDA graph."""
    return replace(way, graph=True)


def make_states(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Two states, ≥ 0 and sparse as the encoder makes them."""
    generator = torch.Generator().manual_seed(2025)
    shape = (recipe.batch, recipe.dstc, CONTEXT, recipe.pixels, recipe.pixels)
    return {"states": torch.randn(shape, generator=generator).relu_().to(device, dtype)}


def make_predictor(recipe: Recipe, way: Way, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The predictor in eval mode, on channels-last convolutions."""
    jepa = build_model(recipe, device, torch.promote_types(dtype, torch.float32))[0]
    settle(jepa, recipe)
    predictor = jepa.predictor.eval()
    if way.own_convolutions:
        return predictor  # whose weights are folded as they are, and then rounded
    if way.folded:
        predictor = folded_batch_norm(predictor)
    for layer in predictor.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):  # not BatchNorm: its statistics stay fp32
            layer.to(dtype)
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    if way.fused:
        from fastjepa.fused.networks import FusedResUNet

        predictor = StateOnlyPredictor(FusedResUNet.from_eager(predictor.predictor), CONTEXT).eval()  # type: ignore[arg-type]
    return predictor


class Rollout:
    """A rollout as a benchmark's computation: one call of the predictor for each step."""

    def __init__(self, recipe: Recipe, steps: int, way: Way, device: torch.device, dtype: torch.dtype) -> None:
        self.steps, self.way = steps, way
        self.predictor = make_predictor(recipe, way, device, dtype)
        self.predict = self._compiled() if way.compile else self._predict
        self.graphed: GraphedRollout | None = None
        self.folded: InferencePredictor | None = None
        half = torch.bfloat16 if way.bf16 else None
        if way.own_convolutions and way.graph:
            self.graphed = GraphedRollout(
                self.predictor, steps, autocast_dtype=half, fold_batch_norm=True, convolutions="fused"
            )
        elif way.own_convolutions:
            self.folded = InferencePredictor.from_eager(self.predictor, half, "fused")
        elif way.graph:
            self.graphed = GraphedRollout(self.predictor, steps)

    @torch.no_grad()
    def __call__(self, inputs: Tensors) -> Tensors:
        """{"frames": (B, D, k, H, W)}"""
        states = inputs["states"]
        with arithmetic("fp32"):
            if self.graphed is not None:
                return {"frames": self.graphed(states)[:, :, CONTEXT:]}
            if self.folded is not None:
                return {"frames": self.folded.roll_out(states, self.steps)[:, :, CONTEXT:]}
            for _ in range(self.steps):
                states = torch.cat((states, self.predict(states[:, :, -CONTEXT:])), dim=2)
        return {"frames": states[:, :, CONTEXT:]}

    def _predict(self, pair: Tensor) -> Tensor:
        return self.predictor(pair)

    def _compiled(self) -> Callable[[Tensor], Tensor]:
        """Each step one launch of a CUDA graph, whose output the next step must copy: its memory is reused."""
        compiled = torch.compile(self._predict, mode="reduce-overhead", fullgraph=True, dynamic=False)

        def predict(pair: Tensor) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(pair).clone()

        return predict


def build(recipe: Recipe, steps: int, way: Way, device: torch.device) -> Computation:
    """The computation of one variant (a module-level function, so that it can be sent to another process)."""
    return Rollout(recipe, steps, way, device, torch.bfloat16 if way.bf16 else torch.float32)


def truth(recipe: Recipe, steps: int, inputs: Tensors) -> Tensors:
    """The plain rollout in float64."""
    return Rollout(recipe, steps, Way(), inputs["states"].device, torch.float64)(inputs)


def work(recipe: Recipe, steps: int, phase: str, dtype: torch.dtype) -> Work:
    """Bytes: each layer's input and output, and the weights, once a step."""
    predictor = build_model(recipe, torch.device("meta"))[0].predictor
    pair = torch.empty(recipe.batch, recipe.dstc, CONTEXT, recipe.pixels, recipe.pixels, device="meta")
    layers = count(predictor, pair)
    weights = sum(parameter.numel() for parameter in predictor.parameters())
    return Work(steps * (layers.elements + weights) * dtype.itemsize, steps * layers.forward)


@functools.cache
def step_traffic(recipe: Recipe, way: Way) -> dict[str, float]:
    """Kernels of one step of the network, and bytes that they move for each clip, counted on shapes."""
    counted = work_of_traffic.Way(
        "", bf16=way.bf16, channels_last=True, fused=way.fused, folded=way.folded, own_convolutions=way.own_convolutions
    )
    step = totals.by_part(work_of_traffic.rollout_step(recipe, counted))[totals.ALL]
    return {"launches_per_step": float(step.kernels), "bytes_per_frame": step.kernel_bytes / recipe.batch}


def make_case(recipe: Recipe, steps: int, note: str = "") -> Case:
    """The rollout of `steps` frames."""
    return Case(
        suite="rollout",
        name=f"B={recipe.batch} steps={steps}{note}",
        make_inputs=partial(make_states, recipe),
        truth=partial(truth, recipe, steps),
        work=partial(work, recipe, steps),
        baseline=EAGER,
        eager={"fp32": EAGER, "bf16": EAGER_BF16},
        phase="rollout",
        latency=True,
        rates={"frames_per_second": float(recipe.batch * steps)},
    )


def make_variants(recipe: Recipe, steps: int) -> list[Variant]:
    """Eager, folded, compiled, fused; in fp32 and bf16. Peers get the folding of BatchNorm too.

    `GraphedRollout` is one CUDA graph for all steps; on a CPU it runs the same code plainly, without copying states.
    """
    table: list[tuple[str, Way, Available]] = [
        (EAGER, Way(), always),
        ("eager, BatchNorm folded", Way(folded=True), always),
        (EAGER_BF16, Way(bf16=True, folded=True), needs_cuda),
        ("torch.compile(reduce-overhead) bf16", Way(bf16=True, folded=True, compile=True), needs_cuda),
        ("fused", Way(fused=True), needs_kernels),
        ("fused bf16", Way(bf16=True, fused=True), needs_kernels),
        ("folded, in one graph", Way(folded=True, graph=True), always),
        ("folded bf16, in one graph", Way(bf16=True, folded=True, graph=True), needs_cuda),
        ("fused bf16, in one graph", Way(bf16=True, fused=True, graph=True), needs_kernels),
        (OWN, Way(own_convolutions=True), needs_kernels),
        (f"{OWN} bf16", Way(bf16=True, own_convolutions=True), needs_kernels),
        (f"{OWN}, in one graph", Way(own_convolutions=True, graph=True), needs_kernels),
        (f"{OWN} bf16, in one graph", Way(bf16=True, own_convolutions=True, graph=True), needs_kernels),
    ]
    return [
        Variant(
            name,
            partial(build, recipe, steps, way),
            "bf16" if way.bf16 else "fp32",
            torch.bfloat16 if way.bf16 else torch.float32,
            available,
            given="BatchNorm folded" if way.folded and not way.graph else "",
            facts=None if way.compile else partial(step_traffic, recipe, replace(way, graph=False)),
        )
        for name, way, available in table
    ]


def plans(
    recipe: Recipe, batches: Sequence[int], horizons: Sequence[int], note: str
) -> Iterator[tuple[Case, list[Variant]]]:
    """Every batch size at every horizon."""
    for batch in batches:
        for steps in horizons:
            sized = replace(recipe, batch=batch)
            yield make_case(sized, steps, note), make_variants(sized, steps)


def main(argv: Sequence[str]) -> int:
    """The command line; not 0 if a variant failed."""
    parser = suite.make_parser("rollout", __doc__ or "")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 8 64 on a GPU, 1 on a CPU")
    parser.add_argument("--horizon", type=int, nargs="+", help="frames; default: 1 8 50 100 on a GPU, 1 8 on a CPU")
    args = parser.parse_args(argv)
    options = suite.resolve("rollout", parser, args, argv)
    on_gpu = options.device.type == "cuda"
    batches = args.batch or ([1, 8, 64] if on_gpu and not options.quick else [1])
    horizons = args.horizon or ([2] if options.quick else [1, 8, 50, 100] if on_gpu else [1, 8])
    for name, values in (("batch", batches), ("horizon", horizons)):
        if min(values) < 1:
            parser.error(f"--{name} must be at least 1, got {min(values)}")
    recipe, note = (TINY, " (quick)") if options.quick else (Recipe(), "")
    return suite.run(options, parser, plans(recipe, batches, horizons, note))
