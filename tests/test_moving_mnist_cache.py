"""The array cache: written once, whole or not at all, and never trusted blindly."""

import errno
import io
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from fastjepa.moving_mnist.cache import cache_key, cached_array, fingerprint, open_npy
from fastjepa.storage.cache_folder import default_cache_dir
from properties import given, settings, st

ARRAY = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)


def npy_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


class Maker:
    """Makes ARRAY and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> np.ndarray:
        self.calls += 1
        return ARRAY.copy()


class UnpickledError(Exception):
    """Raised by unpickling a Trap."""


class Trap:
    def __reduce__(self):
        return _spring, ()


def _spring() -> None:
    raise UnpickledError


def pickled_npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
    return file.getvalue()


def test_made_once_then_read(tmp_path: Path) -> None:
    make = Maker()
    folder = tmp_path / "a" / "b"  # made when missing
    for _ in range(2):
        array, content = cached_array(folder, "clips", "key", (3, 4, 5), make)
        assert content == fingerprint(ARRAY)
        np.testing.assert_array_equal(array, ARRAY)
        assert array.flags.writeable  # torch.from_numpy wants that
    assert make.calls == 1
    assert [path.name for path in folder.iterdir()] == [f"clips-key-{fingerprint(ARRAY)}.npy"]
    cached_array(folder, "clips", "other", (3, 4, 5), make)
    cached_array(folder, "maps", "key", (3, 4, 5), make)
    assert make.calls == 3


WHOLE = npy_bytes(ARRAY)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(WHOLE[:40], id="truncated header"),
        pytest.param(WHOLE[:-1], id="truncated values"),
        pytest.param(WHOLE[:-1] + b"\xff", id="one other byte"),
        pytest.param(b"PK\x03\x04" + WHOLE, id="zip"),
        pytest.param(npy_bytes(ARRAY[:2]), id="other shape"),
        pytest.param(npy_bytes(ARRAY.astype(np.int16)), id="other dtype"),
        pytest.param(WHOLE.replace(b"(3, 4, 5)", b"(9, 9, 9,"), id="header that does not parse"),
        pytest.param(pickled_npy(), id="pickled object"),
    ],
)
def test_damaged_file_is_reported_and_made_again(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    make = Maker()
    cached_array(tmp_path, "clips", "key", (3, 4, 5), make)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(cached_array(tmp_path, "clips", "key", (3, 4, 5), make)[0], ARRAY)
    assert make.calls == 2
    assert f"{path} is damaged and will be made again" in caplog.text
    assert path.read_bytes() == WHOLE


def test_a_damaged_file_of_another_name_is_removed(tmp_path: Path) -> None:
    (tmp_path / "clips-key-0123.npy").write_bytes(WHOLE)
    cached_array(tmp_path, "clips", "key", (3, 4, 5), Maker())
    assert [path.name for path in tmp_path.iterdir()] == [f"clips-key-{fingerprint(ARRAY)}.npy"]


def test_a_maker_that_keeps_another_promise_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clips: made uint8 \(3, 4, 5\), the cache expects uint8 \(3, 4\)"):
        cached_array(tmp_path, "clips", "key", (3, 4), Maker())
    assert not list(tmp_path.iterdir())


def test_unusable_folder_names_the_option_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    make = Maker()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"cannot write to the cache folder .*file.* with --cache_dir"):
            cached_array(folder, "clips", "key", (3, 4, 5), make)
    assert make.calls == 0


def test_full_disk_names_the_option_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*--cache_dir"):
        cached_array(tmp_path, "clips", "key", (3, 4, 5), Maker())
    assert not list(tmp_path.iterdir())


def test_open_npy_never_unpickles(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(pickled_npy())
    with pytest.raises(UnpickledError):
        np.load(path, allow_pickle=True)  # the trap works
    with pytest.raises(ValueError, match=r"not a complete \.npy file of plain numbers"):
        open_npy(path)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, len(WHOLE) - ARRAY.size - 1), byte=st.integers(0, 255), length=st.integers(0, 200))
def test_open_npy_answers_any_header_with_an_array_or_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int, length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.npy"
    content = bytearray(WHOLE)
    content[position] = byte
    path.write_bytes(content[: max(length, position)])
    try:
        array = open_npy(path)
    except ValueError as error:
        assert "not a complete .npy file" in str(error)  # noqa: PT017  either outcome is fine, nothing else is
    else:
        assert array.nbytes <= len(content)


@pytest.mark.parametrize("variant", [ARRAY + 1, ARRAY.reshape(4, 3, 5), ARRAY.view(np.int8)])
def test_fingerprint_tells_values_shapes_and_dtypes_apart(variant: np.ndarray) -> None:
    assert fingerprint(variant) != fingerprint(ARRAY)


def test_fingerprint_does_not_depend_on_memory_layout() -> None:
    assert fingerprint(np.asfortranarray(ARRAY)) == fingerprint(ARRAY)
    assert fingerprint(np.repeat(ARRAY, 2, axis=0)[::2]) == fingerprint(ARRAY)


def test_cache_key_tells_parts_apart() -> None:
    keys = {cache_key(*parts) for parts in [(1, 23), (12, 3), ("1", 23), ((1, 23),), (1,), ()]}
    assert len(keys) == 6


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert default_cache_dir() == Path("/some/where/fastjepa")
    for ignored in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_cache_dir() == tmp_path / ".cache" / "fastjepa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == tmp_path / ".cache" / "fastjepa"
