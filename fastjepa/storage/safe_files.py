"""Files that are whole or not there: atomic writes, and safe reading of what torch.save wrote."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import secrets
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

_LEFTOVER_AGE_S = 3600  # a temporary file that nobody wrote to for this long belongs to a process that was killed


class CheckpointError(RuntimeError):
    """A file could not be written or read, or what it holds does not fit. Nothing was changed."""


def write_atomic(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that then appears at `path` at once, replacing what was there; it survives power loss.

    The content goes to a temporary file in the same folder, is flushed to disk and renamed. If anything fails, the
    previous file is intact and the temporary file is gone. A link at `path` is followed.

    Raises:
        CheckpointError: the system refused (no space, no permission, no such folder, ...); it names path and reason.
        BaseException: whatever else `write` raised, unchanged.
    """
    target = Path(os.path.realpath(path))
    # A random name, because two processes may write the same cache file at the same time.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    replaced = False
    try:
        _remove_leftovers(target)
        # Not tempfile.mkstemp: its files are readable by their owner only, whatever the umask says.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
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
    finally:
        if not replaced:
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """`write_atomic` with text as UTF-8; line ends are written as given."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


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


def read_tensor_file(path: str | os.PathLike[str], map_location: Any = "cpu") -> Any:
    """What `torch.save` wrote to `path`, checked against its checksums and loaded without running code from the file.

    Raises:
        CheckpointError: missing, empty, damaged, truncated, of another kind, or with pickled objects.
    """
    try:
        with open(path, "rb") as file:
            verified = _verified_archive(file)
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error
    try:
        return torch.load(verified, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and plain values{_unsafe_names(verified)}") from error
    except Exception as error:  # torch.load has no exception of its own; any failure means the same here
        first_line = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path} could not be loaded ({type(error).__name__}: {first_line})") from error


def _verified_archive(file: BinaryIO) -> io.BytesIO:
    """The zip archive of torch.save, with every entry verified, as a clean copy in memory.

    torch.load's own zip reader verifies no checksum, and for some damage it returns memory that nobody wrote (an entry
    whose attributes say "folder" is not read at all): so it sees only what Python's reader has verified.

    Raises:
        ValueError: anything is wrong with it; the message continues "path ...".
    """
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise ValueError("is empty")
    clean = io.BytesIO()
    try:
        with zipfile.ZipFile(file) as archive, zipfile.ZipFile(clean, "w") as copy:
            entries = archive.infolist()
            names = {entry.filename for entry in entries}
            # torch.save never compresses: anything that unpacks to more than the file's size is foreign.
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
                raise zipfile.BadZipFile("it is compressed")
            if len(names) != len(entries) or not any(name.endswith("/data.pkl") for name in names):
                raise zipfile.BadZipFile("it is another kind of zip archive")
            for entry in entries:
                copy.writestr(entry.filename, archive.read(entry))
    except OSError:
        raise
    except Exception as error:  # zipfile answers damage with many types: BadZipFile, RuntimeError, struct.error, ...
        raise ValueError(f"is damaged, truncated, or not a file that torch.save wrote: {error}") from error
    clean.seek(0)
    return clean


def _unsafe_names(archive: io.BytesIO) -> str:
    archive.seek(0)
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(archive))
    except Exception:  # only for the message, which is clear without them
        names = []
    found = f" ({', '.join(names[:5])})" if names else ""
    return f": it has other pickled objects{found}, and loading those can run code, so it was not loaded"
