"""Digit images that the generator bounces around: scikit-learn's bundled digits, or any MNIST idx file.

Every source gives uint8 images of shape (N, 28, 28), white on black, laid out as MNIST is: about 20 pixels of
stroke centred in a 28×28 box.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from fastjepa.optional_packages import needed_for

DIGIT_SIZE = 28
_STROKE_SIZE = 20  # MNIST normalises a digit to 20×20 before it is centred in its 28×28 box

EMBEDDED_TRAIN, EMBEDDED_VALIDATION = 1500, 297  # images
EMBEDDED_VERSION = 1  # part of the cache key: raise it when the same scans would give other pixels

_GZIP_MAGIC = b"\x1f\x8b"
_IDX3_UINT8_MAGIC = 0x0000_0803  # two zero bytes, type 8 = unsigned byte, 3 dimensions
_IDX3_HEADER = struct.Struct(">4I")  # magic, images, rows, columns
# EMNIST, the largest set in this format, has 814,255 images. The limit keeps a small .gz from filling the memory.
_MAX_IMAGES = 1_000_000


def embedded_digits() -> tuple[np.ndarray, np.ndarray]:
    """Train and validation digits that need no file: uint8 (1500, 28, 28) and (297, 28, 28).

    They are scikit-learn's 8×8 handwritten digits (UCI optdigits) enlarged to MNIST's layout. The split is fixed, and
    is a cut of the file instead of a shuffle: neighbours in the file look alike, so its tail is the stricter test.

    Raises:
        MissingPackageError: scikit-learn or OpenCV is not installed.
    """
    with needed_for("making the embedded digits"):
        import cv2
        from sklearn.datasets import load_digits
    small = load_digits().images  # (1797, 8, 8) float64, 0..16
    small = np.round(small * (255 / 16)).astype(np.uint8)
    margin = (DIGIT_SIZE - _STROKE_SIZE) // 2
    inside = slice(margin, margin + _STROKE_SIZE)
    images = np.zeros((len(small), DIGIT_SIZE, DIGIT_SIZE), np.uint8)
    for image, source in zip(images, small, strict=True):
        # Cubic, because linear leaves the strokes grey and blurred at this magnification.
        image[inside, inside] = cv2.resize(source, (_STROKE_SIZE, _STROKE_SIZE), interpolation=cv2.INTER_CUBIC)
    return images[:EMBEDDED_TRAIN], images[EMBEDDED_TRAIN:]


def read_idx_images(path: str | Path) -> np.ndarray:
    """Reads an MNIST image file (idx3-ubyte, gzipped or not; told apart by content), uint8 (N, 28, 28).

    Raises:
        FileNotFoundError: `path` is not a file.
        ValueError: the content is not exactly one idx3-ubyte file of 28×28 images: damaged gzip data, another magic
            number or image size, no images, too many images, or more or fewer bytes than the header announces.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"digits: there is no file {path}; expected an MNIST idx3-ubyte image file, .gz or not")
    with path.open("rb") as file:
        gzipped = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    try:
        with gzip.open(path, "rb") if gzipped else path.open("rb") as stream:
            header = stream.read(_IDX3_HEADER.size)
            n_images = _check_idx_header(header, path)
            n_bytes = n_images * DIGIT_SIZE * DIGIT_SIZE
            pixels = stream.read(n_bytes + 1)  # one more, to notice trailing bytes
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"digits: {path} is a damaged or truncated gzip file: {error}") from error
    if len(pixels) != n_bytes:
        found = f"only {len(pixels)}" if len(pixels) < n_bytes else "more"
        raise ValueError(
            f"digits: {path} announces {n_images} images, which is {n_bytes} bytes of pixels, and holds {found}"
        )
    return np.frombuffer(pixels, np.uint8).reshape(n_images, DIGIT_SIZE, DIGIT_SIZE)


def _check_idx_header(header: bytes, path: Path) -> int:
    """The number of images that an idx3-ubyte header announces; ValueError if this package cannot use them."""
    if len(header) < _IDX3_HEADER.size:
        raise ValueError(f"digits: {path} ends within its {_IDX3_HEADER.size}-byte idx3 header")
    magic, n_images, rows, columns = _IDX3_HEADER.unpack(header)
    if magic != _IDX3_UINT8_MAGIC:
        raise ValueError(
            f"digits: {path} starts with magic number 0x{magic:08x}; an idx3-ubyte image file starts with "
            f"0x{_IDX3_UINT8_MAGIC:08x}"
        )
    if (rows, columns) != (DIGIT_SIZE, DIGIT_SIZE):
        raise ValueError(f"digits: {path} holds {rows}×{columns} images; only {DIGIT_SIZE}×{DIGIT_SIZE} is accepted")
    if not 1 <= n_images <= _MAX_IMAGES:
        raise ValueError(f"digits: {path} announces {n_images} images; 1 to {_MAX_IMAGES} are accepted")
    return int(n_images)


def split_digits(images: np.ndarray, seed: int, validation_share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Splits digit images (N, h, w) into train and validation sets that share no picture, deterministic in `seed`.

    Repeated pictures are dropped first: otherwise one could stand on both sides.

    Raises:
        ValueError: not a stack of images, fewer than two different ones, or a share outside (0, 1).
    """
    if images.ndim != 3:
        raise ValueError(f"images: expected shape (N, h, w), got {images.shape}")
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share: expected a share between 0 and 1, got {validation_share}")
    images = np.unique(images, axis=0)
    if len(images) < 2:
        raise ValueError(f"images: {len(images)} different picture(s) cannot be split into train and validation")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(images))
    n_validation = min(math.ceil(len(images) * validation_share), len(images) - 1)
    return images[order[n_validation:]], images[order[:n_validation]]
