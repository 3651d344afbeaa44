"""Is a result exact enough for its time to mean anything? The rule of tests/compare.py, applied to whole results.

Errors are max |result − truth| / scale, scale = max |truth|, truth in float64; computed where the tensors are, because
they are large. A result passes if its error is at most twice that of eager at the same precision plus the floor, and,
at fp32 precision, at most 1e-5 unless eager's own error exceeds that.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from bench.harness.environment import ROOT


def _shared_policy() -> ModuleType:
    """tests/compare.py, by its path: an installed package called "tests" must not get in its way."""
    spec = importlib.util.spec_from_file_location("fastjepa_exactness_policy", ROOT / "tests" / "compare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_policy = _shared_policy()


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
    Raises ValueError if a result is missing or has another shape. NaN and infinities are infinite errors.
    """
    errors = {}
    for name, exact in expected.items():
        if name not in results or results[name].shape != exact.shape:
            got = tuple(results[name].shape) if name in results else "nothing"
            raise ValueError(f"result {name!r}: expected shape {tuple(exact.shape)}, got {got}")
        if exact.numel() == 0:
            continue
        scale = float(truth[scale_of.get(name, name)].abs().max())
        error = float((results[name].detach().double() - exact).abs_().max())
        relative = 0.0 if error == 0 else error / scale if scale else math.inf
        errors[name] = Error(relative if math.isfinite(relative) else math.inf, results[name].dtype)
    return errors


def judge(errors: Mapping[str, Error], eager: Mapping[str, Error] | None, precision: str) -> Judgement:
    """Judge one variant's errors by those of eager at its precision ("fp32", "bf16", ...), or None if it did not run.

    Without eager, or where eager gives NaN, fp32 is judged by 1e-5 alone, and other precisions cannot be judged.
    """
    judgements = [
        Judgement(name, error.relative, _bound(error, None if eager is None else eager[name], precision))
        for name, error in errors.items()
    ]
    return max(judgements, key=lambda j: j.error / j.bound if j.bound else math.inf if j.error else 0.0)


def _bound(error: Error, eager: Error | None, precision: str) -> float | None:
    limit: float = _policy.FP32_RELATIVE_LIMIT
    if eager is None or not math.isfinite(eager.relative):
        return limit if precision == "fp32" else None
    bound: float = 2 * eager.relative + _policy.relative_floor(error.dtype)
    return min(bound, limit) if precision == "fp32" and eager.relative <= limit else bound
