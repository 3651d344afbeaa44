"""The folder of a run: made, checked, locked, and found again."""

from __future__ import annotations

import contextlib
import errno
from datetime import datetime
from pathlib import Path
from typing import Any

from fastjepa.config import Config
from fastjepa.files.safe_files import CheckpointError
from fastjepa.storage.checkpoint import load_checkpoint
from fastjepa.storage.folder_lock import FolderLock

CHECKPOINT_NAME = "checkpoint.pt"


class RunFolder:
    """The folder that a run writes to, locked against other processes until `release`.

    Attributes:
        path: the folder.

    Raises:
        ValueError: --out holds another run, or another process trains the run in it.
        OSError: it cannot be written.
    """

    def __init__(self, config: Config) -> None:
        self._made: list[Path] = []  # folders, the innermost first
        folder = config.resume or config.out
        flag = "--out" if config.resume is None else "--resume"
        try:
            self.path = self._new_folder(Path("runs"), config.preset) if folder is None else folder
            if folder is not None and config.resume is None:
                self._make(self.path, exist_ok=True)
            self._lock = FolderLock(self.path)
        except OSError as error:
            self._remove_if_made()
            is_file = folder is not None and folder.is_file()
            reason = "it is a file, and a run takes a folder" if is_file else error.strerror
            raise OSError(f"{flag} {folder or 'runs (the default)'} cannot be written: {reason}") from error
        if config.resume is None and (self.path / CHECKPOINT_NAME).exists():
            self.release()
            raise ValueError(
                f"--out {self.path} holds a run already: continue it with --resume {self.path}, or choose another"
            )

    def release(self) -> None:
        """Let another process have it. What was made for this run and stayed empty is removed."""
        self._lock.release()
        self._remove_if_made()

    def _remove_if_made(self) -> None:
        with contextlib.suppress(OSError):  # it is not empty
            for path in self._made:
                path.rmdir()

    def _make(self, path: Path, *, exist_ok: bool) -> None:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=exist_ok)
        self._made = missing

    def _new_folder(self, parent: Path, preset: str) -> Path:
        """Made here, so that two runs that start in the same second get two."""
        stem = f"{datetime.now():%Y-%m-%d-%H%M%S}-{preset}"
        for i in range(1000):
            path = parent / (stem + (f"-{i}" if i else ""))
            with contextlib.suppress(FileExistsError):
                self._make(path, exist_ok=False)
                return path
        raise FileExistsError(errno.EEXIST, f"a thousand folders are called {stem}", str(parent))


def load_run_checkpoint(checkpoint: Path) -> tuple[dict[str, Any], Path]:
    """What is in the checkpoint that --checkpoint names, which may be the folder of its run; (that, its path).

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint; the message names the flag.
    """
    path = checkpoint / CHECKPOINT_NAME if checkpoint.is_dir() else checkpoint
    if not path.exists():
        held = f"{checkpoint} has no {CHECKPOINT_NAME} in it" if checkpoint.is_dir() else f"there is no {checkpoint}"
        raise CheckpointError(f"--checkpoint takes the folder of a run or its {CHECKPOINT_NAME}; {held}")
    try:
        return load_checkpoint(path), path
    except CheckpointError as error:
        raise CheckpointError(f"--checkpoint {checkpoint}: {error}") from error


def read_run_config(folder: Path) -> dict[str, Any]:
    """The saved configuration of the run in `folder`. Raises CheckpointError if there is nothing to resume."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"--resume takes the folder of a run; {folder} {what}")
    path = folder / CHECKPOINT_NAME
    if not path.exists():
        raise CheckpointError(
            f"--resume {folder}: there is nothing to resume: {path} does not exist (a run writes it when it begins)"
        )
    try:
        config = load_checkpoint(path).get("config")
    except CheckpointError as error:
        raise CheckpointError(f"--resume {folder}: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"--resume {folder}: {path} holds no configuration")
    return config
