"""TensorBoard events of a run, where TensorBoard is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

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


@contextmanager
def open_board(folder: Path, step: int) -> Iterator[Board]:
    """A board that writes to `folder`/tensorboard from `step` on; without TensorBoard, one that drops everything."""
    if missing_packages(*BOARD_PACKAGES):
        yield _NoBoard()
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / BOARD_NAME, purge_step=step) as board:
        yield board
