"""Clips that lie on disk: a folder of shards, written piece by piece, mapped into memory and gathered batch by batch.

    index.json                counts, shapes, bytes and a checksum of each file
    video-00000.npy           uint8 (n, T, H, W), n clips of this shard
    digit_maps-00000.npy      uint8 (n, T, cells, cells), of the same clips

The index is written last: a folder without one is no set. Files are read as what they claim to be only after sizes,
dtypes and counts were held against the index; `verify` reads them through and compares checksums. While a set is open
its files must not be changed: they are mapped, and a page that is no longer there ends the process.

Legend: N clips, n clips of a shard, B batch, T frames, H×W pixels, 8×8 cells of a digit map.
"""

from __future__ import annotations

import copy
import hashlib
import signal
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastjepa.files.safe_files import write_atomic, write_text_atomic
from fastjepa.moving_mnist.cache import cache_key
from fastjepa.moving_mnist.clips import ClipSet, as_batch
from fastjepa.moving_mnist.labels import CELLS
from fastjepa.moving_mnist.shard_index import FORMAT, INDEX, VERSION, Shard, ShardFile, ShardIndex, mapped, read_index

MOST_OPEN = 64  # shards mapped at a time, two files each: a process may have 1024 files open by default
BATCHES_AHEAD = 2  # of each worker

_BLOCK = 1 << 20

Piece = tuple[Tensor | np.ndarray, Tensor | np.ndarray]


def write_shards(clips: ClipSet | Iterable[Piece], folder: Path, clips_per_shard: int = 1024) -> ShardedClips:
    """Writes clips to `folder`, one shard after another: at most two shards and a piece are in memory, never the set.

    Each file appears whole, and the index when all are there. Shards that an interrupted writing left are replaced.

    Args:
        clips: a resident set, or pieces of any length, each video (n, T, H, W) and digit maps (n, T, cells, cells),
            both uint8; `digit_maps(video)` finds those of Moving MNIST.
        folder: made if need be; it must not hold a set.
        clips_per_shard: clips of each shard but the last.

    Returns:
        The set, opened.

    Raises:
        ValueError: no clips; pieces that are not what they should be, or do not go with those before them.
        FileExistsError: `folder` holds a set.
        CheckpointError: a file could not be written; it names path and reason.
        OSError: `folder` could not be made.
    """
    if clips_per_shard < 1:
        raise ValueError(f"clips_per_shard: expected at least 1, got {clips_per_shard}")
    if (folder / INDEX).exists():
        raise FileExistsError(f"{folder / INDEX} exists: the folder holds a set of clips; choose another one")
    folder.mkdir(parents=True, exist_ok=True)
    pieces = ((clips.video, clips.digit_maps),) if isinstance(clips, ClipSet) else clips
    shards: list[Shard] = []
    clip_shape: tuple[int, ...] = ()
    for video, maps in _cut(_checked(pieces), clips_per_shard):
        clip_shape, number = video.shape[1:], len(shards)
        files = (_write(folder, f"{kind}-{number:05}.npy", a) for kind, a in (("video", video), ("digit_maps", maps)))
        shards.append(Shard(len(video), *files))
    if not shards:
        raise ValueError("clips: there are none to write")
    T, H, W = clip_shape
    write_text_atomic(folder / INDEX, ShardIndex((T, H, W), tuple(shards)).to_json())
    return ShardedClips(folder)


class ShardedClips(Dataset[tuple[Tensor, Tensor]]):
    """Clips in shards, with the interface of `ClipSet`: the same numbers, bit for bit, gathered from disk.

    It is a map-style dataset too: entry i is video (T, H, W) and digit maps (T, cells, cells) as bytes, and a list of
    entries is read in one go, so `torch.utils.data.DataLoader` takes it as it is; `prefetched` does that.

    Opening reads the index and the header of each file, no clips. Shards are mapped when they are first asked for, at
    most `MOST_OPEN` at a time. A copy in another process maps its own.

    Args:
        folder: what `write_shards` wrote.
        device: where batches go.

    Raises:
        FileNotFoundError: the index, or a file that it names, is not there.
        ValueError: a file is not what it should be; the message names it, what is there, and what is accepted.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        self.folder = folder
        self.index = read_index(folder)
        for shard in self.index.shards:
            self._map(shard)
        # Where each shard begins, and, as the last, where the set ends.
        self._starts = np.cumsum([0, *(shard.n_clips for shard in self.index.shards)])
        self._n = self.index.n_clips
        self._device = torch.device(device)
        self._open: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return self._n

    @property
    def n_frames(self) -> int:
        """T."""
        return self.index.clip_shape[0]

    @property
    def device(self) -> torch.device:
        """Where batches go; the clips are on disk."""
        return self._device

    @property
    def video(self) -> NoReturn:
        """Refuses, with the reason: see `resident`."""
        self._refuse("video")

    @property
    def digit_maps(self) -> NoReturn:
        """Refuses, with the reason: see `resident`."""
        self._refuse("digit_maps")

    def to(self, device: torch.device | str) -> ShardedClips:
        """The same clips, whose batches go to `device`."""
        moved = copy.copy(self)
        moved._device = torch.device(device)
        return moved

    def subset(self, n: int) -> ShardedClips:
        """The first `n` clips."""
        if not 1 <= n <= len(self):
            raise ValueError(f"n: expected 1 to {len(self)} clips, got {n}")
        fewer = copy.copy(self)
        fewer._n = n
        return fewer

    def batch(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Gathers clips from disk, in the order asked for, and moves them as bytes. The disk is waited for, and so is a
        GPU if `indices` are on one.

        Args:
            indices: int64 (B,), each in [0, N).
            dtype: floating dtype of both results.

        Returns:
            The video (B, 1, T, H, W) in [0, 1] and the digit location (B, T, cells, cells), 0 or 1, on the device: what
            `ClipSet.batch` returns.

        Raises:
            IndexError: an index that is not in [0, N).
        """
        video, maps = self._gather(indices.cpu().numpy(), pin=self._device.type == "cuda")
        return _moved(video, maps, self._device, dtype)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Entries in the order asked for, by which a DataLoader asks for a batch in one call."""
        return list(zip(*self._gather(np.asarray(indices, np.int64)), strict=True))

    def resident(self) -> ClipSet:
        """All clips in memory, on the device."""
        video, maps = self._gather(np.arange(len(self)))
        return ClipSet(video, maps).to(self._device)

    def fingerprint(self) -> str:
        """Hash of the clips, 32 hexadecimal digits, from the checksums of the index: the files are not read. The same
        clips in shards of another size have another one, and so has a resident set of them.
        """
        files = [(shard.n_clips, shard.video.blake2b, shard.digit_maps.blake2b) for shard in self._shards()]
        return cache_key(FORMAT, VERSION, self.index.clip_shape, len(self), files)

    def verify(self) -> None:
        """Reads all files of the set through. Raises ValueError naming the first whose checksum is not the index's."""
        for shard in self._shards():
            for file in (shard.video, shard.digit_maps):
                path = self.folder / file.file
                with path.open("rb") as stream:
                    found = _hash_of(iter(lambda: stream.read(_BLOCK), b""))
                if found != file.blake2b:
                    raise ValueError(f"{path} is damaged: its blake2b is {found}, {INDEX} says {file.blake2b}")

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array would be pickled with all it holds.
        return self.__dict__ | {"_open": OrderedDict()}

    def _shards(self) -> Sequence[Shard]:
        """Those that hold the first N clips."""
        return self.index.shards[: int(np.searchsorted(self._starts, len(self)))]

    def _gather(self, indices: np.ndarray, pin: bool = False) -> tuple[Tensor, Tensor]:
        """Bytes of clips (B,): video (B, T, H, W) and digit maps (B, T, cells, cells), in memory of their own."""
        if indices.ndim != 1 or indices.dtype != np.int64:
            raise ValueError(f"indices: expected int64 (B,), got {indices.dtype} {indices.shape}")
        if indices.size and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices: expected 0 to {len(self) - 1}, got {indices.min()} to {indices.max()}")
        T, H, W = self.index.clip_shape
        shapes = (T, H, W), (T, CELLS, CELLS)
        video, maps = (torch.empty(len(indices), *shape, dtype=torch.uint8, pin_memory=pin) for shape in shapes)
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(shard_of):
            here = np.flatnonzero(shard_of == number)
            rows = indices[here] - self._starts[number]
            for out, array in zip((video.numpy(), maps.numpy()), self._opened(int(number)), strict=True):
                for to, row in zip(here, rows, strict=True):  # one by one: no second copy of the batch
                    out[to] = array[row]
        return video, maps

    def _opened(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number not in self._open:
            self._open[number] = self._map(self.index.shards[number])
        self._open.move_to_end(number)
        while len(self._open) > MOST_OPEN:
            self._open.popitem(last=False)
        return self._open[number]

    def _map(self, shard: Shard) -> tuple[np.ndarray, np.ndarray]:
        video, maps = (
            mapped(self.folder / file.file, file.bytes, self.index.shape(kind, shard))
            for kind, file in (("video", shard.video), ("digit_maps", shard.digit_maps))
        )
        return video, maps

    def _refuse(self, name: str) -> NoReturn:
        raise AttributeError(
            f"{name}: the clips of {self.folder} are on disk; batch() gathers some of them, resident() reads them all "
            "into memory as a ClipSet"
        )


Clips = ClipSet | ShardedClips


def prefetched(
    clips: Clips, batches: Sequence[Tensor], workers: int = 2, dtype: torch.dtype = torch.float32
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """`clips.batch(indices, dtype)` for each of `batches`, in their order.

    Clips on disk are read ahead by worker processes of `torch.utils.data.DataLoader`, for a GPU into pinned memory;
    resident clips are gathered where they are.

    Args:
        clips: resident or in shards.
        batches: int64 (B,) each, on any device.
        workers: processes that read, each up to `BATCHES_AHEAD` batches ahead; 0 reads in this one, when asked.
        dtype: floating dtype of what is yielded.

    Yields:
        The video (B, 1, T, H, W) and the digit location (B, T, cells, cells), on the set's device.

    Raises:
        ValueError: `workers` < 0.
        IndexError: an index that is not in [0, N).
    """
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers}")
    if isinstance(clips, ClipSet):
        for indices in batches:
            yield clips.batch(indices, dtype)
        return
    loader = DataLoader(
        clips, batch_sampler=[indices.tolist() for indices in batches], num_workers=workers,
        prefetch_factor=BATCHES_AHEAD if workers else None, pin_memory=clips.device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_run,
        generator=torch.Generator(),  # a loader draws a number even if it shuffles nothing: not from the run's
    )  # fmt: skip
    for video, maps in loader:
        yield _moved(video, maps, clips.device, dtype)


def _leave_signals_to_the_run(_worker: int) -> None:
    """In a worker process: a signal to all processes of a run is one process's to answer, which ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _moved(video: Tensor, maps: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Bytes in memory as a batch on `device`; moved as bytes, which are the least."""
    return as_batch(video.to(device, non_blocking=True), maps.to(device, non_blocking=True), dtype)


def _checked(pieces: Iterable[Piece]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces as arrays on the CPU; ValueError for one that is not a piece, or of other clips than the first."""
    first: tuple[int, ...] | None = None
    for number, (given_video, given_maps) in enumerate(pieces):
        video, maps = (a.cpu().numpy() if isinstance(a, Tensor) else a for a in (given_video, given_maps))
        first = video.shape[1:] if first is None else first
        wanted = (len(video), *first), (len(video), *first[:1], CELLS, CELLS)
        for name, array, shape in zip(("video", "digit maps"), (video, maps), wanted, strict=True):
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape != shape:
                found = f"{array.dtype} {array.shape}"
                raise ValueError(f"clips: {name} of piece {number} are {found}, expected uint8 {shape}, 4-D")
        yield video, maps


def _cut(
    pieces: Iterable[tuple[np.ndarray, np.ndarray]], clips_per_shard: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same clips in pieces of `clips_per_shard`, the last one may be smaller."""
    kept: list[tuple[np.ndarray, np.ndarray]] = []

    def joined() -> tuple[np.ndarray, np.ndarray]:
        video, maps = (np.concatenate(parts) if len(kept) > 1 else parts[0] for parts in zip(*kept, strict=True))
        return video, maps

    missing = clips_per_shard
    for video, maps in pieces:
        while len(video):
            kept.append((video[:missing], maps[:missing]))
            video, maps = video[missing:], maps[missing:]
            missing = clips_per_shard - sum(len(part) for part, _ in kept)
            if missing == 0:
                yield joined()
                kept, missing = [], clips_per_shard
    if kept:
        yield joined()


def _write(folder: Path, name: str, array: np.ndarray) -> ShardFile:
    written = _Hashed()

    def write(file: BinaryIO) -> None:
        written.file = file
        np.lib.format.write_array(written, np.ascontiguousarray(array), allow_pickle=False)

    write_atomic(folder / name, write)
    return ShardFile(name, written.bytes, written.digest.hexdigest())


class _Hashed:
    """What is written to `file` goes through a hash: a file need not be read again for its checksum."""

    file: BinaryIO

    def __init__(self) -> None:
        self.digest = hashlib.blake2b(digest_size=16)
        self.bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def _hash_of(blocks: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()
