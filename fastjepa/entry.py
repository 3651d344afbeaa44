"""How a command begins and ends as a process: Ctrl-C is one line from the first moment, and no reader is no error.

`python -m fastjepa.COMMAND`, `fastjepa COMMAND` and train.py all come through here, before anything large is imported.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from fastjepa.optional_packages import MissingPackageError, needed_for
from fastjepa.refusal import STOPPED, fail

_NO_READER = 128 + 13  # SIGPIPE, as shells report what ends in `| head`; Windows has no such signal


def run_command(module: str, argv: Sequence[str] | None, prog: str) -> int:
    """Import `module` and call its `main(argv, prog=prog)`; the process's exit status."""

    def run() -> int:
        try:
            with stops_at_once(), needed_for(prog):
                main = importlib.import_module(module).main
            return int(main(argv, prog=prog) or 0)
        except MissingPackageError as error:
            fail(error)
        except KeyboardInterrupt:  # in a command that has nothing to save
            print("stopped", file=sys.stderr)
            return STOPPED

    return exit_status(run)


@contextmanager
def stops_at_once() -> Iterator[None]:
    """While modules are imported: Ctrl-C ends the process with one line. Python's KeyboardInterrupt would be a
    traceback from the midst of a package, or abort in its C++.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        os.write(2, b"stopped\n")
        os._exit(STOPPED)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def exit_status(command: Callable[[], int]) -> int:
    """What `command()` returns, or 141 where nobody reads what it prints any more, as in `| head`."""
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # now: Python does it too late to be caught
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # for what Python still flushes at its end
        return _NO_READER
