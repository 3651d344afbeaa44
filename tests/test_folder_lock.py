"""One process at a time trains a run; a lock ends with its process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastjepa.storage import folder_lock
from fastjepa.storage.folder_lock import LOCK_NAME, FolderInUseError, FolderLock

fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks")

# As a trainer in another process holds it, without the seconds that importing torch takes.
HOLDER = """
import fcntl, os, sys, time
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
os.write(descriptor, f"process {os.getpid()} on elsewhere\\n".encode())
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / LOCK_NAME)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_that_another_process_holds_is_refused_until_that_is_killed(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    told = (
        rf"^the run in {tmp_path} is being trained by process {holder.pid} on elsewhere: wait for it to end, or stop it"
    )
    for _ in range(2):
        with pytest.raises(FolderInUseError, match=told):
            FolderLock(tmp_path)
    holder.kill()  # SIGKILL: nothing tidies up
    holder.wait()
    lock = FolderLock(tmp_path)
    assert (tmp_path / LOCK_NAME).read_text().startswith(f"process {os.getpid()} on ")  # and not a word of the other's
    assert (tmp_path / LOCK_NAME).read_text().count("\n") == 1
    lock.release()


def test_it_is_held_in_this_process_too_until_it_is_released_or_dropped(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(FolderInUseError, match=f"by process {os.getpid()} on "):
        FolderLock(tmp_path)
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock = FolderLock(tmp_path)
    del lock
    FolderLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_its_holder_removes_while_it_is_being_opened_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise two processes would hold locks on two files of that name, one of them gone."""
    opened, real = [], os.open

    def open_and_lose(path: Path, *arguments: int) -> int:
        opened.append(real(path, *arguments))
        if len(opened) == 1:
            path.unlink()
        return opened[-1]

    monkeypatch.setattr(folder_lock.os, "open", open_and_lose)
    lock = FolderLock(tmp_path)
    assert len(opened) == 2
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path)
    lock.release()


@pytest.mark.parametrize("missing", ["module", "locks"])
def test_without_locks_it_warns_and_lets_one_train(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if missing == "module":
        monkeypatch.setattr(folder_lock, "fcntl", None)
    else:
        monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    FolderLock(tmp_path).release()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"the run in {tmp_path} is not locked against a second process: ")
