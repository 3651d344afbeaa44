"""`python -m bench moments`: the two passes over rows that the projected losses are made of, each apart.

At the recipe's size, N = B·T·H·W rows of D = 16 channels: their mean and scatter, and the linear map of x − μ that
takes BatchNorm's correction off a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from bench.harness import variants as ways
from bench.harness.case import Case, Work
from bench.harness.variants import Tensors, Variant
from bench.recipe import Recipe
from bench.recipe_suite import run_suite
from fastjepa.kernels.moments import reference


def make_inputs(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Rows x ≥ 0 and sparse, as an encoder makes them; a base of their shape; mean, constant and linear in float64."""
    generator = torch.Generator(device).manual_seed(2025)
    shape, d = (recipe.rows, recipe.dstc), recipe.dstc

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device)

    inputs = {"x": randn(*shape).relu_().to(dtype), "base": randn(*shape).to(dtype)}
    small = {"mean": 0.4 + 0.1 * randn(d), "constant": 0.1 * randn(d), "linear": randn(d, d) / d**0.5}
    return inputs | {name: x.double() for name, x in small.items()}


def moments_eager(inputs: Tensors) -> Tensors:
    """{"mean", "scatter"} by the definition."""
    mean, scatter = reference.moments([inputs["x"]])
    return {"mean": mean, "scatter": scatter}


def moments_fused(inputs: Tensors) -> Tensors:
    """The same by the kernel, rounded to fp32."""
    from fastjepa.kernels.moments import fused

    mean, scatter = fused.moments([inputs["x"]])
    return {"mean": mean.float(), "scatter": scatter.float()}


def linear_eager(inputs: Tensors) -> Tensors:
    """{"out"} = base − constant − linear·(x − mean) by the definition."""
    x, mean, constant, linear, base = (inputs[name] for name in ("x", "mean", "constant", "linear", "base"))
    return {"out": reference.subtract_centred_linear(x, mean, constant, linear, base)}


def linear_fused(inputs: Tensors) -> Tensors:
    """The same by the kernel."""
    from fastjepa.kernels.moments import fused

    x = inputs["x"]
    mean, constant, linear = (inputs[name].unsqueeze(0) for name in ("mean", "constant", "linear"))
    operands = fused.linear_operands(mean, constant, linear, x.dtype)
    return {"out": fused.subtract_centred_linear(x, operands, 0, inputs["base"], torch.empty_like(x))}


def work(recipe: Recipe, tensors: int, phase: str, dtype: torch.dtype) -> Work:
    """`tensors` of N rows are read or written once, and every row takes one product with a (D, D) matrix."""
    n, d = recipe.rows, recipe.dstc
    return Work(tensors * n * d * dtype.itemsize, 2 * n * d * d)


def plans(recipe: Recipe, note: str = "") -> Iterator[tuple[Case, list[Variant]]]:
    """The mean and scatter, then the linear map."""
    for name, tensors, eager, fused in (
        ("mean and scatter", 1, moments_eager, moments_fused),
        ("linear map", 3, linear_eager, linear_fused),
    ):
        case = Case(
            suite="moments",
            name=f"{name} N={recipe.rows} D={recipe.dstc}{note}",
            make_inputs=partial(make_inputs, recipe),
            truth=eager,
            work=partial(work, recipe, tensors),
            baseline="eager",
            eager={"fp32": "eager", "bf16": "eager bf16"},
        )
        compiled = ways.gpu_only(ways.compiled(eager, "torch.compile(max-autotune) bf16", ways.COMPILE_MAX, bf16=True))
        kernels = [ways.fused(fused), ways.fused(fused, "fused bf16", bf16=True)]
        yield case, [ways.eager(eager), ways.eager_bf16(eager), compiled, *kernels]


def main(argv: Sequence[str]) -> int:
    """The command line; not 0 if a variant failed."""
    return run_suite("moments", __doc__ or "", argv, plans)
