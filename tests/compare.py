"""Assertions of the one exactness policy, which is written down in `fastjepa.policy`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastjepa.policy import FP32_RELATIVE_LIMIT, error_bound, largest_entry, max_error


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
    """Assert the policy for one result of a fused op.

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
    scale = largest_entry(truth) if scale is None else scale
    error, eager_error = max_error(actual, truth), max_error(eager, truth)
    bound = error_bound(eager_error, scale, actual.dtype, precision, limit=relative_limit)
    assert error <= bound, (
        f"{name}: error {error:.3e} > bound {bound:.3e} (eager's error {eager_error:.3e}, largest entry {scale:.3e})"
    )


def assert_close_to_truth(actual: Tensor, truth: Tensor, name: str, *, limit: float = FP32_RELATIVE_LIMIT) -> None:
    """Assert max |actual − truth| ≤ limit · max |truth|: for results that have no eager counterpart."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    error, scale = max_error(actual, truth), largest_entry(truth)
    assert error <= limit * scale, f"{name}: error {error:.3e} > {limit:.1e} × largest entry {scale:.3e}"


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    """Assert that each tensor differs by at most `relative` of its norm: for whole models, where errors add up."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # The bias in front of a BatchNorm has gradient 0: what is left is rounding of the terms of the bias behind it.
        like = name.replace("net.0.bias", "net.1.bias")
        scale = expected[like].double().norm().item()
        assert (actual[name].double() - value.double()).norm() <= relative * scale, name
