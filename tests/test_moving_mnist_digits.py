"""Digit sources: the embedded digits, idx files whole and damaged, and the split into train and validation."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from fastjepa.moving_mnist.digits import embedded_digits, read_idx_images, split_digits
from properties import given, settings, st

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)


def idx_bytes(images: np.ndarray = IMAGES, *, magic: int = 0x803, n: int | None = None) -> bytes:
    n = len(images) if n is None else n
    return struct.pack(">4I", magic, n, *images.shape[1:]) + images.tobytes()


def pictures(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


def test_embedded_digits_are_disjoint_and_laid_out_as_mnist() -> None:
    train, validation = embedded_digits()
    assert train.shape == (1500, 28, 28)
    assert validation.shape == (297, 28, 28)
    assert train.dtype == validation.dtype == np.uint8
    both = np.concatenate([train, validation])
    assert len(pictures(both)) == len(both)  # no picture twice, so none in both sets
    outside_box = both.copy()
    outside_box[:, 4:24, 4:24] = 0
    assert not outside_box.any()
    assert (both.max(axis=(1, 2)) > 200).all()  # 0..16 became 0..255


def test_embedded_digits_are_always_the_same() -> None:
    for first, second in zip(embedded_digits(), embedded_digits(), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", ["images.gz", "images"])
@pytest.mark.parametrize("compress", [gzip.compress, bytes], ids=["gzipped", "plain"])
def test_idx_is_recognised_by_content_whatever_its_name(tmp_path: Path, name: str, compress) -> None:
    path = tmp_path / name
    path.write_bytes(compress(idx_bytes()))
    images = read_idx_images(path)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, IMAGES)


def test_missing_idx_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"digits: there is no file .*nothing\.gz"):
        read_idx_images(tmp_path / "nothing.gz")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "ends within its 16-byte idx3 header"),
        (idx_bytes()[:15], "ends within its 16-byte idx3 header"),
        (idx_bytes()[:-1], "announces 5 images, which is 3920 bytes of pixels, and holds only 3919"),
        (idx_bytes(n=6), "announces 6 images, which is 4704 bytes of pixels, and holds only 3920"),
        (idx_bytes(n=4), "announces 4 images, which is 3136 bytes of pixels, and holds more"),
        (idx_bytes() + b"x", "holds more"),
        (idx_bytes(magic=0x801), "magic number 0x00000801"),
        (b"\x93NUMPY" + bytes(100), "magic number"),
        (idx_bytes(IMAGES[:, :20]), "holds 20×28 images"),
        (idx_bytes(IMAGES[:0]), "announces 0 images"),
        (idx_bytes(n=0xFFFFFFFF), "announces 4294967295 images; 1 to 1000000"),
        # Without the time: the test's name comes from the bytes, and every test process must find the same tests.
        (gzip.compress(idx_bytes(), mtime=0)[:-20], "damaged or truncated gzip"),
        (gzip.compress(idx_bytes(), mtime=0)[:5], "damaged or truncated gzip"),
        (gzip.compress(idx_bytes(), mtime=0)[:-8] + bytes(8), "damaged or truncated gzip"),  # wrong checksum and length
        (gzip.compress(idx_bytes(), mtime=0) + b"x", "damaged or truncated gzip"),
        (gzip.compress(idx_bytes() + b"x", mtime=0), "holds more"),
    ],
)
def test_damaged_idx_file_is_explained(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx_images(path)
    assert str(path) in str(caught.value)


@settings(deadline=None)
@given(n=st.integers(2, 40), share=st.floats(0.01, 0.99), seed=st.integers(0, 2**32))
def test_split_is_disjoint_and_complete(n: int, share: float, seed: int) -> None:
    images = np.arange(n, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    train, validation = split_digits(images, seed, share)
    assert len(train) >= 1
    assert len(validation) >= 1
    assert pictures(train).isdisjoint(pictures(validation))
    assert pictures(train) | pictures(validation) == pictures(images)
    # Within one image of the share, unless that would leave nothing to train on.
    assert len(validation) == n - 1 or 0 <= len(validation) - n * share < 1
    for first, second in zip((train, validation), split_digits(images, seed, share), strict=True):
        np.testing.assert_array_equal(first, second)


def test_split_depends_on_the_seed() -> None:
    images = np.arange(40, dtype=np.uint8)[:, None, None]
    assert pictures(split_digits(images, 1)[1]) != pictures(split_digits(images, 2)[1])


def test_a_repeated_picture_is_on_one_side_only() -> None:
    images = np.repeat(IMAGES, 4, axis=0)
    train, validation = split_digits(images, seed=0, validation_share=0.5)
    assert pictures(train).isdisjoint(pictures(validation))
    assert len(train) + len(validation) == len(IMAGES)


def test_split_refuses_what_it_cannot_split() -> None:
    with pytest.raises(ValueError, match=r"images: expected shape \(N, h, w\)"):
        split_digits(IMAGES[0], seed=0)
    with pytest.raises(ValueError, match=r"images: 1 different picture"):
        split_digits(np.repeat(IMAGES[:1], 3, axis=0), seed=0)
    with pytest.raises(ValueError, match="validation_share"):
        split_digits(IMAGES, seed=0, validation_share=1.0)
