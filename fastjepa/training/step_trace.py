"""A trace of a few training steps, for chrome://tracing or ui.perfetto.dev: `train.py --profile`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fastjepa.files.safe_files import atomic_path
from fastjepa.profiling import trace_ends, trace_starts

TRACE_NAME = "trace.json"


class StepTrace:
    """Context manager that writes a torch.profiler Chrome trace of a few training steps; works on a CPU too.

    Call `step()` after each training step. The first `skip` steps are not recorded (libraries load, graphs are
    captured), nor is the one after them, in which the profiler starts up; then `steps` steps are, and the trace is
    written to `path`, atomically. Open it in chrome://tracing or ui.perfetto.dev. A run that ends earlier writes what
    was recorded, if anything was.

    Attributes:
        written: the file, once it is there; until then None.
    """

    def __init__(
        self, path: Path, *, skip: int = 3, steps: int = 3, on_written: Callable[[Path], object] | None = None
    ) -> None:
        for name, value, least in (("skip", skip, 0), ("steps", steps, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.path = path
        self.written: Path | None = None
        self._on_written = on_written
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=skip, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
            acc_events=True,
        )
        self._running = False

    def __enter__(self) -> StepTrace:
        self._profile.__enter__()
        self._running = True
        trace_starts()
        return self

    def step(self) -> None:
        """One training step is done. Free once the trace is written."""
        if self._running:
            self._profile.step()
            if self.written is not None:
                self._stop(None, None, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running:
            self._stop(kind, error, trace)

    def _stop(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._running = False
        trace_ends()
        self._profile.__exit__(kind, error, trace)

    def _write(self, recorded: Any) -> None:
        if self.written is not None:
            return
        with atomic_path(self.path) as temporary:  # the profiler writes to a name only
            recorded.export_chrome_trace(str(temporary))
        self.written = self.path
        if self._on_written is not None:
            self._on_written(self.path)


@contextlib.contextmanager
def trace_steps(path: Path | None, say: Callable[[str], object]) -> Iterator[Callable[[], None]]:
    """A `StepTrace` for a training loop: gives the function to call after each step, and says what became of the trace.
    With `path` None it does nothing.
    """
    if path is None:
        yield lambda: None
        return
    with StepTrace(path, on_written=lambda path: say(f"wrote a trace of training steps: {path}")) as trace:
        yield trace.step
    if trace.written is None:
        say("no trace was recorded: too few training steps were made")
