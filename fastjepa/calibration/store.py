"""Rows on disk: one JSON file for each setting, in the user's cache; and those shipped with the package.

A file comes from outside: every field is checked when it is read. What is not whole is told in one line, and measured
again.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastjepa.calibration.setting import Setting
from fastjepa.calibration.trial import Trial, printable
from fastjepa.files.safe_files import write_text_atomic
from fastjepa.storage.cache_folder import default_cache_dir

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

FORMAT = "fastjepa calibration"
VERSION = 3
MEASURED = Path(__file__).resolve().parent / "measured"  # committed rows, package data
_LARGEST_BYTES = 1_000_000
_LONGEST_TEXT, _LONGEST_MESSAGE, _LARGEST_SIZE = 200, 300, 2**31
_POLL_SECONDS = 0.1

Rows = tuple[Trial, ...]


class LockTimeoutError(RuntimeError):
    """Another process has held the lock for too long."""


def rows_folder(cache_dir: Path | None) -> Path:
    """Where rows are kept: `calibration` in the cache, by default the user's."""
    return (cache_dir or default_cache_dir()) / "calibration"


def rows_path(setting: Setting, folder: Path) -> Path:
    """The file of one setting."""
    return folder / f"{setting.key}.json"


def read_rows(path: Path) -> tuple[Setting, Rows]:
    """What a file holds.

    Raises:
        ValueError: it is not whole, or not of this format; the message says what is wrong.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(_LARGEST_BYTES + 1)
    if len(content) > _LARGEST_BYTES:
        raise ValueError("it is too large for a file of rows")
    try:
        values: Any = json.loads(content.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is not whole ({error})") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError("it is not a file of calibration")
    if values.get("version") != VERSION:
        raise ValueError(f"it has version {values.get('version')!r:.20}; this fastjepa reads {VERSION}")
    if not isinstance(values.get("trials"), list) or not values["trials"]:
        raise ValueError("it has no trials")
    try:
        setting = Setting.from_json(values.get("setting"))
        for name, value in setting.to_json().items():
            _check_sane(name, value)
        rows = tuple(Trial.from_json(trial) for trial in values["trials"])
    except ValueError as error:  # which may quote what it found
        raise ValueError(printable(str(error), _LONGEST_MESSAGE)) from error
    if setting.purpose == "train" and any(row.choice.convolutions for row in rows):
        raise ValueError("it has a row of training with own convolutions, which are for inference")
    if len({row.choice for row in rows}) != len(rows):
        raise ValueError("it has two rows for one candidate")
    return setting, rows


def _check_sane(name: str, value: object) -> None:
    """What is shown to people must not play tricks on their terminal."""
    if isinstance(value, str) and value != printable(value, _LONGEST_TEXT):
        raise ValueError(f"{name} must be printable text of at most {_LONGEST_TEXT} characters, got {value!r}")
    if isinstance(value, int) and value > _LARGEST_SIZE:
        raise ValueError(f"{name} must be at most {_LARGEST_SIZE}, got {value!r}")


def write_rows(setting: Setting, rows: Rows, folder: Path) -> Path:
    """Write the file of one setting, whole or not at all. It need not hold every candidate: a search goes on from it.

    Raises:
        OSError, CheckpointError: the system refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "format": FORMAT,
        "version": VERSION,
        "setting": setting.to_json(),
        "trials": [row.to_json() for row in rows],
    }
    path = rows_path(setting, folder)
    write_text_atomic(path, json.dumps(values, indent=1, allow_nan=False) + "\n")
    return path


def find_rows(setting: Setting, folder: Path, say: Callable[[str], None]) -> tuple[Rows, Path] | None:
    """The rows for a setting and their file: of this user's cache, or else shipped with the package. None: none."""
    path = rows_path(setting, folder)
    try:
        found, rows = read_rows(path)
        if found == setting:
            return rows, path
        say(f"{path} is of another setting and will be measured again")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except PermissionError as error:
        say(f"{path} cannot be read ({error.strerror or error}) and is passed over")
    except (ValueError, OSError) as error:
        say(f"{path} cannot be used and will be measured again: {error}")
    for path in sorted(MEASURED.glob("*.json")):
        with contextlib.suppress(ValueError, OSError):  # tests/test_calibration_store.py reads each of them
            found, rows = read_rows(path)
            if found.covers(setting):
                return rows, path
    return None


@contextlib.contextmanager
def only_one_process(folder: Path, seconds: float, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, no other process of this user calibrates: two at once would disturb each other's times.

    The system lets go of the lock when a process ends, however it ends. Where the folder cannot hold a lock, this says
    so and goes on without one.

    Raises:
        LockTimeoutError: another process held it for `seconds`.
    """
    file: BinaryIO | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("ab")
    except OSError as error:
        say(f"{folder} cannot hold a lock ({error.strerror or error}): two processes at once would measure twice")
    try:
        if file is not None:
            _wait_for(file, folder, seconds, say)
        yield
    finally:
        if file is not None:
            file.close()  # which lets go of the lock


def _wait_for(file: BinaryIO, folder: Path, seconds: float, say: Callable[[str], None]) -> None:
    until, told = time.monotonic() + seconds, False
    while True:
        try:
            if _lock(file):
                return
        except OSError as error:  # some network file systems have none
            say(f"{folder} cannot hold a lock ({error.strerror or error}): two processes at once would measure twice")
            return
        if not told:
            say(f"another process is calibrating; waiting for its rows (at most {seconds:.0f} s)")
            told = True
        if time.monotonic() > until:
            raise LockTimeoutError(f"another process has been calibrating for {seconds:.0f} s")
        time.sleep(_POLL_SECONDS)


def _lock(file: BinaryIO) -> bool:
    """Whether the lock is ours now."""
    try:
        if sys.platform == "win32":
            file.seek(0, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
