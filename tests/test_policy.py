"""The exactness policy itself: errors, bounds, and the judgement of results of several tensors."""

from __future__ import annotations

import math

import pytest
import torch

from compare import assert_as_exact_as_eager
from fastjepa.policy import (
    FP32_RELATIVE_LIMIT,
    Error,
    error_bound,
    judge,
    largest_entry,
    max_error,
    relative_error,
    relative_errors,
    relative_floor,
)

NAN, INF = math.nan, math.inf


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("result", "truth", "error"),
    [
        ((1.0, 2.0), (1.0, 2.5), 0.5),
        ((NAN, 2.0), (1.0, 2.0), INF),
        ((1.0, INF), (1.0, 2.0), INF),
        ((NAN, 2.0), (NAN, 2.5), 0.5),
        ((INF, -INF), (INF, -INF), 0.0),
        ((INF, 1.0), (-INF, 1.0), INF),
        ((1.0, 1.0), (NAN, 1.0), INF),
        ((), (), 0.0),
    ],
)
def test_what_is_not_finite_passes_only_where_truth_is_the_same(
    result: tuple[float, ...], truth: tuple[float, ...], error: float
) -> None:
    assert max_error(double(*result).float(), double(*truth)) == error


def test_scale_is_the_largest_finite_entry() -> None:
    assert largest_entry(double(-3.0, 2.0)) == 3.0
    assert largest_entry(double(-3.0, INF, NAN)) == 3.0
    assert largest_entry(double(NAN)) == largest_entry(double()) == 0.0


def test_bound_is_twice_eagers_error_and_the_floor_with_a_limit_at_fp32() -> None:
    single, half = torch.float32, torch.bfloat16
    assert error_bound(1e-6, 10.0, single) == 2e-6 + 10.0 * relative_floor(single)
    assert error_bound(1e-3, 10.0, single) == 10.0 * FP32_RELATIVE_LIMIT
    assert error_bound(1e-3, 10.0, single, limit=None) == 2e-3 + 10.0 * relative_floor(single)
    assert error_bound(1e-3, 10.0, half) == 2e-3 + 10.0 * relative_floor(half)
    assert error_bound(1e-3, 1.0, single, half) == 2e-3 + relative_floor(single, half)


@pytest.mark.parametrize(
    ("result", "precision", "floor"),
    [
        # 6 eps of the precision of sums; and half an eps of a half precision.
        (torch.float64, None, 6 * 2.0**-52),
        (torch.float32, None, 6 * 2.0**-23),
        (torch.float32, torch.bfloat16, 6 * 2.0**-23 + 2.0**-8),
        (torch.bfloat16, None, 6 * 2.0**-23 + 2.0**-8),
        (torch.float16, None, 6 * 2.0**-23 + 2.0**-11),
    ],
)
def test_floors_are_those_of_the_derivation(result: torch.dtype, precision: torch.dtype | None, floor: float) -> None:
    assert relative_floor(result, precision) == pytest.approx(floor, rel=1e-12)
    assert error_bound(0.0, 1.0, result, precision, limit=None) == pytest.approx(floor)


def test_an_assertion_fails_beyond_the_bound_and_not_within() -> None:
    truth = double(1.0, 2.0)
    assert_as_exact_as_eager(truth.float() + 1e-5, truth.float() + 1e-5, truth, "x")
    with pytest.raises(AssertionError, match=r"x: error 3\..*e-05 > bound"):
        assert_as_exact_as_eager(truth.float() + 3e-5, truth.float() + 1e-3, truth, "x")


def test_judge_takes_the_tensor_furthest_beyond_its_bound() -> None:
    half, single = torch.bfloat16, torch.float32
    eager_errors = {"loss": Error(1e-7, single), "grad": Error(1e-2, half)}
    verdict = judge({"loss": Error(9e-6, single), "grad": Error(1e-2, half)}, eager_errors, "bf16")
    assert (verdict.result, verdict.exact) == ("loss", False)
    assert judge({"grad": Error(1.9e-2, half)}, eager_errors, "bf16").exact
    assert not judge({"grad": Error(3.5e-2, half)}, eager_errors, "bf16").exact


def test_fp32_has_the_limit_of_the_contract_unless_eager_is_worse() -> None:
    single = torch.float32
    good, bad = {"y": Error(8e-6, single)}, {"y": Error(2e-5, single)}
    assert judge({"y": Error(9.9e-6, single)}, good, "fp32").exact
    assert not judge({"y": Error(1.1e-5, single)}, good, "fp32").exact  # though within twice eager's error
    assert judge({"y": Error(3.9e-5, single)}, bad, "fp32").exact
    assert judge({"y": Error(9.9e-6, single)}, None, "fp32").bound == pytest.approx(1e-5)


def test_error_of_a_result_that_is_zero_in_theory_is_relative_to_its_terms() -> None:
    truth = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.full((2,), 10.0, dtype=torch.float64)}
    results = {"a": torch.tensor([0.0, 1e-6]), "b": truth["b"].float()}
    assert relative_errors(results, truth, {}, truth)["a"].relative == math.inf
    assert relative_errors(results, truth, {"a": "b"}, truth)["a"].relative == pytest.approx(1e-7)


def test_error_by_norm_is_not_that_of_one_entry() -> None:
    truth, result = double(3.0, 4.0, 0.0), double(3.0, 4.0, 0.5)
    assert relative_error(result, truth) == pytest.approx(0.125)
    assert relative_error(result, truth, measure="norm") == pytest.approx(0.1)
    assert relative_errors({"y": result}, {"y": truth}, {}, {"y": truth}, "norm")["y"].relative == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("result", "truth", "error"),
    [((NAN, 2.0), (1.0, 2.0), INF), ((INF, 2.0), (INF, 2.0), 0.0), ((1.0, INF), (1.0, 2.0), INF), ((), (), 0.0)],
)
def test_by_norm_too_what_is_not_finite_passes_only_where_truth_is_the_same(
    result: tuple[float, ...], truth: tuple[float, ...], error: float
) -> None:
    assert relative_error(double(*result), double(*truth), measure="norm") == error
