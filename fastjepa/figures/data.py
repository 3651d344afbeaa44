"""What the pictures are drawn from: the files of a run folder, checked as they are read.

Legend: n clips, T frames, H×W pixels, rows×columns cells of a digit map.
"""

from __future__ import annotations

import csv
import json
import math
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastjepa.model.context import CONTEXT

_MAX_ROLLOUT_BYTES = 2**30  # a few clips are some MB; an npz that unpacks to more than this is damaged or hostile
_MAX_TEXT_BYTES = 2**26


@dataclass(frozen=True, eq=False)
class RolloutArrays:
    """What a model predicted for a few validation clips; all arrays real and finite.

    Attributes:
        video: (n, T, H, W) float, the clips, in [0, 1].
        one_step: (n, T−2, H, W) float, decoded predictions of frames 2.. from the two true frames before each.
        rollout: (n, T−2, H, W) float, decoded predictions of frames 2.. from frames 0 and 1 only.
        detections: (n, T−2, rows, columns) float in [0, 1], digit probabilities of the cells over the rollout.
        digit_maps: (n, T, rows, columns), not zero in the cells that hold a digit's centre.
    """

    video: np.ndarray
    one_step: np.ndarray
    rollout: np.ndarray
    detections: np.ndarray
    digit_maps: np.ndarray

    def __post_init__(self) -> None:
        for field in fields(self):
            array = getattr(self, field.name)
            if not isinstance(array, np.ndarray) or array.dtype.kind not in (
                "fbui" if field.name == "digit_maps" else "f"
            ):
                kind = "numbers" if field.name == "digit_maps" else "floating-point numbers"
                raise ValueError(
                    f"{field.name}: expected an array of {kind}, got {getattr(array, 'dtype', type(array))}"
                )
            if array.ndim != 4 or array.size == 0:
                raise ValueError(f"{field.name}: expected 4 dimensions, none of size 0, got shape {array.shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"{field.name}: holds values that are not finite")
        n, T, H, W = self.video.shape
        cells = self.digit_maps.shape[2:]
        if T <= CONTEXT:
            raise ValueError(f"video: expected at least {CONTEXT + 1} frames, got {T}")
        expected = {
            "one_step": (n, T - CONTEXT, H, W),
            "rollout": (n, T - CONTEXT, H, W),
            "detections": (n, T - CONTEXT, *cells),
            "digit_maps": (n, T, *cells),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                given = getattr(self, name).shape
                raise ValueError(f"{name}: expected shape {shape} to go with video {self.video.shape}, got {given}")
        for name in ("video", "detections"):
            low, high = float(getattr(self, name).min()), float(getattr(self, name).max())
            if low < 0 or high > 1:
                raise ValueError(f"{name}: expected values in [0, 1], got {low:g} to {high:g}")


def read_rollout(path: Path) -> RolloutArrays:
    """Reads rollout.npz.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a readable npz of plain numbers with the arrays of `RolloutArrays`.
    """
    path = _existing(path, "rollout file")
    names = [field.name for field in fields(RolloutArrays)]
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > _MAX_ROLLOUT_BYTES:
            raise ValueError(f"it unpacks to {unpacked} bytes, more than the {_MAX_ROLLOUT_BYTES} accepted")
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)}; it holds {', '.join(archive.files) or 'nothing'}")
            return RolloutArrays(**{name: archive[name] for name in names})
    except OSError:
        raise
    except Exception as error:  # damaged zip and npy headers raise many types, and all mean the same here
        raise ValueError(f"{path} is not a usable rollout file: {error}") from error


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Reads metrics.csv: column name → float64 (epochs,); an empty cell is NaN.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no `epoch` column, no rows, or a row that does not fit the header; the row is named.
    """
    path = _existing(path, "metrics file")
    try:
        header, *rows = list(csv.reader(_read_text(path).splitlines())) or [[]]
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file: {error}") from error
    if "epoch" not in header or len(set(header)) != len(header):
        raise ValueError(
            f"{path}: expected a header of different names with `epoch` in it, got {','.join(header)[:200]!r}"
        )
    if not rows:
        raise ValueError(f"{path}: holds no epoch yet, only its header")
    values = np.empty((len(rows), len(header)))
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"{path}: line {i + 2} has {len(row)} of {len(header)} values")
        for j, cell in enumerate(row):
            try:
                values[i, j] = float(cell) if cell.strip() else math.nan
            except ValueError:
                raise ValueError(f"{path}: line {i + 2}, column {header[j]}: {cell[:40]!r} is not a number") from None
    return {name: values[:, j] for j, name in enumerate(header)}


def read_config(path: Path) -> dict[str, Any]:
    """Reads config.json: the settings of the run, by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold a JSON object.
    """
    text = _read_text(_existing(path, "config file"))
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(config).__name__}")
    return config


def _read_text(path: Path) -> str:
    size = path.stat().st_size
    if size > _MAX_TEXT_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than the {_MAX_TEXT_BYTES} accepted")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from error


def _existing(path: Path, what: str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path} does not exist")
    return path
