"""Files appear whole or not at all, and files from outside never run code."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from fastjepa.files.safe_files import CheckpointError, atomic_file, atomic_path, write_atomic, write_text_atomic
from fastjepa.files.tensor_files import read_tensor_file

OLD, NEW = b"old content", b"new content"


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "latest.pt"
    path.parent.mkdir()
    path.write_bytes(OLD)
    return path


def write_new(file: BinaryIO) -> None:
    file.write(NEW)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_replaces_the_file_and_leaves_nothing_else(old_file: Path) -> None:
    write_atomic(old_file, write_new)
    assert old_file.read_bytes() == NEW
    assert names_in(old_file.parent) == [old_file.name]


def test_text_is_written_as_utf8_with_its_line_ends(tmp_path: Path) -> None:
    write_text_atomic(tmp_path / "a.csv", "µ,×\r\n1,2\n")
    assert (tmp_path / "a.csv").read_bytes() == "µ,×\r\n1,2\n".encode()


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", write_new)
    finally:
        os.umask(previous)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_a_link_is_followed(old_file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.pt"
    link.symlink_to(old_file)
    write_atomic(link, write_new)
    assert link.is_symlink()
    assert old_file.read_bytes() == NEW


def test_content_reaches_the_disk_before_the_name_and_the_name_before_returning(
    old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor: int) -> None:
        is_folder = os.path.samestat(os.fstat(descriptor), old_file.parent.stat())
        events.append("folder" if is_folder else f"file of {os.fstat(descriptor).st_size}")
        fsync(descriptor)

    def recording_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    write_atomic(old_file, write_new)
    assert events == [f"file of {len(NEW)}", "rename", "folder"]


@pytest.mark.parametrize("raised", [ValueError("not the system's"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failing_writer_leaves_the_old_file_and_its_own_exception(old_file: Path, raised: BaseException) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(NEW)
        raise raised

    with pytest.raises(type(raised)) as caught:
        write_atomic(old_file, fail)
    assert caught.value is raised
    assert old_file.read_bytes() == OLD
    assert names_in(old_file.parent) == [old_file.name]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_refusing_system_leaves_the_old_file(old_file: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, failing, refuse)
    with pytest.raises(CheckpointError, match=r"latest\.pt: Input/output error; what was there before is intact"):
        write_atomic(old_file, write_new)
    assert old_file.read_bytes() == OLD
    assert names_in(old_file.parent) == [old_file.name]


def test_a_folder_that_cannot_be_flushed_is_told_as_such(old_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refuse_folder(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), old_file.parent.stat()):
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folder)
    with pytest.raises(CheckpointError, match="the new file is in place"):
        write_atomic(old_file, write_new)
    assert old_file.read_bytes() == NEW


def test_atomic_file_keeps_the_old_content_when_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_bytes() == b"old"
    with atomic_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_takes_names_only(old_file: Path) -> None:
    with atomic_path(old_file) as name:
        assert name.parent == old_file.parent
        name.write_bytes(NEW)
        assert old_file.read_bytes() == OLD
    assert old_file.read_bytes() == NEW
    with pytest.raises(FileNotFoundError), atomic_path(old_file):
        pass  # nothing was written, so there is nothing to rename
    assert old_file.read_bytes() == NEW
    assert names_in(old_file.parent) == [old_file.name]


@pytest.mark.parametrize("write", ["atomic_path", "atomic_file"])
def test_where_a_folder_cannot_be_flushed_only_write_atomic_minds(
    old_file: Path, write: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems refuse it: no reason to lose a file that is only a cache."""
    flushed: list[int] = []

    def fsync(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), old_file.parent.stat()):
            raise OSError(errno.EINVAL, "Invalid argument")
        flushed.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    if write == "atomic_path":
        with atomic_path(old_file) as name:
            name.write_bytes(NEW)
    else:
        with atomic_file(old_file) as file:
            file.write(NEW)
    assert old_file.read_bytes() == NEW
    assert flushed == [len(NEW)]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_killed_writer_leaves_the_old_file_and_its_leftover_goes_with_time(old_file: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from fastjepa.files.safe_files import write_atomic\n"
        "def die(file):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomic(sys.argv[1], die)\n"
    )
    died = subprocess.run([sys.executable, "-c", program, str(old_file)], check=False, timeout=120)
    assert died.returncode == -signal.SIGKILL
    assert old_file.read_bytes() == OLD
    (leftover,) = (path for path in old_file.parent.iterdir() if path != old_file)
    assert leftover.read_bytes() == b"half"

    write_atomic(old_file, write_new)
    assert leftover.exists()  # so young, it could belong to a writer at work
    two_hours_ago = leftover.stat().st_mtime - 7200
    os.utime(leftover, (two_hours_ago, two_hours_ago))
    other = old_file.with_name(".other.pt.0123.tmp")
    other.write_bytes(b"not ours")
    os.utime(other, (two_hours_ago, two_hours_ago))
    write_atomic(old_file, write_new)
    assert names_in(old_file.parent) == [other.name, old_file.name]


def test_a_file_size_limit_leaves_the_old_file(old_file: Path) -> None:
    resource = pytest.importorskip("resource", reason="Windows has no limit of file sizes")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large; what was there before is intact"):
            write_atomic(old_file, lambda file: file.write(bytes(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert old_file.read_bytes() == OLD
    assert names_in(old_file.parent) == [old_file.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("there is no mount program")
    if mounted.returncode != 0:
        pytest.skip(f"a small disk could not be mounted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_file(small_disk: Path) -> None:
    path = small_disk / "latest.pt"
    path.write_bytes(OLD)
    with pytest.raises(CheckpointError, match="No space left on device; what was there before is intact"):
        write_atomic(path, lambda file: file.write(bytes(200_000)))
    assert path.read_bytes() == OLD
    assert names_in(small_disk) == [path.name]


# Places that refuse root as well, to whom permissions do not apply.
@pytest.mark.parametrize(
    ("place", "reason"),
    [("file/latest.pt", "Not a directory"), ("missing/latest.pt", "No such file"), ("folder", "Is a directory")],
)
def test_an_unwritable_place_is_named(tmp_path: Path, place: str, reason: str) -> None:
    (tmp_path / "file").write_bytes(OLD)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=reason) as caught:
        write_atomic(tmp_path / place, write_new)
    assert str(tmp_path / place) in str(caught.value)
    assert names_in(tmp_path) == ["file", "folder"]


class CreatesFile:
    """Unpickling this creates a file: what a hostile checkpoint would do, made harmless."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_named_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    torch.save({"state": CreatesFile(proof)}, tmp_path / "hostile.pt")
    with pytest.raises(CheckpointError, match=r"other pickled objects \(posix.mkdir\).*not loaded"):
        read_tensor_file(tmp_path / "hostile.pt")
    assert not proof.exists()


def test_an_object_in_a_file_is_named(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(lr=1.0)}, tmp_path / "args.pt")
    with pytest.raises(CheckpointError, match=r"\(argparse.Namespace\)"):
        read_tensor_file(tmp_path / "args.pt")


def zip_of(path: Path, name: str, compression: int) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, bytes(1000))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "could not read .*No such file"),
        (lambda path: path.mkdir(), "could not read .*Is a directory"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("epoch,loss\n1,2\n"), "damaged, truncated, or not a file that torch.save wrote"),
        (lambda path: zip_of(path, "a.txt", zipfile.ZIP_STORED), "another kind of zip archive"),
        (lambda path: zip_of(path, "a/data.pkl", zipfile.ZIP_DEFLATED), "it is compressed"),
        (lambda path: zip_of(path, "a/data.pkl", zipfile.ZIP_STORED), "could not be loaded"),
    ],
    ids=["missing", "folder", "empty", "text", "zip", "compressed", "fake"],
)
def test_a_foreign_file_is_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "latest.pt"
    make(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensor_file(path)
    assert str(path) in str(caught.value)


def test_no_flipped_byte_and_no_truncation_goes_unnoticed(tmp_path: Path) -> None:
    weights = torch.arange(12.0)
    torch.save({"weights": weights}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    assert torch.equal(read_tensor_file(tmp_path / "good.pt")["weights"], weights)
    path = tmp_path / "bad.pt"
    refused = set()
    for position in range(0, len(good), 2):
        # 0x11 includes the bit that makes an entry a folder, which torch.load by itself does not read.
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x11]) + good[position + 1 :])
        try:
            loaded = read_tensor_file(path)
        except CheckpointError:
            refused.add(position)
        else:  # padding, dates: bytes that say nothing
            assert torch.equal(loaded["weights"], weights), f"byte {position}"
    start = good.index(weights.numpy().tobytes())
    assert refused >= set(range(start, start + weights.nbytes, 2))
    for length in range(0, len(good), 40):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            read_tensor_file(path)
