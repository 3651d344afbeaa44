"""One gate for all tests: without a CUDA device every Triton kernel runs in Triton's CPU interpreter.

`TRITON_INTERPRET` is read when a kernel is decorated, so it is set here, before any test module imports one. A value
that is already set is kept: TRITON_INTERPRET=1 on a GPU machine tests the interpreter, TRITON_INTERPRET=0 the compiler.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
INTERPRETING = os.environ["TRITON_INTERPRET"] == "1"


def _no_gpu_reason() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device, and there is none"
    if INTERPRETING:
        return "needs compiled kernels, and TRITON_INTERPRET=1 is set"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _no_gpu_reason()
    if reason is None:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> str:
    """Where kernels run in this session: "cuda", or "cpu" in the interpreter."""
    return "cuda" if _no_gpu_reason() is None else "cpu"


@pytest.fixture
def nan_filled_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised floating memory holds NaN, so an output or a partial that a kernel does not write cannot hide."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return allocate_poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
