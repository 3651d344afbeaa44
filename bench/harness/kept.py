"""What is computed once for a case and kept on disk: the float64 truth, and the errors of eager that are the measure.

A case's variants may be measured by several processes, one after another (`bench.prove`): the truth, which can take as
long as all else, is not computed again by each.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch

from bench.harness.variants import Tensors
from fastjepa.environment import ROOT
from fastjepa.files.safe_files import CheckpointError, write_atomic
from fastjepa.policy import Error

_MOST_BYTES = 512 * 1024 * 1024

PhaseErrors = dict[str, dict[str, Error]]  # phase → tensor → its error


class Kept:
    """Tensors and errors by name, in a folder; None instead of a folder keeps them nowhere.

    Names are made specific to the code, so that what other code has computed is never taken: see `source_digest`.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def tensors(self, name: str, device: torch.device) -> Tensors | None:
        """The tensors kept under that name, on `device`, or None if there are none that can be read."""
        found = self._load(name, device)
        if not isinstance(found, dict) or not all(isinstance(x, torch.Tensor) for x in found.values()):
            return None
        return found

    def keep_tensors(self, name: str, tensors: Tensors) -> None:
        """Keep them, unless they are so large that computing them again is as fast as reading them."""
        if sum(x.nbytes for x in tensors.values()) <= _MOST_BYTES:
            self._save(name, tensors)

    def errors(self, name: str) -> PhaseErrors | None:
        """The errors kept under that name, or None."""
        found = self._load(name, torch.device("cpu"))
        if not isinstance(found, dict):
            return None
        try:
            return {
                phase: {tensor: Error(float(relative), dtype) for tensor, (relative, dtype) in errors.items()}
                for phase, errors in found.items()
            }
        except (AttributeError, TypeError, ValueError):
            return None

    def keep_errors(self, name: str, errors: PhaseErrors) -> None:
        """Keep them."""
        plain = {
            phase: {tensor: (error.relative, error.dtype) for tensor, error in found.items()}
            for phase, found in errors.items()
        }
        self._save(name, plain)

    def _path(self, name: str) -> Path | None:
        digest = hashlib.sha256(f"{name} {source_digest()} torch {torch.__version__}".encode()).hexdigest()
        return None if self.folder is None else self.folder / f"{digest[:32]}.pt"

    def _load(self, name: str, device: torch.device) -> Any:
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
            return None  # torn or not ours: it is computed again

    def _save(self, name: str, value: Any) -> None:
        path = self._path(name)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(CheckpointError):  # no room on disk: it is computed again
            write_atomic(path, lambda file: torch.save(value, file))


@functools.cache
def source_digest() -> str:
    """A digest of all of this project's code: results of other code are other results."""
    digest = hashlib.sha256()
    for folder in ("bench", "fastjepa", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
