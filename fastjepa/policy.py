"""The one exactness policy: is a result exact enough for anything else about it to matter?

Truth is the eager definition in float64 on the same inputs. With err(x) = max |x − truth| and scale = max |truth|, a
result passes if

    err(result) ≤ 2 · err(eager at the same precision) + floor · scale        and, at fp32 precision,
    err(result) ≤ 1e-5 · scale.

A NaN or an infinity never passes, unless truth has the same one in the same place. Tensors may be large, so errors are
computed on the device of the result.

What goes through many layers (a whole training step, a network) is judged by norms instead: err(x) = ‖x − truth‖₂ and
scale = ‖truth‖₂. A rounding may move an activation across ReLU's zero, which changes single entries of a gradient by
far more than a rounding; the worst entry then says which activations happened to lie near zero, and two runs of eager
with another order of sums differ in it as much.

Losses and buffers follow their roundings smoothly; a gradient jumps where a rounding takes the input of one ReLU across
zero: in fp32, eager's own is then 1e-3 of its norm from float64, and 1e-6 in another draw of weights and data. So a
gradient out of bounds gets as many draws as `DRAWS`, is exact if all of it is within bounds in one, and wrong at once
if it is off by more than a few ReLUs can explain. In bf16 many ReLUs switch in every draw, and twice eager's error
would let half a gradient pass: what does not compute in plain fp32 must be exact in fp32 first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FP32_RELATIVE_LIMIT = 1e-5

ErrorMeasure = Literal["largest entry", "norm"]

# The floor lets a result pass where eager happens to be exact (one rounding error may be 0 by luck). It has two terms.
# (1) Sums: blocked sums of up to 2^22 terms, as both sides make them, go through at most ~32 levels; each level rounds
#     by at most u = eps/2, the roundings are independent, so they add up to about sqrt(32)·u < 6 u; twice that for the
#     two sums (a value and its mean) that every result here contains: 12 u = 6 eps of the precision in which sums are
#     kept, which is fp32 for fp32, bf16 and fp16 alike (float64 for float64).
# (2) Half precision: one rounding to that dtype, u: of the result if it is stored so, and otherwise, where an op on
#     bf16 inputs returns an fp32 scalar, of the operands that the scalar depends on most. Eager's error in such a
#     scalar is one draw from a distribution of that width, and may be far below it.
_SUM_ROUNDINGS = 6.0
_HALF = (torch.bfloat16, torch.float16)


def relative_floor(result_dtype: torch.dtype, precision: torch.dtype | None = None) -> float:
    """The policy's floor, as a fraction of the largest entry, for a result stored as `result_dtype`.

    `precision`: the dtype of the op's main inputs, by default that of the result.
    """
    sums = torch.finfo(torch.float64 if result_dtype == torch.float64 else torch.float32).eps * _SUM_ROUNDINGS
    if result_dtype in _HALF:
        return sums + torch.finfo(result_dtype).eps * 0.5
    return sums + torch.finfo(precision).eps * 0.5 if precision in _HALF else sums


def error_bound(
    eager_error: float,
    scale: float,
    result_dtype: torch.dtype,
    precision: torch.dtype | None = None,
    *,
    limit: float | None = FP32_RELATIVE_LIMIT,
) -> float:
    """The largest error that the policy lets pass, in the unit of `eager_error` and `scale`.

    `precision`: as in `relative_floor`; `limit` applies where precision is fp32, None leaves it out.
    """
    precision = result_dtype if precision is None else precision
    bound = 2.0 * eager_error + relative_floor(result_dtype, precision) * scale
    return min(bound, limit * scale) if limit is not None and precision == torch.float32 else bound


def max_error(result: Tensor, truth: Tensor) -> float:
    """max |result − truth| in float64; infinite if they differ in where they are not finite. 0 for empty tensors."""
    return _size(_difference(result, truth), "largest entry")


def largest_entry(truth: Tensor) -> float:
    """max |truth| over its finite entries, the scale of the policy; 0 if there is none."""
    return _size(_finite(truth), "largest entry")


def relative_error(
    result: Tensor, truth: Tensor, scale: float | None = None, measure: ErrorMeasure = "largest entry"
) -> float:
    """|result − truth| / scale, by default |truth|, both the largest entry or the norm; 0 where they are equal."""
    error = _size(_difference(result, truth), measure)
    scale = _size(_finite(truth), measure) if scale is None else scale
    return 0.0 if error == 0.0 else error / scale if scale else math.inf


def _difference(result: Tensor, truth: Tensor) -> Tensor | None:
    """result − truth in float64 where truth is finite; None if they differ elsewhere."""
    result, truth = result.detach().double(), truth.detach().to(result.device, torch.float64)
    finite = torch.isfinite(truth)
    if finite.all():
        return result - truth
    if not torch.equal(result[~finite].nan_to_num(nan=12345.0), truth[~finite].nan_to_num(nan=12345.0)):
        return None
    return result[finite] - truth[finite]


def _finite(truth: Tensor) -> Tensor:
    truth = truth.detach()
    finite = torch.isfinite(truth)
    return truth if finite.all() else truth[finite]


def _size(x: Tensor | None, measure: ErrorMeasure) -> float:
    """The largest absolute entry, or the norm; infinite for None or NaN, 0 if there is no entry."""
    if x is None:
        return math.inf
    if x.numel() == 0:
        return 0.0
    size = float(x.abs().max() if measure == "largest entry" else torch.linalg.vector_norm(x.double()))
    return math.inf if math.isnan(size) else size


# ---- results of several tensors, judged together ---------------------------------------------------------------------


@dataclass(frozen=True)
class Error:
    """The error of one tensor, relative to its scale, and the dtype in which it was stored."""

    relative: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Judgement:
    """The tensor closest to (or furthest beyond) its bound. `bound` is None if there is nothing to judge it by."""

    name: str
    error: float
    bound: float | None

    @property
    def exact(self) -> bool:
        """Whether the error is within the bound."""
        return self.bound is not None and self.error <= self.bound


def relative_errors(
    results: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    scale_of: Mapping[str, str],
    truth: Mapping[str, Tensor],
    measure: ErrorMeasure = "largest entry",
) -> dict[str, Error]:
    """The error of every tensor of `expected`, which is float64, by its largest entry or by its norm.

    `scale_of` names, for one whose terms cancel, the tensor of `truth` whose scale to use in place of its own.
    Raises ValueError if a result is missing or has another shape. NaN and infinities are infinite errors, unless
    expected.
    """
    errors = {}
    for name, exact in expected.items():
        if name not in results or results[name].shape != exact.shape:
            got = tuple(results[name].shape) if name in results else "nothing"
            raise ValueError(f"result {name!r}: expected shape {tuple(exact.shape)}, got {got}")
        if exact.numel() == 0:
            continue
        scale = _size(_finite(truth[scale_of.get(name, name)]), measure)
        errors[name] = Error(relative_error(results[name], exact, scale, measure), results[name].dtype)
    return errors


def judge(errors: Mapping[str, Error], eager: Mapping[str, Error] | None, precision: str) -> Judgement:
    """Judge one variant's errors by those of eager at its precision ("fp32", "bf16", ...), or None if it did not run.

    Without eager, or where eager gives NaN, fp32 is judged by 1e-5 alone, and other precisions cannot be judged. Where
    eager itself exceeds 1e-5, that limit does not apply: the problem is conditioned worse. Where eager is so far off
    that its bound would let zeros pass, nothing can be judged by it.
    """
    judgements = [
        Judgement(name, error.relative, bound_beside(None if eager is None else eager[name], error.dtype, precision))
        for name, error in errors.items()
    ]
    return worst(judgements)


def worst(judgements: Iterable[Judgement]) -> Judgement:
    """The one closest to, or furthest beyond, its bound. What cannot be judged comes after what breaks its bound."""
    return max(judgements, key=_badness)


def _badness(judgement: Judgement) -> float:
    """How far beyond its bound: more than 1 breaks it."""
    if judgement.bound is None:
        return math.nextafter(1.0, 2.0)
    return judgement.error / judgement.bound if judgement.bound else math.inf if judgement.error else 0.0


def bound_beside(
    eager: Error | None, dtype: torch.dtype, precision: str, inputs: torch.dtype | None = None
) -> float | None:
    """The largest relative error that passes beside eager's, of a result stored as `dtype`; None: it cannot be judged.

    `precision` as in `judge`; `inputs`: the dtype of the main inputs, by default that of the result.
    """
    if eager is None or not math.isfinite(eager.relative):
        return FP32_RELATIVE_LIMIT if precision == "fp32" else None
    bound = error_bound(eager.relative, 1.0, dtype, inputs, limit=None)
    if bound >= 1.0:
        return None
    return min(bound, FP32_RELATIVE_LIMIT) if precision == "fp32" and eager.relative <= FP32_RELATIVE_LIMIT else bound


# ---- whole steps and networks, by norms ------------------------------------------------------------------------------

GRADIENT = "gradient of "  # how names of results begin that jump where a ReLU switches
DRAWS = 3
JUMP = 1e-2
_INPUTS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def norm_errors(results: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, Error]:
    """`relative_errors` by norms: a whole step is judged by these."""
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


# ---- what a failed allocation says -----------------------------------------------------------------------------------

_WORDS = (
    "out of memory",
    "can't allocate memory",
    "alloc_failed",
    "alloc failed",
    # cuDNN found no memory for the workspace of any algorithm, and torch says only that none worked.
    "unable to find an engine",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU, however the library at fault spells it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
