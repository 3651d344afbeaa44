"""The index of a set of clips on disk, `index.json`, and its files held against it: nothing read here is trusted."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastjepa.files.tensor_files import shown
from fastjepa.moving_mnist.cache import open_npy
from fastjepa.moving_mnist.labels import CELLS

INDEX = "index.json"
FORMAT = "fastjepa clips"
VERSION = 1

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.npy")  # no separator, and no way up


@dataclass(frozen=True)
class ShardFile:
    """One file as the index knows it; `blake2b` is the 128-bit hash of all its bytes, 32 hexadecimal digits."""

    file: str
    bytes: int
    blake2b: str


@dataclass(frozen=True)
class Shard:
    """Two files, of the same clips."""

    n_clips: int
    video: ShardFile
    digit_maps: ShardFile


@dataclass(frozen=True)
class ShardIndex:
    """What `index.json` says."""

    clip_shape: tuple[int, int, int]  # (T, H, W)
    shards: tuple[Shard, ...]

    @property
    def n_clips(self) -> int:
        """N, of all shards."""
        return sum(shard.n_clips for shard in self.shards)

    def shape(self, kind: str, shard: Shard) -> tuple[int, ...]:
        """What the array of a shard must be: `kind` is "video" or "digit_maps"."""
        T, H, W = self.clip_shape
        return (shard.n_clips, T, H, W) if kind == "video" else (shard.n_clips, T, CELLS, CELLS)

    def to_json(self) -> str:
        """The text of the file."""
        head = {"format": FORMAT, "version": VERSION, "dtype": "uint8"}
        sizes = {"n_clips": self.n_clips, "clip_shape": self.clip_shape, "cells": CELLS}
        return json.dumps(head | sizes | {"shards": [asdict(shard) for shard in self.shards]}, indent=1) + "\n"


def read_index(folder: Path) -> ShardIndex:
    """What `index.json` of `folder` says; every name in it is that of a file in the folder itself.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not an index of this version; the message names the file and the entry.
    """
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; expected a folder that write_shards wrote")
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:  # JSON that is none, or text that is not UTF-8, among them
        raise ValueError(f"{path} is not an index of clips: {error}") from error


def _parsed(values: Any) -> ShardIndex:
    fixed = {"format": FORMAT, "version": VERSION, "dtype": "uint8", "cells": CELLS}
    for name, wanted in fixed.items():
        found = _entry(values, name, type(wanted))
        if found != wanted:
            raise ValueError(f"{name} is {shown(found)}, accepted: {wanted!r}")
    shape = _entry(values, "clip_shape", list)
    if len(shape) != 3 or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError("clip_shape is not [T, H, W], three numbers of at least 1")
    entries = _entry(values, "shards", list)
    shards = tuple(
        Shard(
            _positive(entry, "n_clips"),
            *(_file(_entry(entry, kind, dict)) for kind in ("video", "digit_maps")),
        )
        for entry in entries
    )
    names = [file.file for shard in shards for file in (shard.video, shard.digit_maps)]
    if not shards or len(set(names)) != len(names):
        raise ValueError("shards is empty, or names a file twice")
    index = ShardIndex((shape[0], shape[1], shape[2]), shards)
    if (given := _positive(values, "n_clips")) != index.n_clips:
        raise ValueError(f"n_clips is {given}, its shards have {index.n_clips}")
    return index


def _file(values: dict[str, Any]) -> ShardFile:
    name, checksum = _entry(values, "file", str), _entry(values, "blake2b", str)
    if not _PLAIN_NAME.fullmatch(name):
        raise ValueError(f"file is {shown(name)}, accepted: the plain name of a .npy file in the folder itself")
    if not re.fullmatch(r"[0-9a-f]{32}", checksum):
        raise ValueError(f"blake2b of {name} is {shown(checksum)}, accepted: 32 hexadecimal digits")
    return ShardFile(name, _positive(values, "bytes"), checksum)


def _entry(values: Any, name: str, kind: type) -> Any:
    if not isinstance(values, dict) or type(values.get(name)) is not kind:
        found = shown(values.get(name)) if isinstance(values, dict) else f"part of {shown(values)}"
        raise ValueError(f"{name} is {found}, expected {kind.__name__}")
    return values[name]


def _positive(values: Any, name: str) -> int:
    value: int = _entry(values, name, int)
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")
    return value


def mapped(path: Path, n_bytes: int, shape: tuple[int, ...]) -> np.ndarray:
    """The array of a file, mapped. FileNotFoundError or ValueError unless it is what the index says."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}, which {INDEX} beside it names")
    if (size := path.stat().st_size) != n_bytes:
        raise ValueError(f"{path} has {size} bytes, {INDEX} says {n_bytes}: it is truncated, or another file")
    try:
        array = open_npy(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if array.dtype != np.uint8 or array.shape != shape or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else " in Fortran order"
        raise ValueError(f"{path} holds {array.dtype} {array.shape}{order}, accepted: uint8 {shape}, as {INDEX} says")
    return array
