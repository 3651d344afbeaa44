"""Reading what `torch.save` wrote, without trusting it: no code runs, and damage is found."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from typing import Any, BinaryIO

import torch

from fastjepa.files.safe_files import CheckpointError

# torch.save's format before it was a zip archive: pickles, one after another, of which the first is a magic number.
_LEGACY_START = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)


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


def shown(value: object) -> str:
    """A value from a file, for a message: short, on one line, and without control characters."""
    parts = value if type(value) is tuple else (value,)
    if any(type(part) not in (type(None), bool, int, float, str) for part in parts):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


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
    file.seek(0)
    if file.read(len(_LEGACY_START)) == _LEGACY_START:
        raise ValueError(
            "is in torch's legacy format (torch < 1.6, or _use_new_zipfile_serialization=False), which has no "
            "checksums: load it with torch.load(..., weights_only=True), and save it again with torch.save"
        )
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
