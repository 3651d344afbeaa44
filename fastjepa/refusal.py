"""How every command says no: one line on stderr that begins with "error:", and exit status 2.

What a user can mend (a flag, a file, a full disk, too little memory) is one line; a mistake of this program stays a
traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from fastjepa.files.safe_files import CheckpointError
from fastjepa.optional_packages import MissingPackageError

STOPPED = 130  # 128 + SIGINT, as shells report it
ALWAYS_REFUSED: tuple[type[Exception], ...] = (ValueError, OSError, CheckpointError, MissingPackageError)


def fail(reason: object) -> NoReturn:
    """End the program with exit status 2 and one line that says why."""
    print(f"error: {one_line(reason)}", file=sys.stderr)
    raise SystemExit(2)


def one_line(reason: object) -> str:
    """`reason`, which may be an exception, as a single line; an error of the system with the file before the reason."""
    text = str(reason)
    if isinstance(reason, OSError) and reason.filename is not None and reason.strerror:
        text = f"{reason.filename}: {reason.strerror}"
    line = ""
    for part in filter(None, map(str.strip, text.splitlines())):
        line += ("" if not line else " " if line.endswith((":", ".", ";")) else "; ") + part
    return line or type(reason).__name__


@contextmanager
def refusals(*kinds: type[Exception]) -> Iterator[None]:
    """Around the work of a command: its errors of these `kinds`, and of those that any command has, in one line.

    Ends the program with exit status 2, or 130 for Ctrl-C; anything else passes unchanged.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(STOPPED) from None
    except BrokenPipeError:  # of whoever read what is printed: no mistake, and nothing to say to nobody
        raise
    except ALWAYS_REFUSED + kinds as error:
        fail(error)
    except (RuntimeError, MemoryError) as error:
        from fastjepa.policy import is_out_of_memory  # which needs torch, as whoever raised this did

        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        fail(f"memory ran out ({reason}); a smaller batch, smaller sizes or fewer clips need less")


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose error is one line, without the usage, which --help prints."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse when arguments cannot be parsed."""
        fail(f"{message}; see {self.prog} --help")
