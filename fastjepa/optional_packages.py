"""Packages that only a part of fastjepa needs, imported where they are used.

torch and numpy (and Triton, for kernels) are enough to import fastjepa, and to use the models and most benchmarks: that
is what fastjepa depends on. The extras of pyproject.toml bring the rest; where something is missing, only what needs it
fails, and says what to install.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

# Modules that are installed under another name. The rest are called as they are imported.
_INSTALLED_AS = {"cv2": "opencv-python-headless", "sklearn": "scikit-learn", "PIL": "pillow"}

# The extras of pyproject.toml with the packages they bring; each has those of the one before it too.
EXTRAS: dict[str, tuple[str, ...]] = {
    "figures": ("matplotlib", "pillow"),
    "train": (
        "tyro", "tqdm", "torchmetrics", "scikit-learn", "opencv-python-headless", "tensorboard", "safetensors",
    ),
    "slurm": ("submitit",),
}  # fmt: skip


class MissingPackageError(ImportError):
    """Something needs a Python package that is not installed; the message says what, which, and how to install it."""


def missing_packages(*modules: str) -> list[str]:
    """Those of `modules` (names as they are imported, "cv2") that are not here, by the names that pip installs
    ("opencv-python-headless"); nothing is imported.
    """
    return [_INSTALLED_AS.get(name, name) for name in modules if importlib.util.find_spec(name) is None]


def require_packages(what: str, *modules: str) -> None:
    """Make sure, before long work, that what it needs is there.

    Raises:
        MissingPackageError: one of `modules` is not installed; `what` is what needs it, the subject of the message.
    """
    if missing := missing_packages(*modules):
        raise _error(what, missing)


@contextmanager
def needed_for(what: str) -> Iterator[None]:
    """`with needed_for("digit maps"): import cv2` imports cv2, or says what needs it.

    Raises:
        MissingPackageError: in place of the ModuleNotFoundError of an import inside. A package that is installed and
            cannot be imported raises what it raises.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if not name or not missing_packages(name):
            raise
        raise _error(what, missing_packages(name)) from error


def _error(what: str, packages: list[str]) -> MissingPackageError:
    several = len(packages) > 1
    listed = ", ".join(packages)
    return MissingPackageError(
        f"{what} needs the Python package{'s' if several else ''} {listed}, which {'are' if several else 'is'} not "
        f"installed; {install_command(packages)}"
    )


def install_command(packages: list[str]) -> str:
    """What to type for `packages`, named as pip does: the smallest extra that has all of them, or they themselves.

    An extra is named only where fastjepa itself is installed: elsewhere pip would look for it on the network.
    """
    brought: set[str] = set()
    for extra, more in EXTRAS.items():
        brought |= set(more)
        if brought.issuperset(packages) and _is_installed("fastjepa"):
            return f"pip install 'fastjepa[{extra}]'"
    return f"pip install {' '.join(packages)}"


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
