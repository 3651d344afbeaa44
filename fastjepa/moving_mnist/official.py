"""The official Moving MNIST file, `mnist_test_seq.npy`: check it, download it, split it as Video JEPA does."""

import contextlib
import hashlib
import http.client
import logging
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastjepa.files.safe_files import atomic_file
from fastjepa.moving_mnist.cache import open_npy, writing_to
from fastjepa.optional_packages import missing_packages

logger = logging.getLogger(__name__)

_SPLIT_SEED = 2025  # of the published split
_BLOCK = 1 << 20
_TIMEOUT_S = 30  # without a single byte, not for the whole file


@dataclass(frozen=True)
class SequenceFile:
    """What is known of a file of sequences. Tests describe small stand-ins for the official one with it."""

    url: str
    md5: str | None  # None: a stand-in, whose content is not checked
    n_frames: int
    n_sequences: int
    size: int  # side of a frame in pixels
    n_validation: int  # sequences

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(time, sequence, H, W), the order in the file."""
        return (self.n_frames, self.n_sequences, self.size, self.size)

    @property
    def name(self) -> str:
        """File name."""
        return self.url.rpartition("/")[2]


MNIST_TEST_SEQ = SequenceFile(
    url="https://www.cs.toronto.edu/~nitish/unsupervised_video/mnist_test_seq.npy",
    md5="be083ec986bfe91a449d63653c411eb2",
    n_frames=20,
    n_sequences=10_000,
    size=64,
    n_validation=1_000,
)


class DownloadError(RuntimeError):
    """The official file could not be fetched; the message says how to fetch it by hand."""


def load_official(
    path: Path | None, cache_dir: Path, file: SequenceFile = MNIST_TEST_SEQ
) -> tuple[np.ndarray, np.ndarray]:
    """Train and validation clips of the official set, uint8 (18000, 10, 64, 64) and (2000, 10, 64, 64).

    Sequences are permuted with numpy's RandomState(2025); the first 1,000 are for validation. Each 20-frame sequence
    becomes two neighbouring clips, its first and its second half.

    Args:
        path: the file; None takes it from `cache_dir` and downloads it there when it is missing.
        cache_dir: folder of downloads.
        file: what to expect.

    Raises:
        FileNotFoundError: `path` is given and is not a file.
        ValueError: the file is not the one described: md5, shape, dtype, truncated, or pickled objects.
        DownloadError: the download failed or brought something else.
        OSError: `cache_dir` cannot be written.
    """
    if path is None:
        path = cache_dir / file.name
        if not path.is_file():
            download(file, path)
    elif not path.is_file():
        raise FileNotFoundError(f"data_path: there is no file {path}; expected {file.name}, from {file.url}")
    try:
        sequences = open_npy(path)
        _check(sequences, path, file)
    except ValueError as error:
        raise ValueError(f"{path} is not {file.name} as published: {error}. {_by_hand(file, path)}") from error

    order = np.random.RandomState(_SPLIT_SEED).permutation(file.n_sequences)
    return _clips(sequences, order[file.n_validation :]), _clips(sequences, order[: file.n_validation])


def download(file: SequenceFile, target: Path) -> None:
    """Downloads `file` to `target`, with a progress bar where tqdm is. `target` appears only when its md5 is right.

    Raises:
        DownloadError: no connection, an incomplete answer, or another content.
        OSError: the folder of `target` cannot be written.
    """
    logger.info("downloading %s to %s", file.url, target)
    md5 = hashlib.md5(usedforsecurity=False)
    with writing_to(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as output:
            for block in _fetch(file, target):
                md5.update(block)
                output.write(block)
            if file.md5 is not None and md5.hexdigest() != file.md5:
                raise DownloadError(
                    f"{file.url} gave a file with md5 {md5.hexdigest()}, expected {file.md5}. {_by_hand(file, target)}"
                )


def _fetch(file: SequenceFile, target: Path) -> Iterator[bytes]:
    """The blocks of a download. Network errors become DownloadErrors, so that they are not taken for disk errors."""
    # The header of a .npy file of plain numbers is 128 bytes or less; a longer answer is something else.
    most = int(np.prod(file.shape)) + 128
    received = 0
    try:
        with urllib.request.urlopen(file.url, timeout=_TIMEOUT_S) as response:
            announced = response.headers.get("Content-Length")
            total = int(announced) if announced is not None else None
            with _progress_bar(file.name, total) as progress:
                while block := response.read(_BLOCK):
                    received += len(block)
                    if received > most:
                        raise ValueError(f"the answer is longer than the file, {most} bytes")
                    if progress is not None:
                        progress.update(len(block))
                    yield block
            if total is not None and received != total:
                raise ValueError(f"the connection ended after {received} of {total} bytes")
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        raise DownloadError(f"could not download {file.url}: {error}. {_by_hand(file, target)}") from error


def _progress_bar(title: str, total: int | None) -> contextlib.AbstractContextManager[Any]:
    """A bar of bytes on stderr; None where tqdm is not installed."""
    if missing_packages("tqdm"):
        return contextlib.nullcontext()
    from tqdm import tqdm

    return tqdm(total=total, unit="B", unit_scale=True, desc=title)


def _by_hand(file: SequenceFile, target: Path) -> str:
    return (
        f"Download {file.name} from {file.url} (md5 {file.md5}) by other means and put it at {target}, "
        "or name its place with --data_path"
    )


def _check(sequences: np.ndarray, path: Path, file: SequenceFile) -> None:
    """ValueError unless shape, dtype and md5 are those of `file`."""
    if sequences.shape != file.shape or sequences.dtype != np.uint8:
        raise ValueError(f"it holds {sequences.dtype} {sequences.shape}, expected uint8 {file.shape}")
    if file.md5 is None:
        return
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            md5.update(block)
    if md5.hexdigest() != file.md5:
        raise ValueError(f"its md5 is {md5.hexdigest()}, expected {file.md5}")


def _clips(sequences: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Sequences (T, n, H, W) chosen by index, as clips of half the length (2·len(chosen), T/2, H, W)."""
    n_frames, _, H, W = sequences.shape
    clips = np.empty((len(chosen), n_frames, H, W), np.uint8)
    for t in range(n_frames):  # one frame number at a time: the order of the file, and no second copy of the set
        clips[:, t] = sequences[t][chosen]
    return clips.reshape(2 * len(chosen), n_frames // 2, H, W)
