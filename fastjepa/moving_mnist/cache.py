"""Disk cache of arrays that are made once: generated clips and digit maps.

A file is called `<name>-<key>-<fingerprint>.npy`. The key stands for everything that the array is made from, the
fingerprint for its content, so that a file shows by itself whether it is whole. Files are written to a temporary name
in the same folder and renamed: a reader sees a complete file or none, and several processes may share a folder.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fastjepa.files.safe_files import atomic_file

logger = logging.getLogger(__name__)


def fingerprint(array: np.ndarray) -> str:
    """128-bit hash of an array's dtype, shape and values, as 32 hexadecimal digits."""
    digest = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def cache_key(*parts: object) -> str:
    """Key of an array made from `parts`, which must have a `repr` that tells different values apart."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def cached_array(
    cache_dir: Path, name: str, key: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]
) -> tuple[np.ndarray, str]:
    """Reads an uint8 array of `shape` from the cache, or makes it and writes it there; gives its fingerprint too.

    A damaged file is reported as a warning and replaced.

    Raises:
        OSError: `cache_dir` cannot be written; the message names the option to change.
    """
    damaged = []
    for path in sorted(cache_dir.glob(f"{name}-{key}-*.npy")):
        try:
            return _read(path, shape)
        except (OSError, ValueError) as error:
            logger.warning("cache: %s is damaged and will be made again: %s", path, error)
            damaged.append(path)

    with writing_to(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)  # before the work, so that a bad folder fails at once
    array = make()
    if array.shape != shape or array.dtype != np.uint8:
        raise ValueError(f"{name}: made {array.dtype} {array.shape}, the cache expects uint8 {shape}")
    content = fingerprint(array)
    target = cache_dir / f"{name}-{key}-{content}.npy"
    with writing_to(cache_dir):
        with atomic_file(target) as file:
            np.lib.format.write_array(file, array, allow_pickle=False)
        for path in damaged:
            if path != target:
                path.unlink(missing_ok=True)
    logger.info("cache: wrote %s", target)
    return array, content


def open_npy(path: Path) -> np.ndarray:
    """Maps a `.npy` file read-only, without ever unpickling.

    Raises:
        ValueError: the file is not a complete `.npy` file of plain numbers.
        OSError: it cannot be read.
    """
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:
        # The header is parsed as Python text: a damaged one raises whatever its content leads to (SyntaxError,
        # TokenError, OverflowError, MemoryError, ...). All of them mean one thing here.
        raise ValueError(f"not a complete .npy file of plain numbers ({error})") from error


@contextmanager
def writing_to(cache_dir: Path) -> Iterator[None]:
    """Turns an OSError inside the block into one that says which option to change."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write to the cache folder {cache_dir} ({error.strerror or error}); "
            "choose a writable one with enough space with --cache_dir"
        ) from error


def _read(path: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    mapped = open_npy(path)
    if mapped.shape != shape or mapped.dtype != np.uint8:
        raise ValueError(f"it holds {mapped.dtype} {mapped.shape} instead of uint8 {shape}")
    array = np.array(mapped, order="C")
    content = fingerprint(array)
    if content != path.stem.rpartition("-")[2]:
        raise ValueError("its content does not match the fingerprint in its name")
    return array, content
