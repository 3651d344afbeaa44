"""`python -m bench projected_losses`: the projected losses of a training step, at the default recipe's size.

B clips of T = 10 frames of 64×64 pixels, states of D = 16 channels, projector 16-64-64, K = 4 predictions: at B = 64
the projector sees N = 2,621,440 rows for every tensor. Backward starts from the gradient that the default recipe
gives each loss: 10·std_loss + 100·cov_loss + mean(prediction_losses).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.harness import suite
from bench.harness import variants as ways
from bench.harness.case import BACKWARD, FORWARD, Case, Work
from bench.harness.variants import Tensors, Variant
from fastjepa.kernels.projected_losses import closed_form, reference

STD_COEFF, COV_COEFF = 10.0, 100.0
EPS = 1e-5
_PARAMETERS = ("weight1", "bias1", "bn_weight", "bn_bias", "weight2")


@dataclass(frozen=True)
class Size:
    """The recipe's sizes; `pixels` is the side of the square frames."""

    batch: int
    frames: int = 10
    pixels: int = 64
    dim: int = 16
    hidden: int = 64
    out: int = 64
    steps: int = 4

    @property
    def rows(self) -> int:
        """N: how many vectors the projector sees in one call."""
        return self.batch * self.frames * self.pixels**2

    def __str__(self) -> str:
        return f"B={self.batch} T={self.frames} {self.pixels}x{self.pixels} D={self.dim} K={self.steps}"


def make_inputs(size: Size, device: torch.device, dtype: torch.dtype) -> Tensors:
    """A state as an encoder makes it (≥ 0, sparse, smooth in time), predictions near it, and a projector.

    The parameters stay fp32, as in mixed-precision training. Drawn on the CPU, so every device gets the same values.
    """
    generator = torch.Generator().manual_seed(2025)
    shape = (size.batch, size.dim, size.frames, size.pixels, size.pixels)
    z = torch.randn(shape, generator=generator).relu_()
    inputs = {"z": z}
    for step in range(1, size.steps + 1):
        inputs[f"prediction{step}"] = z + 0.1 * step * torch.randn(shape, generator=generator)
    inputs = {name: x.to(device, dtype) for name, x in inputs.items()}

    def uniform(*dims: int) -> Tensor:
        return (2 * torch.rand(dims, generator=generator) - 1) / dims[-1] ** 0.5

    parameters = {
        "weight1": uniform(size.hidden, size.dim),
        "bias1": uniform(size.hidden),
        "bn_weight": 1 + uniform(size.hidden),
        "bn_bias": uniform(size.hidden),
        "weight2": uniform(size.out, size.hidden),
    }
    inputs |= {name: x.to(device) for name, x in parameters.items()}
    return {name: x.requires_grad_() for name, x in inputs.items()}


def cotangents(outputs: Tensors) -> Tensors:
    """The gradient of the recipe's total with respect to each loss."""
    losses = outputs["prediction_losses"]
    return {
        "std_loss": torch.full_like(outputs["std_loss"], STD_COEFF),
        "cov_loss": torch.full_like(outputs["cov_loss"], COV_COEFF),
        "prediction_losses": torch.full_like(losses, 1 / max(losses.numel(), 1)),
    }


def work(size: Size, phase: str, dtype: torch.dtype) -> Work:
    """What the closed form needs, at least: the states are read twice forward (moments; projections), since BatchNorm
    needs the statistics of all rows first, and for the same reason twice backward, where their gradients are written.
    """
    states = size.steps + 1
    bytes_per_pass = states * size.rows * size.dim * dtype.itemsize
    hidden, dim = size.hidden, size.dim
    project, square, moments = 2 * hidden * dim, 2 * hidden * hidden, 2 * dim * dim
    # Forward: x xᵀ, W1 x, and r rᵀ or ΔΔᵀ. Backward: W1 x and G r in both passes, dy xᵀ in one, W1ᵀ dh in the other.
    forward = Work(2 * bytes_per_pass, states * size.rows * (moments + project + square))
    backward = Work(3 * bytes_per_pass, states * size.rows * (2 * (project + square) + 2 * project))
    if phase == FORWARD:
        return forward
    if phase == BACKWARD:
        return backward
    return Work(forward.bytes_moved + backward.bytes_moved, forward.flops + backward.flops)


def compute(function: Callable[..., reference.ProjectedLosses], inputs: Tensors) -> Tensors:
    """Call one implementation on named tensors; returns its results by name."""
    predictions = [x for name, x in inputs.items() if name.startswith("prediction")]
    parameters = (inputs[name] for name in _PARAMETERS)
    return function(inputs["z"], predictions, *parameters, EPS)._asdict()


def compute_fused(inputs: Tensors) -> Tensors:
    """`compute` with the fused op."""
    from fastjepa.kernels.projected_losses import fused

    return compute(fused.projected_losses, inputs)


def make_case(size: Size, note: str = "") -> Case:
    """The benchmark case at one size."""
    return Case(
        suite="projected_losses",
        name=f"{size}{note}",
        make_inputs=partial(make_inputs, size),
        truth=partial(compute, reference.projected_losses),
        work=partial(work, size),
        cotangents=cotangents,
        baseline="eager",
        eager={"fp32": "eager", "bf16": "eager bf16"},
        # BatchNorm takes the mean out again, so this gradient is 0: its terms are those of bn_bias's.
        scale_of={"grad bias1": "grad bn_bias"},
    )


def make_variants(device: torch.device) -> list[Variant]:
    """Eager, the closed form, the fused kernels; and, on a GPU, bf16 and torch.compile of the first two."""
    eager = partial(compute, reference.projected_losses)
    closed = partial(compute, closed_form.projected_losses)
    chosen = [ways.eager(eager), ways.eager(closed, "closed form"), ways.compiled(eager, "torch.compile(default)")]
    if device.type == "cuda":
        best = ways.COMPILE_MAX
        chosen += [
            ways.eager_bf16(eager),
            ways.eager_bf16(closed, "closed form bf16"),
            ways.compiled(eager, "torch.compile(max-autotune)", best),
            ways.compiled(eager, "torch.compile(default) bf16", bf16=True),
            ways.compiled(eager, "torch.compile(max-autotune) bf16", best, bf16=True),
            ways.fused(compute_fused, "fused bf16", bf16=True),
        ]
    return [*chosen, ways.fused(compute_fused)]


def plans(
    batches: Sequence[int], device: torch.device, *, quick: bool, compile: bool
) -> Iterator[tuple[Case, list[Variant]]]:
    """Every batch size; `compile`: with what must be compiled first."""
    variants = [v for v in make_variants(device) if compile or not v.name.startswith("torch.compile")]
    for batch in batches:
        size = Size(batch, frames=3, pixels=32) if quick else Size(batch)
        yield make_case(size, " (quick)" if quick else ""), variants


def main(argv: Sequence[str]) -> int:
    """The command line; returns 1 if a variant failed (running out of memory is a result, not a failure)."""
    parser = suite.make_parser("projected_losses", __doc__ or "")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1 8 64 on a GPU, 2 on a CPU, 1 with --quick")
    args = parser.parse_args(argv)
    options = suite.resolve("projected_losses", parser, args, argv)
    on_cpu = options.device.type == "cpu"
    batches = args.batch or ([1] if options.quick else [2] if on_cpu else [1, 8, 64])
    if min(batches) < 1:
        parser.error(f"--batch must be at least 1, got {min(batches)}")
    # Compiling on a CPU takes most of a minute, too long for a smoke run; --variant names it all the same.
    compile = bool(options.variants) or not (options.quick and on_cpu)
    return suite.run(options, parser, plans(batches, options.device, quick=options.quick, compile=compile))
