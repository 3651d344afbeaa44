"""One run of a sweep, trained in a process of its own, from where it is to its end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fastjepa.storage.run_folder import CHECKPOINT_NAME
from fastjepa.sweeping.child import Child
from fastjepa.sweeping.child_process import Ended
from fastjepa.sweeping.state import LOG_NAME, forget_failure, note_failure


class Attempt:
    """An attempt to train the run in `folder` to its end, with the trainer's `flags`; begins at once.

    A folder with a checkpoint goes on from there. `patience`: seconds that a stopped run has to save.
    """

    def __init__(self, folder: Path, flags: Sequence[str], *, patience: float) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        forget_failure(folder)
        self._child = Child(train_command(folder, flags), folder / LOG_NAME, patience=patience)

    def wait(self) -> Ended:
        """How it ended; why it broke is kept in the folder."""
        ended = self._child.wait()
        if ended.reason:
            note_failure(self._folder, ended.reason)
        return ended

    def stop(self) -> Ended:
        """Let it save and end. That is no failure."""
        return self._child.stop()


def train_command(folder: Path, flags: Sequence[str]) -> list[str]:
    """What trains the run in `folder`, or goes on with it; works from a checkout and where fastjepa is installed."""
    where = "--resume" if (folder / CHECKPOINT_NAME).exists() else "--out"
    return [sys.executable, "-m", "fastjepa", "train", *flags, where, str(folder)]
