"""The training and validation clips, resident on one device, and the order in which they are visited.

Legend: N clips, B batch, T frames, H×W pixels, 8×8 cells of a digit map.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastjepa.moving_mnist.cache import cache_key, cached_array, fingerprint
from fastjepa.moving_mnist.digits import (
    DIGIT_SIZE,
    EMBEDDED_TRAIN,
    EMBEDDED_VALIDATION,
    EMBEDDED_VERSION,
    embedded_digits,
    read_idx_images,
    split_digits,
)
from fastjepa.moving_mnist.generator import GENERATOR_VERSION, check_sizes, generate_clips
from fastjepa.moving_mnist.labels import CELLS, DIGIT_MAP_VERSION, digit_maps
from fastjepa.moving_mnist.official import MNIST_TEST_SEQ, SequenceFile, load_official

if TYPE_CHECKING:
    from fastjepa.moving_mnist.shards import Clips, ShardedClips

logger = logging.getLogger(__name__)

DataSource = Literal["embedded", "idx", "official", "shards"]


@dataclass(frozen=True, eq=False)
class ClipSet:
    """Clips and their digit maps on one device, as bytes: a full training set is 737 MB of `video`.

    Attributes:
        video: uint8 (N, T, H, W).
        digit_maps: uint8 (N, T, cells, cells), 0 or 1.
    """

    video: Tensor
    digit_maps: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("video", self.video), ("digit_maps", self.digit_maps)):
            if tensor.dtype != torch.uint8 or tensor.ndim != 4:
                raise ValueError(f"{name}: expected 4-D uint8, got {tensor.dtype} {tuple(tensor.shape)}")
        if self.video.shape[:2] != self.digit_maps.shape[:2]:
            raise ValueError(
                "digit_maps: expected the clips and frames of video, "
                f"{tuple(self.video.shape[:2])}, got {tuple(self.digit_maps.shape[:2])}"
            )
        if self.video.device != self.digit_maps.device:
            raise ValueError(f"digit_maps: on {self.digit_maps.device}, video is on {self.video.device}")

    def __len__(self) -> int:
        return len(self.video)

    @property
    def device(self) -> torch.device:
        """Where the clips are."""
        return self.video.device

    @property
    def n_frames(self) -> int:
        """T."""
        return self.video.shape[1]

    def to(self, device: torch.device | str) -> "ClipSet":
        """The same clips on `device`."""
        return ClipSet(self.video.to(device), self.digit_maps.to(device))

    def subset(self, n: int) -> "ClipSet":
        """The first `n` clips, sharing memory with this set."""
        if not 1 <= n <= len(self):
            raise ValueError(f"n: expected 1 to {len(self)} clips, got {n}")
        return ClipSet(self.video[:n], self.digit_maps[:n])

    def batch(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Gathers clips on the device, without waiting for it: it can be part of a CUDA graph.

        Args:
            indices: int64 (B,) on this set's device, each in [0, N); not checked on a GPU, that would be a wait.
            dtype: floating dtype of both results.

        Returns:
            The video (B, 1, T, H, W) in [0, 1], each byte divided by 255 and rounded once, and the digit
            location (B, T, cells, cells), 0 or 1.
        """
        return as_batch(self.video.index_select(0, indices), self.digit_maps.index_select(0, indices), dtype)

    def fingerprint(self) -> str:
        """Hash of the video, 32 hexadecimal digits, by which a run knows its clips again; reads all of it."""
        return fingerprint(self.video.cpu().numpy())


def as_batch(video: Tensor, digit_maps: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Bytes as a training step takes them, on their device.

    Args:
        video: uint8 (B, T, H, W).
        digit_maps: uint8 (B, T, cells, cells), 0 or 1.
        dtype: floating dtype of both results.

    Returns:
        The video (B, 1, T, H, W) in [0, 1], each byte divided by 255 and rounded once, and the digit maps in `dtype`.
    """
    # A tensor and not the number 255: CUDA would multiply by the rounded reciprocal of a number.
    white = torch.full((), 255, dtype=dtype, device=video.device)
    return video.unsqueeze(1).to(dtype).div_(white), digit_maps.to(dtype)


def epoch_indices(n: int, batch_size: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """The batches of one training epoch: int64 index tensors on `device`, a permutation of range(n) in all.

    The last batch may be smaller. Deterministic in (seed, epoch) and the same on all devices: shuffled on the CPU,
    moved once.

    Raises:
        ValueError: `n` or `batch_size` below 1, `seed` or `epoch` below 0.
    """
    _check_batching(n, batch_size)
    for name, value in (("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise ValueError(f"{name}: expected 0 or more, got {value}")
    # SeedSequence mixes the pair: seed + epoch would repeat the order of (seed + 1, epoch − 1).
    mixed = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(int(mixed[0])))
    return list(order.to(device).split(batch_size))


def sequential_batches(n: int, batch_size: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """The batches of an evaluation: range(n) in order as int64 index tensors, the last one may be smaller."""
    _check_batching(n, batch_size)
    return list(torch.arange(n, device=device).split(batch_size))


def load_clips(
    data: DataSource = "embedded",
    *,
    digits: Path | None = None,
    data_path: Path | None = None,
    cache_dir: Path,
    n_train: int,
    n_val: int,
    n_frames: int = 10,
    canvas: int = 64,
    digit_size: int = 28,
    seed: int,
    official_file: SequenceFile = MNIST_TEST_SEQ,
) -> "tuple[Clips, Clips]":
    """Training and validation clips with their digit maps, on the CPU, cached in `cache_dir`; shards stay on disk.

    Args:
        data: "embedded" generates clips from scikit-learn's digits, "idx" from the images in `digits`, which giving
            `digits` is enough to ask for; "official" reads the published file, and "shards" the folders that
            `write_shards` wrote.
        digits: MNIST idx image file.
        data_path: the official file, where None looks in `cache_dir` and downloads it there; or the folder of the
            shards, in which `train` and `validation` are.
        cache_dir: folder for generated clips, digit maps and the download.
        n_train: clips for training; at most 18,000 of the official set, and at most what the shards have.
        n_val: clips for validation; at most 2,000 of the official set, and at most what the shards have.
        n_frames: frames of a clip; 10 in the official set.
        canvas: side of a frame in pixels; 64 in the official set.
        digit_size: side of a digit's box in pixels; the official file and shards have what they have and ignore this.
        seed: of the generated clips and of the split of `digits`. The official split is fixed.
        official_file: what the official file must be.

    Raises:
        ValueError: options that contradict each other or the data, or a file that is not what it should be.
        FileNotFoundError: `digits` or `data_path` is not a file, or there are no shards in it.
        OSError: `cache_dir` cannot be written.
        MissingPackageError: OpenCV or scikit-learn is not installed, and what it would make is not in the cache.
    """
    _check_source(data, digits, data_path)
    for name, value in (("n_train", n_train), ("n_val", n_val)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1 clip, got {value}")

    if data == "official":
        # Sizes first: they cost nothing, while reading the file takes seconds and downloading it minutes.
        _check_official_sizes(official_file, n_train, n_val, n_frames, canvas)
        train, validation = load_official(data_path, cache_dir, official_file)
        train, validation = train[:n_train], validation[:n_val]
        return (
            _with_digit_maps(train, fingerprint(train), cache_dir),
            _with_digit_maps(validation, fingerprint(validation), cache_dir),
        )

    if data == "shards":
        assert data_path is not None  # as _check_source has found
        return (
            _shards(data_path / "train", "n_train", n_train, n_frames, canvas),
            _shards(data_path / "validation", "n_val", n_val, n_frames, canvas),
        )

    check_sizes(canvas, digit_size, n_frames=n_frames)  # before anything is written
    if digits is None:
        train_digits, validation_digits = _embedded_digits(cache_dir)
    else:
        train_digits, validation_digits = split_digits(read_idx_images(digits), seed)
    sizes = {"n_frames": n_frames, "canvas": canvas, "digit_size": digit_size}
    # The two sets draw from independent random streams as well as from different digits.
    return (
        _generated(train_digits, n_train, sizes, (seed, 0), cache_dir),
        _generated(validation_digits, n_val, sizes, (seed, 1), cache_dir),
    )


def _embedded_digits(cache_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """`embedded_digits()` by way of the cache: the second run waits for neither scikit-learn nor OpenCV, and needs
    neither of them.
    """
    shape = (EMBEDDED_TRAIN + EMBEDDED_VALIDATION, DIGIT_SIZE, DIGIT_SIZE)
    key = cache_key("embedded", EMBEDDED_VERSION)
    images, _ = cached_array(cache_dir, "digits", key, shape, lambda: np.concatenate(embedded_digits()))
    return images[:EMBEDDED_TRAIN], images[EMBEDDED_TRAIN:]


def _generated(
    digits: np.ndarray, n_clips: int, sizes: dict[str, int], seed: tuple[int, int], cache_dir: Path
) -> ClipSet:
    def make() -> np.ndarray:
        logger.info("generating %d Moving MNIST clips from %d digits", n_clips, len(digits))
        return generate_clips(digits, n_clips, seed=seed, **sizes)

    shape = (n_clips, sizes["n_frames"], sizes["canvas"], sizes["canvas"])
    key = cache_key(GENERATOR_VERSION, fingerprint(digits), n_clips, sorted(sizes.items()), seed)
    video, content = cached_array(cache_dir, "clips", key, shape, make)
    return _with_digit_maps(video, content, cache_dir)


def _with_digit_maps(video: np.ndarray, content: str, cache_dir: Path) -> ClipSet:
    """Adds the digit maps to clips whose fingerprint is `content`."""

    def make() -> np.ndarray:
        logger.info("finding the digits in %d frames", video.shape[0] * video.shape[1])
        return digit_maps(video)

    key = cache_key(DIGIT_MAP_VERSION, CELLS, content)
    maps, _ = cached_array(cache_dir, "digit_maps", key, (*video.shape[:2], CELLS, CELLS), make)
    return ClipSet(torch.from_numpy(video), torch.from_numpy(maps))


def _shards(folder: Path, name: str, n_clips: int, n_frames: int, canvas: int) -> "ShardedClips":
    """The first `n_clips` in the shards of `folder`, whose number the option `name` asks for."""
    from fastjepa.moving_mnist.shards import ShardedClips  # which imports this module

    clips = ShardedClips(folder)
    T, H, W = clips.index.clip_shape
    if n_frames != T:
        raise ValueError(f"n_frames: the clips in {folder} have {T}, got {n_frames}")
    if (canvas, canvas) != (H, W):
        raise ValueError(f"canvas: the frames in {folder} are {H}x{W}, got {canvas}")
    if n_clips > len(clips):
        raise ValueError(f"{name}: {folder} has {len(clips)} clips, got {n_clips}")
    return clips.subset(n_clips)


def _check_source(data: str, digits: Path | None, data_path: Path | None) -> None:
    if data not in get_args(DataSource):
        raise ValueError(f"data: expected one of {', '.join(get_args(DataSource))}, got {data!r}")
    if data == "idx" and digits is None:
        raise ValueError("digits: data 'idx' needs the path of an MNIST idx image file")
    if data in ("official", "shards") and digits is not None:
        raise ValueError(f"digits: {digits} has no use with data {data!r}, which brings its own digits")
    if data == "shards" and data_path is None:
        raise ValueError("data_path: data 'shards' needs the folder in which train and validation are")
    if data not in ("official", "shards") and data_path is not None:
        raise ValueError(f"data_path: {data_path} has no use with data {data!r}, only with 'official' and 'shards'")


def _check_official_sizes(file: SequenceFile, n_train: int, n_val: int, n_frames: int, canvas: int) -> None:
    for name, wanted, there in (("n_frames", n_frames, file.n_frames // 2), ("canvas", canvas, file.size)):
        if wanted != there:
            raise ValueError(f"{name}: data 'official' has {there}, got {wanted}")
    most_train, most_val = 2 * (file.n_sequences - file.n_validation), 2 * file.n_validation
    for name, wanted, most in (("n_train", n_train, most_train), ("n_val", n_val, most_val)):
        if wanted > most:
            raise ValueError(f"{name}: data 'official' has {most} clips, got {wanted}")


def _check_batching(n: int, batch_size: int) -> None:
    for name, value in (("n", n), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
