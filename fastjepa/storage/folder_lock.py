"""A lock on a run's folder: one process at a time trains it.

The lock is the operating system's, on a small file in the folder, so it ends with its process however that ends: a run
that was killed can be resumed at once. What the file holds is only for the message.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"
_MESSAGE_BYTES = 200


class FolderInUseError(ValueError):
    """Another process trains the run in this folder; the message says which."""


class FolderLock:
    """Held from its making until `release`, or until the process ends.

    Where there are no such locks (Windows, some network file systems) it warns and holds nothing: that is no reason not
    to train.

    Raises:
        FolderInUseError: it is held already, by another process or in this one.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_NAME
        self._release: Callable[[], object] = lambda: None
        if fcntl is None:
            logger.warning(
                "the run in %s is not locked against a second process: this system has no such locks", folder
            )
            return
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, _MESSAGE_BYTES).decode("utf-8", errors="replace").strip()
                os.close(descriptor)
                raise FolderInUseError(
                    f"the run in {folder} is being trained by {holder or 'another process'}: wait for it to end, or "
                    "stop it, and resume again"
                ) from None
            except OSError as error:
                os.close(descriptor)
                logger.warning("the run in %s is not locked against a second process: %s", folder, error.strerror)
                return
            if _is_at(descriptor, self._path):
                break
            os.close(descriptor)  # its holder removed it between our opening and our locking it: once more
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode()[:_MESSAGE_BYTES])
        # Also when the object is dropped: a trainer that nobody keeps must not hold its folder.
        self._release = weakref.finalize(self, _remove, descriptor, self._path)

    def release(self) -> None:
        """Let go, and remove the file. More than once is harmless."""
        self._release()


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove(descriptor: int, path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()  # while it is held, so that no other process's file is removed
    os.close(descriptor)
