"""Files that are whole or not there: the one way in which anything here is written."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

_LEFTOVER_AGE_S = 3600  # a temporary file that nobody wrote to for this long belongs to a process that was killed


class CheckpointError(RuntimeError):
    """A file could not be written or read, or what it holds does not fit. Nothing was changed."""


def write_atomic(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that then appears at `path` at once, as `atomic_path` says; it survives power loss.

    Raises:
        CheckpointError: the system refused (no space, no permission, no such folder, ...); it names path and reason.
        BaseException: whatever else `write` raised, unchanged.
    """
    target, replaced = Path(os.path.realpath(path)), False
    try:
        with atomic_file(target) as file:
            write(file)
        replaced = True
        _flush_folder(target.parent)
    except OSError as error:
        if replaced:
            state = "the new file is in place and complete, but may not survive a power failure"
        elif target.exists():
            state = "what was there before is intact"
        else:
            state = "nothing was written"
        raise CheckpointError(f"could not write {path}: {error.strerror or error}; {state}") from error


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """`write_atomic` with text as UTF-8; line ends are written as given."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write to, which appears at `path` when the block ends well; all else is as `atomic_path` says."""
    with atomic_path(path) as temporary:
        # Not tempfile.mkstemp: its files are readable by their owner only, whatever the umask says.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(descriptor, "wb") as file:
            yield file


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name of a new file in the same folder, which becomes `path` when the block ends well.

    What was written is flushed to disk before it replaces what was there. If anything fails, the previous file is
    intact and the temporary one is gone. A link at `path` is followed.

    Raises:
        OSError: the system refused.
        BaseException: whatever the block raised, unchanged.
    """
    target = Path(os.path.realpath(path))
    # A random name, because two processes may write the same file at the same time.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        _remove_leftovers(target)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:  # an interrupt too must not leave 800 MB of nothing
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened, and a rename is durable or not as the system decides
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(target: Path) -> None:
    """Remove the temporary files of writers that were killed, so that they do not fill the disk one by one."""
    start, oldest = f".{target.name}.", time.time() - _LEFTOVER_AGE_S
    with contextlib.suppress(OSError):  # another process may be faster; and a folder that is not there is told later
        for path in target.parent.iterdir():
            if path.name.startswith(start) and path.suffix == ".tmp" and path.lstat().st_mtime < oldest:
                path.unlink()
