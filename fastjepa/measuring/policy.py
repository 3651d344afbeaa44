"""The one exactness policy: is a result exact enough for anything else about it to matter?

Truth is the eager definition in float64 on the same inputs. With err(x) = max |x − truth| and scale = max |truth|, a
result passes if

    err(result) ≤ 2 · err(eager at the same precision) + floor · scale        and, at fp32 precision,
    err(result) ≤ 1e-5 · scale.

A NaN or an infinity never passes, unless truth has the same one in the same place. Tensors may be large, so errors are
computed on the device of the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FP32_RELATIVE_LIMIT = 1e-5

# The floor lets a result pass where eager happens to be exact (one rounding error may be 0 by luck). It has two terms.
# (1) Sums: blocked sums of up to 2^22 terms, as both sides make them, go through at most ~32 levels; each level rounds
#     by at most u = eps/2, the roundings are independent, so they add up to about sqrt(32)·u < 6 u; twice that for the
#     two sums (a value and its mean) that every result here contains: 12 u = 6 eps of the precision in which sums are
#     kept, which is fp32 for fp32, bf16 and fp16 alike (float64 for float64).
# (2) Half precision: one rounding to that dtype, u: of the result if it is stored so (the interpreter truncates there:
#     2 u), and otherwise, where an op on bf16 inputs returns an fp32 scalar, of the operands that the scalar depends on
#     most. Eager's error in such a scalar is one draw from a distribution of that width, and may be far below it.
_SUM_ROUNDINGS = 6.0
_HALF = (torch.bfloat16, torch.float16)


def relative_floor(
    result_dtype: torch.dtype, precision: torch.dtype | None = None, *, interpreted: bool = False
) -> float:
    """The policy's floor, as a fraction of the largest entry, for a result stored as `result_dtype`.

    `precision`: the dtype of the op's main inputs, by default that of the result. `interpreted`: Triton's interpreter
    stored it, which truncates.
    """
    sums = torch.finfo(torch.float64 if result_dtype == torch.float64 else torch.float32).eps * _SUM_ROUNDINGS
    if result_dtype in _HALF:
        return sums + torch.finfo(result_dtype).eps * (1.0 if interpreted else 0.5)
    return sums + torch.finfo(precision).eps * 0.5 if precision in _HALF else sums


def error_bound(
    eager_error: float,
    scale: float,
    result_dtype: torch.dtype,
    precision: torch.dtype | None = None,
    *,
    limit: float | None = FP32_RELATIVE_LIMIT,
    interpreted: bool = False,
) -> float:
    """The largest error that the policy lets pass, in the unit of `eager_error` and `scale`.

    `precision`, `interpreted`: as in `relative_floor`; `limit` applies where precision is fp32, None leaves it out.
    """
    precision = result_dtype if precision is None else precision
    bound = 2.0 * eager_error + relative_floor(result_dtype, precision, interpreted=interpreted) * scale
    return min(bound, limit * scale) if limit is not None and precision == torch.float32 else bound


def max_error(result: Tensor, truth: Tensor) -> float:
    """max |result − truth| in float64; infinite if they differ in where they are not finite. 0 for empty tensors."""
    if result.numel() == 0:
        return 0.0
    result, truth = result.detach().double(), truth.detach().to(result.device, torch.float64)
    finite = torch.isfinite(truth)
    if not finite.all():
        if not torch.equal(result[~finite].nan_to_num(nan=12345.0), truth[~finite].nan_to_num(nan=12345.0)):
            return math.inf
        result, truth = result[finite], truth[finite]
        if result.numel() == 0:
            return 0.0
    error = float((result - truth).abs_().max())
    return math.inf if math.isnan(error) else error


def largest_entry(truth: Tensor) -> float:
    """max |truth| over its finite entries, the scale of the policy; 0 if there is none."""
    truth = truth.detach()
    finite = torch.isfinite(truth)
    found = truth.abs() if finite.all() else truth[finite].abs()
    return float(found.max()) if found.numel() else 0.0


def relative_error(result: Tensor, truth: Tensor, scale: float | None = None) -> float:
    """max |result − truth| / scale, by default the largest entry of truth; 0 where result and truth are equal."""
    error = max_error(result, truth)
    scale = largest_entry(truth) if scale is None else scale
    return 0.0 if error == 0.0 else error / scale if scale else math.inf


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
) -> dict[str, Error]:
    """The error of every tensor of `expected`, which is float64.

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
        scale = largest_entry(truth[scale_of.get(name, name)])
        errors[name] = Error(relative_error(results[name], exact, scale), results[name].dtype)
    return errors


def judge(errors: Mapping[str, Error], eager: Mapping[str, Error] | None, precision: str) -> Judgement:
    """Judge one variant's errors by those of eager at its precision ("fp32", "bf16", ...), or None if it did not run.

    Without eager, or where eager gives NaN, fp32 is judged by 1e-5 alone, and other precisions cannot be judged. Where
    eager itself exceeds 1e-5, that limit does not apply: the problem is conditioned worse.
    """
    judgements = [
        Judgement(name, error.relative, _bound(error, None if eager is None else eager[name], precision))
        for name, error in errors.items()
    ]
    return max(judgements, key=lambda j: j.error / j.bound if j.bound else math.inf if j.error else 0.0)


def _bound(error: Error, eager: Error | None, precision: str) -> float | None:
    if eager is None or not math.isfinite(eager.relative):
        return FP32_RELATIVE_LIMIT if precision == "fp32" else None
    bound = error_bound(eager.relative, 1.0, error.dtype, limit=None)
    return min(bound, FP32_RELATIVE_LIMIT) if precision == "fp32" and eager.relative <= FP32_RELATIVE_LIMIT else bound
