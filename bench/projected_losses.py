"""`python -m bench projected_losses`: the projected losses of a training step, at the default recipe's size.

B clips of T = 10 frames of 64×64 pixels, states of D = 16 channels, projector 16-64-64, K = 4 predictions: at B = 64
the projector sees N = 2,621,440 rows for every tensor. Backward starts from the gradient that the default recipe
gives each loss: 10·std_loss + 100·cov_loss + mean(prediction_losses).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.harness import suite
from bench.harness import variants as ways
from bench.harness.case import Case
from bench.harness.variants import Tensors, Variant
from bench.recipe import COV_COEFF, HIDDEN, OUT, STD_COEFF, Recipe, losses_work
from fastjepa.kernels.projected_losses import closed_form, reference

EPS = 1e-5
_PARAMETERS = ("weight1", "bias1", "bn_weight", "bn_bias", "weight2")


def make_inputs(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Tensors:
    """A state as an encoder makes it (≥ 0, sparse, smooth in time), predictions near it, and a projector.

    The parameters stay fp32, as in mixed-precision training. Drawn on the CPU, so every device gets the same values.
    """
    generator = torch.Generator().manual_seed(2025)
    shape = (recipe.batch, recipe.dstc, recipe.frames, recipe.pixels, recipe.pixels)
    z = torch.randn(shape, generator=generator).relu_()
    inputs = {"z": z}
    for step in range(1, recipe.steps + 1):
        inputs[f"prediction{step}"] = z + 0.1 * step * torch.randn(shape, generator=generator)
    inputs = {name: x.to(device, dtype) for name, x in inputs.items()}

    def uniform(*dims: int) -> Tensor:
        return (2 * torch.rand(dims, generator=generator) - 1) / dims[-1] ** 0.5

    parameters = {
        "weight1": uniform(HIDDEN, recipe.dstc),
        "bias1": uniform(HIDDEN),
        "bn_weight": 1 + uniform(HIDDEN),
        "bn_bias": uniform(HIDDEN),
        "weight2": uniform(OUT, HIDDEN),
    }
    inputs |= {name: x.to(device) for name, x in parameters.items()}
    return {name: x.requires_grad_() for name, x in inputs.items()}


def cotangents(outputs: Tensors) -> Tensors:
    """The gradient of the recipe's total with respect to each of its terms."""
    return {"losses": torch.ones_like(outputs["losses"])}


def compute(function: Callable[..., reference.ProjectedLosses], inputs: Tensors) -> Tensors:
    """Call one implementation on named tensors; its losses as the terms of the recipe's total, and the statistics.

    The terms are one tensor, so their errors are relative to the largest: of a single number, eager's error is one draw
    that may be 0 by luck, and no measure for others.
    """
    predictions = [x for name, x in inputs.items() if name.startswith("prediction")]
    parameters = (inputs[name] for name in _PARAMETERS)
    found = function(inputs["z"], predictions, *parameters, EPS)
    first = torch.stack((STD_COEFF * found.std_loss, COV_COEFF * found.cov_loss))
    terms = torch.cat((first, found.prediction_losses / len(predictions)))
    return {"losses": terms, "batch_means": found.batch_means, "batch_vars": found.batch_vars}


def compute_fused(inputs: Tensors) -> Tensors:
    """`compute` with the fused op."""
    from fastjepa.kernels.projected_losses import fused

    return compute(fused.projected_losses, inputs)


def make_case(recipe: Recipe, note: str = "") -> Case:
    """The benchmark case at the sizes of a recipe."""
    return Case(
        suite="projected_losses",
        name=f"{recipe}{note}",
        make_inputs=partial(make_inputs, recipe),
        truth=partial(compute, reference.projected_losses),
        work=partial(losses_work, recipe),
        cotangents=cotangents,
        baseline="eager",
        eager={"fp32": "eager", "bf16": "eager bf16"},
        # BatchNorm takes the mean out again, so this gradient is 0: its terms are those of bn_bias's.
        scale_of={"grad bias1": "grad bn_bias"},
    )


def make_variants() -> list[Variant]:
    """Eager, the kernels, the closed form, and torch.compile of eager and of the closed form's maths; bf16 on a GPU."""
    eager = partial(compute, reference.projected_losses)
    closed = partial(compute, closed_form.projected_losses)
    given = "the losses in closed form, channels-last, one FX graph"
    return [
        ways.eager(eager),
        ways.gpu_only(ways.eager_bf16(eager)),
        ways.fused(compute_fused),
        ways.fused(compute_fused, "fused bf16", bf16=True),
        ways.eager(closed, "closed form"),
        ways.gpu_only(ways.eager_bf16(closed, "closed form bf16")),
        ways.compiled(eager, "torch.compile(default)"),
        ways.compiled(eager, "torch.compile(max-autotune)", ways.COMPILE_MAX),
        ways.gpu_only(ways.compiled(eager, "torch.compile(default) bf16", bf16=True)),
        ways.compiled(eager, "torch.compile(max-autotune) bf16", ways.COMPILE_MAX, bf16=True),
        replace(
            ways.compiled(closed, "torch.compile(max-autotune) bf16, closed form", ways.COMPILE_MAX, bf16=True),
            given=given,
        ),
    ]


def plans(batches: Sequence[int], *, quick: bool, compile: bool) -> Iterator[tuple[Case, list[Variant]]]:
    """Every batch size; `compile`: with what must be compiled first."""
    variants = [v for v in make_variants() if compile or not v.name.startswith("torch.compile")]
    for batch in batches:
        recipe = Recipe(batch, frames=3, pixels=32) if quick else Recipe(batch)
        yield make_case(recipe, " (quick)" if quick else ""), variants


def main(argv: Sequence[str]) -> int:
    """The command line; not 0 if a variant failed (running out of memory is a result, not a failure)."""
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
    return suite.run(options, parser, plans(batches, quick=options.quick, compile=compile))
