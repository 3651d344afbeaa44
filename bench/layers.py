"""`python -m bench layers`: BatchNorm blocks at every shape of the recipe, and the two networks whole.

Forward and backward are timed apart. A block is everything between two convolutions: BatchNorm in training mode, the
residual if there is one (raw, with a BatchNorm of its own, where the shortcut is a convolution), and ReLU. At B = 64
the encoder sees 640 frames and the predictor 576 pairs of frames in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import suite
from bench import variants as ways
from bench.case import BACKWARD, BOTH, FORWARD, Case, Work
from bench.recipe import Recipe, arithmetic, build_model, count
from bench.variants import COMPILE_MAX, Computation, Tensors, Variant, needs_cuda, needs_kernels
from fastjepa.fused.networks import FusedResNet5, FusedResUNet
from fastjepa.kernels.batch_norm.fused import batch_norm_act

PLAIN, RESIDUAL, NORMALIZED = "plain", "residual", "normalized residual"
EAGER, EAGER_BF16 = "eager", "eager bf16"


@dataclass(frozen=True)
class Block:
    """The shape (frames, channels, pixels, pixels) of a BatchNorm block, and what is added before its ReLU."""

    frames: int
    channels: int
    pixels: int
    form: str

    @property
    def elements(self) -> int:
        """How many numbers x has."""
        return self.frames * self.channels * self.pixels**2

    def __str__(self) -> str:
        return f"BatchNorm {self.frames}x{self.channels}x{self.pixels}x{self.pixels} {self.form}"


def blocks_of(recipe: Recipe) -> list[Block]:
    """Every different block of one training step: the encoder's, then the predictor's, in the order of the layers."""
    seen, pair_seen, side = recipe.batch * recipe.frames, recipe.batch * (recipe.frames - 1), recipe.pixels
    h, p, d = recipe.henc, recipe.hpre, recipe.dstc
    found = [Block(seen, h, side, PLAIN), Block(seen, h, side, RESIDUAL)]
    found += [Block(seen, c, side, form) for c in (2 * h, d) for form in (PLAIN, NORMALIZED)]
    found += [Block(pair_seen, p, side, form) for form in (PLAIN, RESIDUAL, NORMALIZED)]
    found += [Block(pair_seen, p << k, side >> k, form) for k in (1, 2, 3) for form in (PLAIN, NORMALIZED)]
    return list(dict.fromkeys(found))


# ---- blocks ----------------------------------------------------------------------------------------------------------


def make_block_inputs(block: Block, device: torch.device, dtype: torch.dtype) -> Tensors:
    """x, the residual if any, and the BatchNorms' weights and biases in fp32. Drawn on the device: they are large."""
    generator = torch.Generator(device).manual_seed(2025)
    shape = (block.frames, block.channels, block.pixels, block.pixels)
    inputs = {"x": torch.randn(shape, generator=generator, device=device)}
    if block.form != PLAIN:
        inputs["residual"] = torch.randn(shape, generator=generator, device=device)
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    for prefix in ("", "residual_") if block.form == NORMALIZED else ("",):
        for name, mean in (("weight", 1.0), ("bias", 0.0)):
            vector = torch.randn(block.channels, generator=generator, device=device)
            inputs[prefix + name] = mean + 0.2 * vector
    return {name: x.requires_grad_() for name, x in inputs.items()}


def block_eager(inputs: Tensors) -> Tensors:
    """relu(BN(x) [+ residual | + BN(residual)]) in plain PyTorch."""
    out = _batch_norm(inputs["x"], inputs["weight"], inputs["bias"])
    if "residual_weight" in inputs:
        out = out + _batch_norm(inputs["residual"], inputs["residual_weight"], inputs["residual_bias"])
    elif "residual" in inputs:
        out = out + inputs["residual"]
    return {"out": F.relu(out)}


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


class FusedBlock:
    """The same by the fused op, whose BatchNorms hold the inputs' weights and biases; bound at the first call."""

    def __init__(self) -> None:
        self.modules: dict[str, nn.BatchNorm2d] = {}

    def __call__(self, inputs: Tensors) -> Tensors:
        """See block_eager."""
        if not self.modules:
            prefixes = [prefix for prefix in ("", "residual_") if f"{prefix}weight" in inputs]
            self.modules = {prefix: _bound(inputs[f"{prefix}weight"], inputs[f"{prefix}bias"]) for prefix in prefixes}
        residual, residual_bn = inputs.get("residual"), self.modules.get("residual_")
        return {"out": batch_norm_act(inputs["x"], self.modules[""], residual, residual_bn)}


def _bound(weight: Tensor, bias: Tensor) -> nn.BatchNorm2d:
    """A BatchNorm without running buffers that uses these very tensors, which need not be Parameters."""
    norm = nn.BatchNorm2d(weight.shape[0], track_running_stats=False)
    del norm.weight, norm.bias
    norm.weight, norm.bias = cast(Any, weight), cast(Any, bias)
    return norm


def build_fused_block(device: torch.device) -> Computation:
    """A fresh FusedBlock."""
    return FusedBlock()


def block_work(block: Block, phase: str, dtype: torch.dtype) -> Work:
    """Bytes: x is read twice forward (statistics, apply) and twice backward (sums, apply), as are the residual and the
    output's gradient where they are needed; outputs are written once. A plain residual takes no part in statistics.
    """
    tensor = block.elements * dtype.itemsize
    forward = {PLAIN: 2 + 1, RESIDUAL: 2 + 1 + 1, NORMALIZED: 2 + 2 + 1}[block.form]
    # Backward reads the gradient and x in both passes, and the residual for the ReLU's mask and its own BatchNorm.
    backward = {PLAIN: 2 + 2 + 1, RESIDUAL: 2 + 2 + 2 + 2, NORMALIZED: 2 + 2 + 2 + 2}[block.form]
    tensors = {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[phase]
    return Work(tensors * tensor, 0)


def block_case(block: Block, note: str = "") -> Case:
    """The case of one block."""
    return Case(
        suite="layers",
        name=f"{block}{note}",
        make_inputs=partial(make_block_inputs, block),
        truth=block_eager,
        work=partial(block_work, block),
        cotangents=random_cotangents,
        baseline=EAGER,
        eager={"fp32": EAGER, "bf16": EAGER_BF16},
    )


def random_cotangents(outputs: Tensors) -> Tensors:
    """A random gradient of every output, in its layout; values that bf16 holds exactly, so that all dtypes agree."""
    found = {}
    for name, out in outputs.items():
        generator = torch.Generator(out.device).manual_seed(11)
        values = torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32).bfloat16()
        found[name] = torch.empty_like(out).copy_(values)
    return found


def block_variants() -> list[Variant]:
    """Eager, compiled and fused."""
    return [
        ways.eager(block_eager),
        ways.eager_bf16(block_eager),
        _gpu_only(ways.compiled(block_eager, "torch.compile(max-autotune) bf16", COMPILE_MAX, bf16=True)),
        Variant("fused", build_fused_block, available=needs_kernels, prepare=ways.channels_last),
        Variant("fused bf16", build_fused_block, "bf16", torch.bfloat16, needs_kernels, ways.channels_last),
    ]


def _gpu_only(variant: Variant) -> Variant:
    return replace(variant, available=needs_cuda)


# ---- whole networks --------------------------------------------------------------------------------------------------


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
            module = (FusedResNet5 if part == "encoder" else FusedResUNet).from_eager(module)
        self.module = module
        self.forward = self._forward
        if compile:
            torch._dynamo.reset()
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
        suite="layers",
        name=f"{part} {recipe}{note}",
        make_inputs=partial(make_network_inputs, recipe, part),
        truth=partial(network_truth, recipe, part),
        work=partial(network_work, recipe, part),
        cotangents=random_cotangents,
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
        )
        for name, precision, fused, compile, available in table
    ]


def plans(recipe: Recipe, note: str = "") -> Iterator[tuple[Case, list[Variant]]]:
    """The networks first, then every block."""
    for part in ("encoder", "predictor"):
        yield network_case(recipe, part, note), network_variants(recipe, part)
    for block in blocks_of(recipe):
        yield block_case(block, note), block_variants()


def main(argv: Sequence[str]) -> int:
    """The command line; returns 1 if a variant failed."""
    parser = suite.make_parser("layers", __doc__ or "")
    suite.add_recipe_options(parser)
    args = parser.parse_args(argv)
    options = suite.resolve("layers", parser, args, argv)
    recipe = suite.chosen_recipe(parser, args, options.device)
    return suite.run(options, parser, plans(recipe, " (quick)" if options.quick else ""))
