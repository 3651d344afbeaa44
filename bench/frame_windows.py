"""`python -m bench frame_windows`: the gradient of an unroll's sequences, gathered in one pass.

At the recipe's size: what the losses and the next step hand back for p¹ (B, D, T, H, W) becomes the gradient of the two
encoded states that begin it, and of what the predictor gave. Eager does what autograd makes of slices and
concatenations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.harness import variants as ways
from bench.harness.case import Case, Work
from bench.harness.variants import Tensors, Variant
from bench.recipe import Recipe
from bench.recipe_suite import run_suite
from fastjepa.kernels.frame_windows import reference
from fastjepa.model.context import CONTEXT


def make_inputs(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Tensors:
    """The gradients of the windows and of the sequence, channels-last."""
    generator = torch.Generator(device).manual_seed(2025)
    frames = recipe.frames - CONTEXT + 1

    def gradient(channels: int, frames: int) -> Tensor:
        shape = (recipe.batch, frames, recipe.pixels, recipe.pixels, channels)
        return torch.randn(shape, generator=generator, device=device).to(dtype).permute(0, 4, 1, 2, 3)

    return {
        "windows": gradient(CONTEXT * recipe.dstc, frames),
        "sequence": gradient(recipe.dstc, recipe.frames),
    }


def gather_eager(inputs: Tensors) -> Tensors:
    """{"head", "predicted"} by autograd."""
    sequence = inputs["sequence"]
    head = torch.zeros_like(sequence[:, :, :CONTEXT]).requires_grad_()
    predicted = torch.zeros_like(sequence[:, :, CONTEXT - 1 :]).requires_grad_()
    results = reference.next_windows(head, predicted)
    found = torch.autograd.grad(results, (head, predicted), (inputs["windows"], sequence))
    return dict(zip(("head", "predicted"), found, strict=True))


def gather_fused(inputs: Tensors) -> Tensors:
    """The same by the kernel."""
    from fastjepa.kernels.frame_windows.gather import gather_frames

    windows, sequence = (inputs[name].permute(0, 2, 3, 4, 1).flatten(2, 3) for name in ("windows", "sequence"))
    H, W = inputs["sequence"].shape[-2:]
    found = gather_frames(windows, sequence, None, sequence.shape[1], CONTEXT, True)
    frames = [rows.unflatten(2, (H, W)).permute(0, 4, 1, 2, 3) for rows in found]
    return dict(zip(("head", "predicted"), frames, strict=True))


def work(recipe: Recipe, phase: str, dtype: torch.dtype) -> Work:
    """Windows and sequence are read, head and predicted written."""
    frames = CONTEXT * (recipe.frames - CONTEXT + 1) + 2 * recipe.frames + 1
    elements = recipe.batch * recipe.pixels**2 * recipe.dstc
    return Work(frames * elements * dtype.itemsize, CONTEXT * recipe.frames * elements)


def plans(recipe: Recipe, note: str = "") -> Iterator[tuple[Case, list[Variant]]]:
    """The one case."""
    case = Case(
        suite="frame_windows",
        name=f"gradient of a sequence, {recipe}{note}",
        make_inputs=partial(make_inputs, recipe),
        truth=gather_eager,
        work=partial(work, recipe),
        baseline="eager",
        eager={"fp32": "eager", "bf16": "eager bf16"},
    )
    kernels = [ways.fused(gather_fused), ways.fused(gather_fused, "fused bf16", bf16=True)]
    yield case, [ways.eager(gather_eager), ways.eager_bf16(gather_eager), *kernels]


def main(argv: Sequence[str]) -> int:
    """The command line; not 0 if a variant failed."""
    return run_suite("frame_windows", __doc__ or "", argv, plans)
