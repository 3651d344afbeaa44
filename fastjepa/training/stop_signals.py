"""SIGINT and SIGTERM end a run between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastjepa.training.progress import say


class Interrupted(Exception):  # noqa: N818 - not an error: the run has been saved
    """SIGINT or SIGTERM was received, the step (or the launch of steps) finished and the checkpoint written."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


@contextmanager
def stop_signals(*, once: bool = True) -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM inside, so that the loop can end between two steps; a second one ends at once.

    Not so without `once`, for a process of torchrun: that hands on a signal which its processes have had already.
    """
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        if received and once:
            raise KeyboardInterrupt
        if not received:
            again = " (again to stop at once)" if once else ""
            say(f"received {signal.Signals(number).name}: finishing the step and saving{again}")
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
