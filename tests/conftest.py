"""One gate for all tests: without a CUDA device every Triton kernel runs in Triton's CPU interpreter.

`TRITON_INTERPRET` is read when a kernel is decorated, so it is set here, before any test module imports one. A value
that is already set is kept: TRITON_INTERPRET=1 on a GPU machine tests the interpreter, TRITON_INTERPRET=0 the compiler.

Where Triton is not installed, tests of the plain path run, and those of kernels are skipped with that reason: a test
that takes the fixture `device` or `needs_triton`, and a whole module that imports kernels. In the same way a test that
comes upon another package that is not installed is skipped, and the reason names it: torch, Triton, numpy and pytest
are enough to run what is marked gpu.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastjepa.optional_packages import MissingPackageError, missing_packages

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
INTERPRETING = os.environ["TRITON_INTERPRET"] == "1"
NO_TRITON = None if importlib.util.find_spec("triton") else "needs Triton, which is not installed"
# Looked for here, before a test can pretend. Where all are installed, nothing is skipped for the lack of one.
_OPTIONAL = "PIL cv2 hypothesis matplotlib nvtx safetensors scipy sklearn tensorboard torchmetrics tqdm tyro"
NOT_INSTALLED = [name for name in _OPTIONAL.split() if missing_packages(name)]


def _no_gpu_reason() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device, and there is none"
    if INTERPRETING:
        return "needs compiled kernels, and TRITON_INTERPRET=1 is set"
    return NO_TRITON


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if NO_TRITON and report.failed and "import triton" in str(report.longrepr):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {NO_TRITON}")
    elif NOT_INSTALLED and report.failed and (found := _MISSING_IMPORT.search(str(report.longrepr))):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {found.group().strip()}")
    return report


_MISSING_IMPORT = re.compile(
    rf"ModuleNotFoundError: (No module named '|import of )({'|'.join(NOT_INSTALLED)})\b.*|MissingPackageError: .*"
)


@contextmanager
def _skipped_for_lack_of_a_package() -> Iterator[None]:
    """Skips the test that ends with such an error, or with one that was raised because of it."""
    try:
        yield
    except BaseException as error:
        cause: BaseException | None = error
        while NOT_INSTALLED and cause is not None:
            name = (cause.name or "").partition(".")[0] if isinstance(cause, ModuleNotFoundError) else ""
            if isinstance(cause, MissingPackageError) or name in NOT_INSTALLED:
                pytest.skip(str(cause))
            cause = cause.__cause__ or cause.__context__
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, object, object]:
    with _skipped_for_lack_of_a_package():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    with _skipped_for_lack_of_a_package():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _no_gpu_reason()
    for item in items:
        if reason is not None and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
        named = [name for marker in item.iter_markers("packages") for name in marker.args if name in NOT_INSTALLED]
        if named:
            item.add_marker(pytest.mark.skip(reason=f"needs what is not installed: {', '.join(named)}"))


@pytest.fixture
def needs_triton() -> None:
    """Skips the test where Triton is not installed."""
    if NO_TRITON:
        pytest.skip(NO_TRITON)


@pytest.fixture
def device(needs_triton: None) -> str:
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
