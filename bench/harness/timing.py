"""Stopwatches. Each times one call and hands its result on, so that a phase can build on the one before."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
_FLUSH_BYTES = 256 * 1024 * 1024  # several times the L2 cache of any current GPU (H200: 60 MB)


class Timer(Protocol):
    """`time(f)` runs f once; `milliseconds()` gives the times since it was last asked, in order."""

    label: str

    def time(self, function: Callable[[], T]) -> T:
        """Run `function` once and note how long it took; returns its result."""
        ...

    def milliseconds(self) -> list[float]:
        """The times noted since the last call of this method; waits for the device if it must."""
        ...


class DeviceTimer:
    """CUDA events around the work. The L2 cache is flushed first: in a training step the inputs are not in it.

    The flush also keeps the GPU busy for the ~0.1 ms in which the host enqueues the work, so short phases are not
    charged for the first launch.
    """

    label = "device, cold L2"

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, function: Callable[[], T]) -> T:
        """See Timer."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        result = function()
        end.record()
        self._events.append((start, end))
        return result

    def milliseconds(self) -> list[float]:
        """See Timer."""
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in self._events]
        self._events.clear()
        return times


class WarmDeviceTimer:
    """CUDA events around the work, with the L2 cache as the work before left it. The host must be ahead: time what
    launches once, as a CUDA graph, or takes long.
    """

    label = "device, warm L2"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time(self, function: Callable[[], T]) -> T:
        """See Timer."""
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = function()
            end.record()
        self._events.append((start, end))
        return result

    def milliseconds(self) -> list[float]:
        """See Timer."""
        torch.cuda.synchronize(self._device)
        times = [start.elapsed_time(end) for start, end in self._events]
        self._events.clear()
        return times


class HostTimer:
    """The host's clock around the call, from an idle device to an idle device: what a user who waits for it sees."""

    def __init__(self, device: torch.device, label: str) -> None:
        self.label = label
        self._synchronize: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self._times: list[float] = []

    def time(self, function: Callable[[], T]) -> T:
        """See Timer."""
        self._synchronize()
        start = time.perf_counter()
        result = function()
        self._synchronize()
        self._times.append(1e3 * (time.perf_counter() - start))
        return result

    def milliseconds(self) -> list[float]:
        """See Timer."""
        times, self._times = self._times, []
        return times


def make_timer(device: torch.device, latency: bool) -> Timer:
    """Events with a cold cache on a GPU; the host's clock on a CPU, and wherever latency is what matters."""
    if latency:
        return HostTimer(device, "latency")
    return DeviceTimer(device) if device.type == "cuda" else HostTimer(device, "host")


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile of `values`, linearly interpolated."""
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), q))
