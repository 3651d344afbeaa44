"""`python -m bench saved`: what one training step keeps for its backward pass, in bytes, at any size, on any machine.

Shapes are traced with fake tensors (`bench.step_memory`): nothing is computed and nothing of that size is
allocated. To what is kept, gradients in flight come on top: a step's peak. "needed" is what `auto` reckons with.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from bench.step_memory import StepSizes, count_step
from fastjepa.model.losses import ProjectionPath


@dataclass(frozen=True)
class Variant:
    """One way to make a step."""

    name: str
    projection: ProjectionPath
    fused: bool = False
    recompute: bool = False


VARIANTS = (
    Variant("eager", "eager"),
    Variant("closed-form losses", "closed_form"),
    Variant("fused", "fused", fused=True),
    Variant("fused, with recomputation", "fused", fused=True, recompute=True),
)


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench saved", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=64, help="clips (default: 64, the recipe's)")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    print(f"kept for the backward pass by one step, batch {args.batch}:")
    for variant in VARIANTS:
        for precision in ("fp32", "bf16"):
            print(f"  {f'{variant.name}, {precision}':<32} {_counted(variant, args.batch, precision == 'bf16')}")
    return 0


def _counted(variant: Variant, batch: int, bf16: bool) -> str:
    try:
        kept = count_step(
            StepSizes(batch=batch), bf16=bf16, fused=variant.fused, recompute=variant.recompute,
            projection=variant.projection,
        )  # fmt: skip
    except ImportError as error:
        return f"unavailable: kernels need Triton, which cannot be imported here ({error})"
    return f"{kept.total / 1e9:6.2f} GB"
