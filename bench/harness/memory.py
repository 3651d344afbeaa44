"""Peak memory of a phase, above what its inputs occupy.

On a GPU the caching allocator counts it. On a CPU nothing does, so the phase runs in a fresh process, and the kernel's
high-water mark of that process's resident memory (VmHWM) is read: the phase is run once to load libraries, freed
memory is given back (malloc_trim), the mark is reset (writing 5 to /proc/self/clear_refs), and the phase runs again.
Being the resident memory of a real process this is exact to a few hundred kilobytes. Linux only; elsewhere the CPU's
figure is None. That process is also the canary: if a variant needs more memory than there is, it is the one killed.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import pickle
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from fastjepa.policy import is_out_of_memory

Phases = dict[str, int]  # peak bytes by phase
Run = Callable[[Callable[[str], None]], object]  # runs every phase once and calls its argument at the end of each
_CLEAR_REFS = Path("/proc/self/clear_refs")


class ChildFailedError(RuntimeError):
    """The measuring process ended without an answer."""


def measure_on_gpu(run: Run, device: torch.device) -> Phases:
    """Peak bytes of each phase of `run`, above what is allocated now."""
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    peaks: Phases = {}

    def end_of(phase: str) -> None:
        torch.cuda.synchronize(device)
        peaks[phase] = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)

    torch.cuda.reset_peak_memory_stats(device)
    run(end_of)
    return peaks


def measure_on_cpu(prepare: Callable[..., Run], *arguments: Any) -> Phases | None:
    """Peak bytes of each phase of `prepare(*arguments)`, prepared and run in a fresh process. None outside Linux.

    Raises TypeError if function or arguments cannot be sent to another process, MemoryError if the process runs out of
    memory or is killed (as the system does when there is none left), ChildFailedError with its message if it fails.
    """
    if not _CLEAR_REFS.exists():
        return None
    try:
        payload = pickle.dumps((prepare, arguments))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"memory on a CPU is measured in another process, to which the case must be sent: build cases and variants "
            f"from module-level functions and functools.partial ({error})"
        ) from error
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, payload), daemon=False)
    process.start()
    sender.close()
    try:
        kind, answer = receiver.recv()
    except EOFError:
        kind, answer = "gone", None
    finally:
        process.join()
        receiver.close()
    if kind == "out of memory" or process.exitcode == -9:
        raise MemoryError(answer or "the process measuring its memory was killed")
    if kind != "peaks":
        raise ChildFailedError(answer or f"the process measuring its memory ended with status {process.exitcode}")
    return dict(answer)


def _child(sender: Connection, payload: bytes) -> None:
    try:
        prepare, arguments = pickle.loads(payload)  # from our own parent process
        run = prepare(*arguments)
        run(lambda _: None)
        sender.send(("peaks", _resident_peaks(run)))
    except Exception as error:  # whatever it is, the parent reports it
        kind = "out of memory" if is_out_of_memory(error) else "failed"
        sender.send((kind, f"{type(error).__name__}: {error}"))


def _resident_peaks(run: Run) -> Phases:
    gc.collect()
    _reset_high_water_mark()
    before = _status_bytes("VmRSS")
    peaks: Phases = {}

    def end_of(phase: str) -> None:
        peaks[phase] = max(0, _status_bytes("VmHWM") - before)
        _reset_high_water_mark()

    run(end_of)
    return peaks


def _reset_high_water_mark() -> None:
    """To the memory in use: what is freed but kept by the allocator is given back first."""
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ChildFailedError(f"/proc/self/status has no {field}")
