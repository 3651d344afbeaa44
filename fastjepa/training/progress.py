"""What a run shows while it goes on: lines, and a progress bar where tqdm is installed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from fastjepa.optional_packages import missing_packages

PROGRESS_PACKAGES = ("tqdm",)


class Bar(Protocol):
    """The two methods of a progress bar that the trainer calls."""

    def update(self, count: int, /) -> object:
        """So many more are done."""

    def set_postfix(self, values: dict[str, Any], /) -> object:
        """Show these beside the bar."""


class _NoBar:
    """Shows nothing."""

    def update(self, count: int, /) -> None:
        pass

    def set_postfix(self, values: dict[str, Any], /) -> None:
        pass


def say(text: str) -> None:
    """Print a line to stdout, above the bar."""
    if missing_packages(*PROGRESS_PACKAGES):
        print(text, flush=True)
        return
    from tqdm import tqdm

    tqdm.write(text)


def progress_bar(title: str, total: int, done: int, *, shown: bool = True) -> AbstractContextManager[Bar]:
    """A bar of steps on stderr, `done` of `total` made before; one that shows nothing unless it is to be `shown`, and
    without tqdm.
    """
    if not shown or missing_packages(*PROGRESS_PACKAGES):
        return nullcontext(_NoBar())
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, mininterval=0.5, desc=title)
