"""Several processes that train together: started as torchrun starts them, but without the seconds that it takes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fastjepa.environment import ROOT

TRAIN = [sys.executable, str(ROOT / "train.py")]


@dataclass(frozen=True)
class Ended:
    """How a process ended and what it said."""

    status: int
    out: str
    error: str


@contextmanager
def started(
    n: int, command: Sequence[str], environment_of: Callable[[int], Mapping[str, str]] = lambda rank: {}
) -> Iterator[list[subprocess.Popen[str]]]:
    """`n` processes of `command`, which find each other; `environment_of(rank)` is added to what each of them sees.

    None is left at the end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(n):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(n),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **environment_of(rank),
        }
        processes.append(
            subprocess.Popen(
                command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                start_new_session=True,
            )
        )  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def ended(processes: Sequence[subprocess.Popen[str]], seconds: float = 180) -> list[Ended]:
    """How they end; subprocess.TimeoutExpired if one of them does not within `seconds`."""
    said = [process.communicate(timeout=seconds) for process in processes]
    return [Ended(process.returncode, *words) for process, words in zip(processes, said, strict=True)]


def run(
    n: int, command: Sequence[str], environment_of: Callable[[int], Mapping[str, str]] = lambda rank: {}
) -> list[Ended]:
    """`n` processes of `command`, until they have ended."""
    with started(n, command, environment_of) as processes:
        return ended(processes)
