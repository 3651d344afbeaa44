"""Named ranges for profilers.

Ranges appear in Nsight Systems and Nsight Compute as NVTX ranges of the domain "fastjepa" (a GPU only; without the
package nvtx, in the default domain), and in the Chrome trace of `training.step_trace` on any machine. A range inside a
CUDA graph is seen when the graph is captured, not when it is replayed: there, "graph replay" is the range.
"""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.profiler import record_function

DOMAIN = "fastjepa"

_NOTHING: AbstractContextManager[Any] = contextlib.nullcontext()
_traces_running = 0


def span(name: str) -> AbstractContextManager[Any]:
    """`with span("encode"): ...` marks a range; without CUDA and without a running trace it does nothing.

    Ranges nest. Names are few and fixed: each is registered once.
    """
    if torch.compiler.is_compiling():
        return _NOTHING  # dynamo cannot trace a range, and a compiled step has kernels of its own names
    if _traces_running:
        return record_function(name)  # the trace takes NVTX's place: two ranges for one piece of work would mislead
    if not _cuda_is_there():
        return _NOTHING
    return _nvtx_range(name)


@functools.cache
def _cuda_is_there() -> bool:
    return torch.cuda.is_available()  # asked on first use, not on import


@functools.cache
def _nvtx_range(name: str) -> AbstractContextManager[Any]:
    try:
        import nvtx  # for a GPU only
    except ModuleNotFoundError:
        return _TorchRange(name)
    return nvtx.annotate(name, domain=DOMAIN)  # pushes and pops, and holds no state: one object serves all uses


class _TorchRange:
    """An NVTX range by what torch brings, which knows no domains. Holds no state either."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        torch.cuda.nvtx.range_push(self.name)

    def __exit__(self, *_: object) -> None:
        torch.cuda.nvtx.range_pop()


def trace_starts() -> None:
    """From now on ranges are for a torch.profiler trace; several traces may run."""
    global _traces_running
    _traces_running += 1


def trace_ends() -> None:
    """One of the traces has ended."""
    global _traces_running
    _traces_running -= 1
