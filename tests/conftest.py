"""One gate for all tests: without a CUDA device every Triton kernel runs in Triton's CPU interpreter.

`TRITON_INTERPRET` is read when a kernel is decorated, so it is set here, before any test module imports one. A value
that is already set is kept: TRITON_INTERPRET=1 on a GPU machine tests the interpreter, TRITON_INTERPRET=0 the compiler.
Kernels that are compiled need a GPU: with TRITON_INTERPRET=0 and none, the tests that run kernels are skipped.

Where Triton is not installed, tests of the plain path run, and those of kernels are skipped with that reason: a test
that takes the fixture `device` or `needs_triton`, and a whole module that imports kernels. In the same way a test that
comes upon another package that is not installed is skipped, and the reason names it: torch, Triton, numpy and pytest
are enough to run what is marked gpu.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fastjepa.optional_packages import MissingPackageError, missing_packages

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
INTERPRETING = os.environ["TRITON_INTERPRET"] == "1"
NO_TRITON = None if importlib.util.find_spec("triton") else "needs Triton, which is not installed"
# Looked for here, before a test can pretend. Where all are installed, nothing is skipped for the lack of one.
_OPTIONAL = "PIL cv2 hypothesis matplotlib nvtx safetensors scipy sklearn submitit tensorboard torchmetrics tqdm tyro"
NOT_INSTALLED = [name for name in _OPTIONAL.split() if missing_packages(name)]


def _interpret_faster() -> dict[object, list[str]]:
    """Triton's interpreter replaces the builtins of its language at every call of a jitted function, also of one within
    a kernel, and looks for them among all members of five packages each time: a fifth of the time of small kernels.
    Which names are builtins does not change, so they are found once; what is done with each is Triton's own.
    """
    import inspect

    from triton import language as tl
    from triton.runtime import interpreter

    packages = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    names = {
        package: [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        for package in packages
    }

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in names[package]:
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # else it is replaced already
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
    return names


BUILTINS = _interpret_faster() if INTERPRETING and not NO_TRITON else {}


def _no_gpu_reason() -> str | None:
    if not torch.cuda.is_available():
        return "needs a CUDA device, and there is none"
    if INTERPRETING:
        return "needs compiled kernels, and TRITON_INTERPRET=1 is set"
    return NO_TRITON


# ---- what is collected, and in which order ----


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


# Files of tests by what they tell about a GPU, first things first.
_KERNELS = ("batch_norm", "convolution", "moments", "projected_losses", "launch")
_GRAPHS = ("graphs", "graphed_rollout", "graphed_train_step", "graphed_training")
_MODELS = (
    "fused_networks", "inference", "accelerate", "golden", "recompute", "memory", "step_memory", "convergence",
    "evaluation",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; where there is one, run first what only it can show.

    Time on a GPU may end at any moment, and a run that was cut short should have told the most: whether each kernel
    computes the right thing, in each dtype, at small sizes; whether it still does at the recipe's sizes; whether a
    graph's replay equals the plain code; whether networks do; then everything else, which a CPU shows as well. Within
    a group the order is that of the files. Without a GPU nothing is reordered.
    """
    reason = _no_gpu_reason()
    for item in items:
        if reason is not None and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
        named = [name for marker in item.iter_markers("packages") for name in marker.args if name in NOT_INSTALLED]
        if named:
            item.add_marker(pytest.mark.skip(reason=f"needs what is not installed: {', '.join(named)}"))
    if reason is None:
        items.sort(key=value_on_a_gpu)


def value_on_a_gpu(item: pytest.Item) -> int:
    """0 for tests to run first on a GPU, 5 for those to run last."""
    stem = item.path.stem.removeprefix("test_")
    on_gpu = item.get_closest_marker("gpu") is not None
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    if not on_gpu and ("device" not in getattr(item, "fixturenames", ()) or parameters.get("device") == "cpu"):
        return 5  # the same on a CPU
    if stem in _KERNELS:
        if "compile" in item.name or "opcheck" in item.name:
            return 3  # torch's own compilation takes longer than all of the above, and tells less about a kernel
        return 1 if on_gpu else 0  # recipe sizes after small ones
    return 2 if stem in _GRAPHS else 3 if stem in _MODELS else 4


# ---- what is printed ----


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist prints nothing
        config.pluginmanager.register(FailuresAtOnce(config), "failures at once")


class FailuresAtOnce:
    """One line for each failure when it happens: a run that is killed, or hangs, has said what failed before."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal: Any = self._config.pluginmanager.getplugin("terminalreporter")
        if report.failed and terminal is not None:
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = str(report.longrepr if crash is None else crash.message).strip().splitlines() or ["no reason given"]
            terminal.write(f"\nfailed: {report.nodeid} ({report.when}): {lines[0]}\n", flush=True)


# ---- where and how tests run ----


@pytest.fixture
def needs_triton() -> None:
    """Skips the test where Triton is not installed."""
    if NO_TRITON:
        pytest.skip(NO_TRITON)


@pytest.fixture
def device(needs_triton: None) -> str:
    """Where kernels run in this session: "cuda", or "cpu" in the interpreter."""
    reason = _no_gpu_reason()
    if reason is None:
        return "cuda"
    if not INTERPRETING:
        pytest.skip(f"TRITON_INTERPRET=0 is set; {reason}")
    return "cpu"


@pytest.fixture
def interpreted(needs_triton: None) -> None:
    """For a test that runs kernels on CPU tensors: skips it where they are compiled for a GPU."""
    if not INTERPRETING:
        pytest.skip("runs kernels on CPU tensors, and TRITON_INTERPRET=0 compiles them for a GPU")


@pytest.fixture(autouse=True)
def exact_arithmetic() -> Iterator[None]:
    """fp32 is fp32, and convolutions are deterministic, as in the trainer; what a test sets is put back after it.

    torch's own default is TF32 in cuDNN's convolutions: 1e-3 where tests ask for 1e-5. A CPU has no such switches.
    """
    if not torch.cuda.is_available():
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = False, False, True, False
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


@pytest.fixture
def ordered_sums(device: str) -> Iterator[None]:
    """Bitwise equal gradients of everything: bilinear interpolation's adds with atomics on CUDA unless told not to.

    "warn_only": what has no deterministic form (an adaptive pooling, whose gradient is one all the same where sizes
    divide) warns, and cuBLAS does not ask for its environment variable.
    """
    if device != "cuda":
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu_to_itself() -> Iterator[None]:
    """For a test that takes tens of GB: one at a time, also with pytest-xdist, and nothing is kept from or for others.

    A lock on a file, which is let go of should the process die.
    """
    import fcntl  # not on Windows, where no such test runs

    with (Path(tempfile.gettempdir()) / f"fastjepa-gpu-to-itself-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        try:
            yield
        finally:
            torch.cuda.empty_cache()


@pytest.fixture
def nan_filled_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised floating memory holds NaN, so an output or a partial that a kernel does not write cannot hide.

    For eager code only. On CUDA the fill is one more kernel on the stream in front of the op's, with the allocator's
    memory as ever; a capture would record it, and a trace would see a graph that nobody runs.
    """

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return allocate_poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
