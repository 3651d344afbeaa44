"""Run a command that may crash, hang or never end, so that it costs only itself.

What is measured on a GPU for the first time may do any of these: an illegal memory access poisons its whole process, a
kernel may never return, a compiler may run for an hour. So it runs in a process of its own, for a bounded time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Python and pytest answer the first by saying where they were and what has failed so far; the last cannot be refused.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGKILL") if hasattr(signal, name))
_TAIL_BYTES = 4000
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit status, negative for a signal, or None if its time was over; and its last output."""

    status: int | None
    seconds: float
    tail: str

    @property
    def reason(self) -> str:
        """Why it is not a success, in one line with the last line that it printed; "" if it is one."""
        if self.status == 0:
            return ""
        if self.status is None:
            why = f"ended after {self.seconds:.0f} s: its time was over"
        elif self.status < 0:
            why = f"ended by {_signal_name(-self.status)}"
        else:
            why = f"exit status {self.status}"
        last = next((line.strip() for line in reversed(self.tail.splitlines()) if line.strip()), "")
        return f"{why}; last output: {last[:200]}" if last else why


def run_child(
    command: Sequence[str],
    log: Path,
    seconds: float,
    *,
    variables: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    patience: float = 5.0,
    overdue: Callable[[], bool] = lambda: False,
) -> Ended:
    """Run `command` for at most `seconds`; everything that it prints is appended to the file `log`.

    It is a session of its own. When its time is over, or `overdue()` says so (asked some times a second), the session
    gets SIGINT, then SIGTERM, then SIGKILL, `patience` seconds apart. It also ends when this process is killed (on
    Linux), and whatever stops this function stops it first.

    Args:
        command: the program and its arguments.
        log: made if need be, with its folder.
        seconds: its time.
        variables: added to the environment.
        cwd: where it runs; default: here.
        patience: seconds between the signals.
        overdue: whether to end it before its time, for a reason of the caller's.

    Raises:
        ValueError: `seconds` is not positive.
        OSError: the program cannot be started.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be more than 0, got {seconds}")
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_before_its_program if os.name == "posix" else None,
        )
        try:
            status: int | None = _wait(process, started + seconds, overdue)
        finally:
            _end(process, patience)  # also of a child that has ended: what it started may still run
    return Ended(status, time.monotonic() - started, _tail(log, begin))


def _wait(process: subprocess.Popen[Any], until: float, overdue: Callable[[], bool]) -> int | None:
    """Its exit status, or None if its time was over."""
    while (status := process.poll()) is None:
        if time.monotonic() > until or overdue():
            return None
        time.sleep(_POLL_SECONDS)
    return status


def _end(process: subprocess.Popen[Any], patience: float) -> None:
    """End the whole session; the process itself is asked politely first."""
    for number in _SIGNALS if process.poll() is None else _SIGNALS[-1:]:
        if sys.platform == "win32":
            process.kill()
        else:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue
        if number != _SIGNALS[-1] and sys.platform != "win32":  # it has gone; its own children may have refused
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, _SIGNALS[-1])
        return


_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _before_its_program() -> None:
    """In the child: listen to SIGINT, which a shell lets its background jobs ignore, and those pass that on; and ask
    Linux to kill it when this process ends, however that happens.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _tail(log: Path, begin: int) -> str:
    """The last bytes that the child wrote, as text."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(begin, size - _TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
