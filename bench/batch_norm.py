"""`python -m bench batch_norm`: BatchNorm blocks at every shape of the recipe, forward and backward apart.

A block is everything between two convolutions: BatchNorm in training mode, the residual if there is one (raw, with a
BatchNorm of its own, where the shortcut is a convolution), and ReLU. At B = 64 the encoder sees 640 frames and the
predictor 576 pairs of frames in one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness import variants as ways
from bench.harness.case import BACKWARD, BOTH, FORWARD, Case, Work, random_cotangents
from bench.harness.variants import COMPILE_MAX, Computation, Tensors, Variant, needs_kernels
from bench.recipe import Recipe
from bench.recipe_suite import run_suite

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
        from fastjepa.kernels.batch_norm.fused import batch_norm_act

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
    # Backward reads the gradient and x in both passes, and a residual for the ReLU's mask and for its own BatchNorm.
    # The masked gradient is that of a plain residual: stored by the first pass, the second reads only it and x.
    backward = {PLAIN: 2 + 2 + 1, RESIDUAL: (3 + 1) + (2 + 1), NORMALIZED: 2 + 2 + 2 + 2}[block.form]
    tensors = {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[phase]
    return Work(tensors * tensor, 0)


def block_case(block: Block, note: str = "") -> Case:
    """The case of one block."""
    return Case(
        suite="batch_norm",
        name=f"{block}{note}",
        make_inputs=partial(make_block_inputs, block),
        truth=block_eager,
        work=partial(block_work, block),
        cotangents=random_cotangents,
        baseline=EAGER,
        eager={"fp32": EAGER, "bf16": EAGER_BF16},
    )


def block_variants() -> list[Variant]:
    """Eager, compiled and fused."""
    return [
        ways.eager(block_eager),
        ways.eager_bf16(block_eager),
        ways.gpu_only(ways.compiled(block_eager, "torch.compile(max-autotune) bf16", COMPILE_MAX, bf16=True)),
        Variant("fused", build_fused_block, available=needs_kernels, prepare=ways.channels_last),
        Variant("fused bf16", build_fused_block, "bf16", torch.bfloat16, needs_kernels, ways.channels_last),
    ]


def plans(recipe: Recipe, note: str = "") -> Iterator[tuple[Case, list[Variant]]]:
    """Every block of the recipe."""
    for block in blocks_of(recipe):
        yield block_case(block, note), block_variants()


def main(argv: Sequence[str]) -> int:
    """The command line; not 0 if a variant failed."""
    return run_suite("batch_norm", __doc__ or "", argv, plans)
