"""`python -m bench networks`: the encoder and the predictor whole, in training mode, forward and backward apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from bench.harness import variants as ways
from bench.harness.case import BACKWARD, BOTH, FORWARD, Case, Work, random_cotangents
from bench.harness.variants import COMPILE_MAX, Tensors, Variant, needs_cuda, needs_kernels
from bench.recipe import Recipe, arithmetic, build_model, count
from bench.recipe_suite import run_suite

EAGER, EAGER_BF16 = "eager", "eager bf16"


def make_network_inputs(recipe: Recipe, part: str, device: torch.device, dtype: torch.dtype) -> Tensors:
    """ "x" and the network's parameters by name, all fp32 or wider: in bf16 variants autocast rounds them.

    x is a video for the encoder, which wants no gradient, and pairs of states (N, 2D, H, W) for the predictor.
    """
    generator = torch.Generator().manual_seed(2025)
    side = recipe.pixels
    if part == "encoder":
        x = torch.rand(recipe.batch * recipe.frames, 1, side, side, generator=generator).to(device)
    else:
        x = torch.randn(recipe.batch * (recipe.frames - 1), 2 * recipe.dstc, side, side, generator=generator)
        x = x.relu_().to(device).requires_grad_()
    return {
        "x": x,
        **{name: p.detach().requires_grad_() for name, p in network(recipe, part, device).named_parameters()},
    }


def network(recipe: Recipe, part: str, device: torch.device) -> nn.Module:
    """The eager encoder or predictor, in training mode."""
    jepa = build_model(recipe, device)[0]
    return jepa.encoder if part == "encoder" else cast(nn.Module, jepa.predictor.predictor)


class Network:
    """A network called with the parameters that are among the inputs, in autocast if `precision` is "bf16"."""

    def __init__(
        self, recipe: Recipe, part: str, precision: str, fused: bool, compile: bool, device: torch.device
    ) -> None:
        self.precision = precision
        module = network(recipe, part, device)
        if fused:
            from fastjepa.fused.networks import FusedResNet5, FusedResUNet

            module = (FusedResNet5 if part == "encoder" else FusedResUNet).from_eager(module)
        self.module = module
        self.forward = self._forward
        if compile:
            self.forward = torch.compile(self._forward, mode=COMPILE_MAX, fullgraph=True, dynamic=False)

    def __call__(self, inputs: Tensors) -> Tensors:
        """{"out": the network's output}"""
        with arithmetic(self.precision):
            return {"out": self.forward(inputs)}

    def _forward(self, inputs: Tensors) -> Tensor:
        parameters = {name: x for name, x in inputs.items() if name != "x"}
        x = inputs["x"]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return cast(Tensor, torch.func.functional_call(self.module, parameters, (x,)))


def network_truth(recipe: Recipe, part: str, inputs: Tensors) -> Tensors:
    """The eager network in float64."""
    module = network(recipe, part, inputs["x"].device).double()
    parameters = {name: x for name, x in inputs.items() if name != "x"}
    return {"out": torch.func.functional_call(module, parameters, (inputs["x"],))}


def network_work(recipe: Recipe, part: str, phase: str, dtype: torch.dtype) -> Work:
    """Bytes: each layer's input and output once forward, and once for each gradient backward."""
    module, side = network(recipe, part, torch.device("meta")), recipe.pixels
    if part == "encoder":
        x = torch.empty(recipe.batch * recipe.frames, 1, side, side, device="meta")
    else:
        x = torch.empty(recipe.batch * (recipe.frames - 1), 2 * recipe.dstc, side, side, device="meta").requires_grad_()
    layers = count(module, x)
    flops = {FORWARD: layers.forward, BACKWARD: layers.backward, BOTH: layers.forward + layers.backward}[phase]
    return Work({FORWARD: 1, BACKWARD: 2, BOTH: 3}[phase] * layers.elements * dtype.itemsize, flops)


def network_case(recipe: Recipe, part: str, note: str = "") -> Case:
    """The case of the encoder or the predictor."""
    return Case(
        suite="networks",
        name=f"{part} {recipe}{note}",
        make_inputs=partial(make_network_inputs, recipe, part),
        truth=partial(network_truth, recipe, part),
        work=partial(network_work, recipe, part),
        cotangents=random_cotangents,
        measure="norm",
        baseline=EAGER,
        eager={"fp32": EAGER, "bf16": EAGER_BF16},
    )


def network_variants(recipe: Recipe, part: str) -> list[Variant]:
    """Eager, compiled and fused, in fp32 and in bf16 autocast."""
    table: list[tuple[str, str, bool, bool, Callable[[torch.device], str | None]]] = [
        (EAGER, "fp32", False, False, ways.always),
        (EAGER_BF16, "bf16", False, False, ways.always),
        ("torch.compile(max-autotune) bf16", "bf16", False, True, needs_cuda),
        ("fused", "fp32", True, False, needs_kernels),
        ("fused bf16", "bf16", True, False, needs_kernels),
    ]
    return [
        Variant(
            name,
            partial(Network, recipe, part, precision, fused, compile),
            precision,
            torch.bfloat16 if precision == "bf16" else torch.float32,  # of the activations
            available=available,
            prepare=dict if name == EAGER else ways.channels_last,
            given="channels-last, bf16 autocast" if compile else "",
        )
        for name, precision, fused, compile, available in table
    ]


def plans(recipe: Recipe, note: str = "") -> Iterator[tuple[Case, list[Variant]]]:
    """The encoder, then the predictor."""
    for part in ("encoder", "predictor"):
        yield network_case(recipe, part, note), network_variants(recipe, part)


def main(argv: Sequence[str]) -> int:
    """The command line; not 0 if a variant failed."""
    return run_suite("networks", __doc__ or "", argv, plans)
