"""The one exactness policy of every fused op.

Truth is the eager definition in float64 on the same inputs. With err(x) = max |x − truth| and scale = max |truth|, a
fused result passes if

    err(actual) ≤ 2 · err(eager at the same precision) + floor · scale        and, at fp32 precision,
    err(actual) ≤ 1e-5 · scale.

A NaN or an infinity never passes, unless truth has the same one in the same place.
"""

from __future__ import annotations

import os

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


def relative_floor(result_dtype: torch.dtype, precision: torch.dtype | None = None) -> float:
    """The policy's floor, as a fraction of the largest entry, for a result stored as `result_dtype`.

    `precision`: the dtype of the op's main inputs, by default that of the result.
    """
    sums = torch.finfo(torch.float64 if result_dtype == torch.float64 else torch.float32).eps * _SUM_ROUNDINGS
    if result_dtype in _HALF:
        return sums + torch.finfo(result_dtype).eps * (1.0 if os.environ.get("TRITON_INTERPRET") == "1" else 0.5)
    return sums + torch.finfo(precision).eps * 0.5 if precision in _HALF else sums


def max_error(result: Tensor, truth: Tensor) -> float:
    """max |result − truth| in float64; infinite if they differ in where they are not finite. 0 for empty tensors."""
    if result.numel() == 0:
        return 0.0
    result, truth = result.detach().double().cpu(), truth.detach().double().cpu()
    finite = torch.isfinite(truth)
    if not torch.equal(result[~finite].nan_to_num(nan=12345.0), truth[~finite].nan_to_num(nan=12345.0)):
        return float("inf")
    error = (result - truth)[finite].abs()
    if error.numel() == 0:
        return 0.0
    return float(error.nan_to_num(nan=float("inf")).max())


def _scale(truth: Tensor) -> float:
    finite = truth[torch.isfinite(truth)]
    return float(finite.detach().abs().max()) if finite.numel() else 0.0


def relative_error(result: Tensor, truth: Tensor) -> float:
    """max |result − truth| / max |truth|; 0 where both are 0."""
    error, scale = max_error(result, truth), _scale(truth)
    return 0.0 if error == 0.0 else error / scale if scale else float("inf")


def assert_as_exact_as_eager(
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    name: str,
    *,
    precision: torch.dtype | None = None,
    relative_limit: float | None = FP32_RELATIVE_LIMIT,
    scale: float | None = None,
) -> None:
    """Assert the policy above for one result of a fused op.

    Args:
        actual: the fused result.
        eager: the eager result at the same precision; it must have the same dtype or a narrower one.
        truth: the eager result in float64.
        name: what the failure message calls it.
        precision: the dtype of the op's main inputs, by default the dtype of `actual`. Pass it where an op on bf16
            inputs returns fp32 (a loss): the 1e-5 limit is for fp32 inputs only.
        relative_limit: the limit at fp32 precision. None where eager itself shows that the problem is conditioned
            worse than that; say why beside the call.
        scale: the size of the terms of which the result is a sum, if they cancel (a gradient that is exactly 0).
    """
    assert truth.dtype == torch.float64, f"{name}: truth must be float64, got {truth.dtype}"
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert eager.shape == truth.shape, f"{name}: eager has shape {tuple(eager.shape)}, expected {tuple(truth.shape)}"
    precision = actual.dtype if precision is None else precision
    scale = _scale(truth) if scale is None else scale
    error, eager_error = max_error(actual, truth), max_error(eager, truth)
    bound = 2.0 * eager_error + relative_floor(actual.dtype, precision) * scale
    if relative_limit is not None and precision == torch.float32:
        bound = min(bound, relative_limit * scale)
    assert error <= bound, (
        f"{name}: error {error:.3e} > bound {bound:.3e} (eager's error {eager_error:.3e}, largest entry {scale:.3e})"
    )


def assert_close_to_truth(actual: Tensor, truth: Tensor, name: str, *, limit: float = FP32_RELATIVE_LIMIT) -> None:
    """Assert max |actual − truth| ≤ limit · max |truth|: for results that have no eager counterpart."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    error, scale = max_error(actual, truth), _scale(truth)
    assert error <= limit * scale, f"{name}: error {error:.3e} > {limit:.1e} × largest entry {scale:.3e}"
