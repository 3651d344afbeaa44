"""`python -m bench ceilings`: what the device can do at best: copies, matrix products, cuDNN's convolutions.

The convolutions are every class of 3×3 convolution of the training recipe, in bf16 and channels-last: forward, the
gradient of the input, and that of the weights, each with the trainer's deterministic algorithms and with the fastest
of all that cuDNN measures. Nothing here is exact or not: rows are "unjudged".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bench.harness.case import Case, Work
from bench.harness.variants import Computation, Tensors, Variant, always, needs_cuda
from bench.recipe import TINY, Recipe, build_model
from bench.recipe_suite import run_suite

DETERMINISTIC, FASTEST = "cuDNN deterministic", "cuDNN's fastest"
DIRECTIONS = ("forward", "input gradient", "weight gradient")


@dataclass(frozen=True)
class Convolution:
    """A 3×3 convolution of (frames, channels, side, side) to `out` channels, with padding 1."""

    frames: int
    channels: int
    out: int
    side: int
    stride: int

    @property
    def flops(self) -> int:
        """2 · (multiply–adds); the same in each direction."""
        return 2 * self.frames * (-(-self.side // self.stride)) ** 2 * self.channels * self.out * 9

    def elements(self, direction: str) -> int:
        """Numbers read and written, each once: input, output and weights take part in all three directions."""
        given = self.frames * self.channels * self.side**2
        made = self.frames * self.out * (-(-self.side // self.stride)) ** 2
        return given + made + 9 * self.channels * self.out

    def __str__(self) -> str:
        return f"3x3 {self.channels}->{self.out} {self.frames}x{self.side}x{self.side}/{self.stride}"


def convolutions_of(recipe: Recipe) -> list[Convolution]:
    """Every different 3×3 convolution of the encoder, then of the predictor, as one training step calls them."""
    found: list[Convolution] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        frames, channels, side, _ = inputs[0].shape
        found.append(Convolution(frames, channels, out.shape[1], side, side // out.shape[2]))

    jepa = build_model(recipe, torch.device("meta"))[0]
    for layer in jepa.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            layer.register_forward_hook(note)
    jepa.predictor(jepa.encoder(torch.empty(recipe.batch, 1, recipe.frames, *[recipe.pixels] * 2, device="meta")))
    return list(dict.fromkeys(found))


def make_convolution_inputs(convolution: Convolution, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Input, weight and the output's gradient, channels-last."""
    c, side = convolution, -(-convolution.side // convolution.stride)
    generator = torch.Generator(device).manual_seed(2025)

    def randn(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return values.to(dtype).contiguous(memory_format=torch.channels_last)

    return {
        "x": randn(c.frames, c.channels, c.side, c.side),
        "weight": randn(c.out, c.channels, 3, 3),
        "grad": randn(c.frames, c.out, side, side),
    }


def convolve(
    convolution: Convolution, direction: str, deterministic: bool, measured: bool, device: torch.device
) -> Computation:
    """One direction of the convolution, with that choice of algorithms."""
    stride = [convolution.stride] * 2
    mask = [direction == "input gradient", direction == "weight gradient", False]

    def compute(inputs: Tensors) -> Tensors:
        x, weight, grad = inputs["x"], inputs["weight"], inputs["grad"]
        with torch.backends.cudnn.flags(enabled=True, benchmark=measured, deterministic=deterministic):
            if direction == "forward":
                return {"out": torch.nn.functional.conv2d(x, weight, padding=1, stride=stride)}
            found = torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, [1, 1], [1, 1], False, [0, 0], 1, mask
            )
        return {"out": found[0] if direction == "input gradient" else found[1]}

    return compute


def convolution_work(convolution: Convolution, direction: str, phase: str, dtype: torch.dtype) -> Work:
    """Its products, and its tensors once each."""
    return Work(convolution.elements(direction) * dtype.itemsize, convolution.flops)


def make_blocks(size: int, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Two square matrices."""
    generator = torch.Generator(device).manual_seed(2025)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    return {"a": a, "b": b}


def copy(device: torch.device) -> Computation:
    """b ← a."""
    return lambda inputs: {"out": inputs["b"].copy_(inputs["a"])}


def multiply(tf32: bool, device: torch.device) -> Computation:
    """a @ b, by tensor cores for fp32 if `tf32`."""

    def compute(inputs: Tensors) -> Tensors:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            return {"out": inputs["a"] @ inputs["b"]}
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return compute


def block_work(bytes_per_element: int, flops: int, phase: str, dtype: torch.dtype) -> Work:
    """Given bytes and products, in all."""
    return Work(bytes_per_element * dtype.itemsize, flops)


def _ceiling(name: str, inputs: Callable[..., Tensors], work: Callable[..., Work], baseline: str, phase: str) -> Case:
    return Case("ceilings", name, inputs, None, work, baseline, {}, phase=phase)


def plans(recipe: Recipe, note: str = "") -> Iterator[tuple[Case, list[Variant]]]:
    """Copy, matrix products, then the convolutions in the order of their layers."""
    small = recipe.pixels < 64
    side, wide = (256, 256) if small else (16384, 8192)
    half = torch.bfloat16
    case = _ceiling(
        f"copy of {side}x{side} bf16{note}", partial(make_blocks, side), partial(block_work, 2 * side**2, 0), "copy",
        "copy",
    )  # fmt: skip
    yield case, [Variant("copy", copy, "bf16", half)]
    case = _ceiling(
        f"product of {wide}x{wide}{note}", partial(make_blocks, wide), partial(block_work, 3 * wide**2, 2 * wide**3),
        "bf16", "product",
    )  # fmt: skip
    yield (
        case,
        [
            Variant("bf16", partial(multiply, False), "bf16", half),
            Variant("tf32", partial(multiply, True), "tf32", available=needs_cuda),
            Variant("fp32", partial(multiply, False)),
        ],
    )
    for convolution in convolutions_of(TINY)[:1] if small else convolutions_of(recipe):
        for direction in DIRECTIONS:
            case = _ceiling(
                f"{convolution}, {direction}{note}", partial(make_convolution_inputs, convolution),
                partial(convolution_work, convolution, direction), DETERMINISTIC, direction,
            )  # fmt: skip
            yield (
                case,
                [
                    Variant(name, partial(convolve, convolution, direction, fixed, measured), "bf16", half, available)
                    for name, fixed, measured, available in (
                        (DETERMINISTIC, True, False, always),
                        (FASTEST, False, True, needs_cuda),
                    )
                ],
            )


def main(argv: Sequence[str]) -> int:
    """The command line; not 0 if something failed."""
    return run_suite("ceilings", __doc__ or "", argv, plans)
