"""Whole steps and networks, judged by norms: the policy's second half, where a ReLU may switch.

Losses and buffers follow their roundings smoothly. A gradient jumps where a rounding takes the input of one ReLU across
zero: in fp32, eager's own is then 1e-3 of its norm from float64, and 1e-6 in another draw of weights and data. So one
draw is no measure of it: a gradient out of bounds gets as many draws as `DRAWS`, is exact if all of it is within bounds
in one, and wrong at once if it is off by more than a few ReLUs can explain.

In bf16 many ReLUs switch in every draw: eager's own gradient of the predictor is 0.2 to 0.5 of its norm from float64,
that of the encoder a tenth, and twice that would let half a gradient pass. So what does not compute in plain fp32 must
be exact in fp32 first, where a wrong formula shows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastjepa.measuring.policy import Error, Judgement, bound_beside, relative_errors, worst

GRADIENT = "gradient of "  # how names of results begin that jump where a ReLU switches
DRAWS = 3
JUMP = 1e-2
_INPUTS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def norm_errors(results: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, Error]:
    """`policy.relative_errors` by norms: a whole step is judged by these."""
    return relative_errors(results, truth, {}, truth, "norm")


def norm_bound(eager: Error, dtype: torch.dtype, precision: str) -> float | None:
    """The largest relative error by norm that the policy lets pass beside eager's, of a result stored as `dtype`; None
    where eager is so far off, or not finite, that nothing can be judged by it.
    """
    return bound_beside(eager, dtype, precision, _INPUTS.get(precision))


def judge_norms(errors: Mapping[str, Error], eager: Mapping[str, Error], precision: str) -> Judgement:
    """The tensor closest to, or furthest beyond, its bound."""
    return worst(
        Judgement(name, error.relative, norm_bound(eager[name], error.dtype, precision))
        for name, error in errors.items()
    )


def may_have_jumped(errors: Mapping[str, Error], eager: Mapping[str, Error], precision: str) -> bool:
    """Whether all that is out of bounds are gradients, by no more than ReLUs explain."""
    for name, error in errors.items():
        bound = norm_bound(eager[name], error.dtype, precision)
        if bound is None:
            return False
        if error.relative > bound and not (name.startswith(GRADIENT) and error.relative <= max(JUMP, 2 * bound)):
            return False
    return True


def largest_errors(known: Mapping[str, Error], found: Mapping[str, Error]) -> dict[str, Error]:
    """Of each tensor the larger error of the two; `known` may lack some."""
    return {name: max(known.get(name, error), error, key=lambda e: e.relative) for name, error in found.items()}
