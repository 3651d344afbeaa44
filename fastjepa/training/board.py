"""TensorBoard events of a run, where TensorBoard is installed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastjepa.files.safe_files import CheckpointError
from fastjepa.optional_packages import missing_packages

BOARD_NAME = "tensorboard"  # its folder in a run's
BOARD_PACKAGES = ("tensorboard", "PIL")  # Pillow for images


class Board(Protocol):
    """What the trainer tells: the two methods of SummaryWriter that it calls."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> object:
        """A number."""

    def add_image(self, tag: str, image: np.ndarray, step: int, /) -> object:
        """A picture (channels, H, W) in [0, 1]."""


class _NoBoard:
    """Drops everything."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> None:
        pass

    def add_image(self, tag: str, image: np.ndarray, step: int, /) -> None:
        pass


class _FileBoard:
    """TensorBoard's own writer, which says neither which file it could not write nor, at times, that it could not."""

    def __init__(self, writer: Any, folder: Path) -> None:
        self._writer, self._folder = writer, folder

    def add_scalar(self, tag: str, value: float, step: int, /) -> None:
        with self._named_errors():
            self._writer.add_scalar(tag, value, step)

    def add_image(self, tag: str, image: np.ndarray, step: int, /) -> None:
        with self._named_errors():
            self._writer.add_image(tag, image, step)

    def close(self) -> None:
        with self._named_errors():
            self._writer.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"could not write {self._folder}: {error.strerror or error}") from error


@contextmanager
def open_board(folder: Path | None, step: int) -> Iterator[Board]:
    """A board that goes on in `folder`/tensorboard after `step` steps; without a folder, or without TensorBoard, one
    that drops everything.

    What was told before about later steps, which are about to be made again, is not shown any more.

    Raises:
        CheckpointError: here, or when it is told something: the system refused to write.
    """
    if folder is None or missing_packages(*BOARD_PACKAGES):
        yield _NoBoard()
        return
    from torch.utils.tensorboard import SummaryWriter

    with _no_traceback_of_its_thread():
        try:
            writer = SummaryWriter(folder / BOARD_NAME, purge_step=step + 1)
        except OSError as error:
            raise CheckpointError(f"could not write {folder / BOARD_NAME}: {error.strerror or error}") from error
        board = _FileBoard(writer, folder / BOARD_NAME)
        try:
            yield board
        except BaseException:
            with suppress(CheckpointError):  # what ended the run is what should be told
                board.close()
            raise
        board.close()


@contextmanager
def _no_traceback_of_its_thread() -> Iterator[None]:
    """The thread in which TensorBoard writes prints an OSError, which the next call of the writer raises again."""
    before = threading.excepthook

    def hook(error: threading.ExceptHookArgs) -> None:
        of_tensorboard = type(error.thread).__module__.startswith("tensorboard.")
        if not (of_tensorboard and issubclass(error.exc_type, OSError)):
            before(error)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
