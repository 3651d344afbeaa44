"""The self-check and `fastest`, rehearsed with stand-ins: kernels that are wrong, raise or kill; hostile files."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastjepa import autotune
from fastjepa.autotune import FILE_NAME, VARIABLE, fastest, self_check
from fastjepa.environment import ROOT, machine_key, sources_hash
from fastjepa.files.safe_files import write_text_atomic

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.setattr(autotune, "_redone", set())
    yield
    autotune.decide_by(None)


class Checker:
    """Calls `self_check` and remembers what it said; counts the checks that ran."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines, self.runs = folder, list[str](), 0

    def __call__(self, check: Callable[[], str | None] = lambda: None, key: str = "key") -> str | None:
        def counted() -> str | None:
            self.runs += 1
            return check()

        return self_check(key, counted, what="a JEPA", cache_dir=self.folder, say=self.lines.append)


@pytest.fixture
def checker(tmp_path: Path) -> Checker:
    return Checker(tmp_path / "cache")


def raises(error: BaseException) -> Callable[[], str | None]:
    def check() -> str | None:
        raise error

    return check


def test_an_exact_check_is_made_once(checker: Checker) -> None:
    assert checker() is None
    assert checker() is None
    assert checker.runs == 1


def test_another_key_is_checked_too(checker: Checker) -> None:
    checker()
    checker(key="other")
    assert checker.runs == 2


def test_a_kernel_that_computes_wrong_is_remembered(checker: Checker) -> None:
    wrong = "gradient of encoder is off"
    assert checker(lambda: wrong) == wrong
    assert wrong in (checker() or "")
    assert checker.runs == 1


def test_a_kernel_that_raises_is_remembered(checker: Checker) -> None:
    assert checker(raises(RuntimeError("bad\nsecond line"))) == "RuntimeError: bad"
    assert "RuntimeError: bad" in (checker() or "")


def test_out_of_memory_is_not_remembered(checker: Checker) -> None:
    assert "no memory" in (checker(raises(torch.OutOfMemoryError("full"))) or "")
    assert checker() is None


def test_ctrl_c_leaves_no_begun(checker: Checker) -> None:
    with pytest.raises(KeyboardInterrupt):
        checker(raises(KeyboardInterrupt()))
    assert checker() is None


@pytest.mark.parametrize("writing", [1, 2])
def test_ctrl_c_while_the_file_is_written_leaves_no_begun(
    writing: int, checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just after "begun" was written, and just before the result is."""
    write, calls = write_text_atomic, list[str]()

    def interrupted(path: Path, text: str) -> None:
        calls.append(text)
        if len(calls) == writing == 2:
            raise KeyboardInterrupt
        write(path, text)
        if len(calls) == writing:
            raise KeyboardInterrupt

    monkeypatch.setattr(autotune, "write_text_atomic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checker()
    assert "begun" in calls[0]
    assert checker() is None


def test_a_check_that_killed_its_process_is_found_by_the_next_start(checker: Checker) -> None:
    code = (
        "import os, pathlib; from fastjepa.autotune import self_check\n"
        f"self_check('key', lambda: os._exit(9), what='', cache_dir=pathlib.Path({str(checker.folder)!r}))"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True)
    assert child.returncode == 9
    assert "ended with its process" in (checker() or "")
    assert checker.runs == 0


def test_redo_checks_again_once(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    checker(lambda: "wrong")
    monkeypatch.setenv(VARIABLE, "redo")
    assert checker() is None
    assert checker() is None
    assert checker.runs == 2


def test_redo_takes_a_killed_check_up(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    checker.folder.mkdir()
    (checker.folder / FILE_NAME).write_text('{"key": {"check": "begun", "reason": ""}}')
    monkeypatch.setenv(VARIABLE, "redo")
    assert checker() is None


def test_zero_skips_the_check(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    assert checker(lambda: "wrong") is None
    assert checker.runs == 0


def test_another_value_is_refused(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "no")
    with pytest.raises(ValueError, match=r"FASTJEPA_SELF_CHECK must be 1 .* 0 .* redo .* got 'no'"):
        checker()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"key": {"check": "exact", "rea',
        b"\xff\xfe",
        b"[1, 2]",
        b'{"key": 1}',
        b'{"key": {"check": "fine", "reason": ""}}',
        b'{"key": {"check": "inexact", "reason": "\\u001b[2J"}}',
        b'{"key": {"check": "inexact", "reason": "' + b"x" * 400 + b'"}}',
        b'{"key": {"check": "exact", "reason": "", "more": ""}}',
        b"[" * 100_000,
        b" " * 1_000_001,
    ],
)
def test_a_file_that_is_not_as_written_is_ignored(content: bytes, checker: Checker) -> None:
    checker.folder.mkdir()
    (checker.folder / FILE_NAME).write_bytes(content)
    assert checker() is None
    assert checker.runs == 1
    assert json.loads((checker.folder / FILE_NAME).read_text())["key"]["check"] == "exact"


def test_a_link_is_neither_read_nor_written(checker: Checker, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text('{"key": {"check": "inexact", "reason": "planted"}}')
    checker.folder.mkdir()
    (checker.folder / FILE_NAME).symlink_to(target)
    assert checker() is None
    assert "planted" in target.read_text()
    assert any("not remembered" in line for line in checker.lines)


def test_a_folder_in_the_files_place(checker: Checker) -> None:
    (checker.folder / FILE_NAME).mkdir(parents=True)
    assert checker() is None
    assert any("not remembered" in line for line in checker.lines)


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checker = Checker(tmp_path / "file")
    assert checker() is None
    assert checker(lambda: "wrong") == "wrong"
    assert any("not remembered" in line for line in checker.lines)


def test_a_second_process_waits_for_the_first(checker: Checker) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> str | None:
        begun.set()
        assert go_on.wait(60)
        return "wrong"

    first = threading.Thread(target=checker, args=(slow,))
    first.start()
    assert begun.wait(60)
    second = Checker(checker.folder)
    waiting = threading.Thread(target=second)
    waiting.start()
    while not second.lines:
        waiting.join(0.01)
    go_on.set()
    first.join()
    waiting.join()
    assert "waiting" in second.lines[0]
    assert second.runs == 0


def test_a_process_that_checks_for_too_long(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "PATIENCE", 0.1)
    found: list[str | None] = []

    def second() -> str | None:
        found.append(Checker(checker.folder)())
        return None

    checker(second)
    assert "another process has checked" in (found[0] or "")


def never() -> None:
    raise AssertionError("it must not run")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """As on a GPU, with a clock that reads these milliseconds; every timing is counted under "count"."""
    times = {"count": 0.0}

    def milliseconds(candidates: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
        times["count"] += 1
        return {name: times[name] for name in candidates}

    monkeypatch.setattr(autotune, "_can_time", lambda device: True)
    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    return times


def test_the_fastest_is_remembered(timed: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed |= {"torch": 2.0, "ours": 1.0}
    candidates = dict.fromkeys(("torch", "ours"), never)
    assert fastest("a rollout", candidates, CPU, cache_dir=tmp_path) == "ours"
    monkeypatch.setattr(autotune, "_chosen", {})  # another process
    timed["torch"] = 0.5
    assert fastest("a rollout", candidates, CPU, cache_dir=tmp_path) == "ours"
    assert timed["count"] == 1
    assert autotune.chosen() == {"a rollout": "ours"}


def test_a_remembered_name_that_is_no_candidate_is_timed_again(timed: dict[str, float], tmp_path: Path) -> None:
    timed |= {"torch": 1.0, "ours": 2.0}
    key = machine_key(CPU, "a rollout")
    (tmp_path / FILE_NAME).write_text(json.dumps({key: {"fastest": "gone"}}))
    assert fastest("a rollout", dict.fromkeys(("torch", "ours"), never), CPU, cache_dir=tmp_path) == "torch"


def test_a_run_goes_on_with_what_it_began_with(timed: dict[str, float], tmp_path: Path) -> None:
    autotune.use({"a rollout": "ours"})
    assert fastest("a rollout", dict.fromkeys(("torch", "ours"), never), CPU, cache_dir=tmp_path) == "ours"
    assert timed["count"] == 0
    with pytest.raises(ValueError, match="table of names"):
        autotune.use({"a rollout": 1})


def test_the_first_process_decides_for_all(timed: dict[str, float], tmp_path: Path) -> None:
    timed |= {"torch": 2.0, "ours": 1.0}
    autotune.decide_by(lambda work: "torch")  # which the first one has found
    assert fastest("a rollout", dict.fromkeys(("torch", "ours"), never), CPU, cache_dir=tmp_path) == "torch"
    assert timed["count"] == 0


def test_the_first_candidate_is_the_default(tmp_path: Path) -> None:
    assert fastest("a rollout", dict.fromkeys(("torch", "ours"), never), CPU, cache_dir=tmp_path) == "torch"
    assert autotune.chosen() == {}
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("untimed", ["0", "capturing"])
def test_what_was_not_timed_stays_the_default(
    untimed: str, timed: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that began so is resumed so: its numbers must not depend on what is timed later."""
    timed |= {"torch": 2.0, "ours": 1.0}
    with monkeypatch.context() as now:
        if untimed == "0":
            now.setenv(VARIABLE, "0")
        else:
            now.setattr(autotune, "_captures", lambda: True)
        assert fastest("a rollout", dict.fromkeys(("torch", "ours"), never), CPU, cache_dir=tmp_path) == "torch"
    assert autotune.chosen() == {"a rollout": "torch"}
    assert fastest("a rollout", dict.fromkeys(("torch", "ours"), never), CPU, cache_dir=tmp_path) == "torch"
    assert timed["count"] == 0


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = autotune.milliseconds(candidates, CPU)
    assert found.keys() == {"a", "b"}
    assert len(calls) == 2 * (1 + autotune.ROUNDS)
    assert calls[2:6] == ["b", "a", "a", "b"]


def test_the_key_names_sources_and_whatever_is_given() -> None:
    assert machine_key(CPU, "bf16") != machine_key(CPU, "fp32")
    assert len(sources_hash()) == 12
