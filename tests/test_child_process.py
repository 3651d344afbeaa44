"""A child that crashes, hangs, refuses signals or leaves others behind costs only itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastjepa.sweeping.child_process import Ended, run_child

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and sessions are POSIX")


def run(code: str, log: Path, seconds: float = 30.0, **options: object) -> Ended:
    return run_child([sys.executable, "-u", "-c", code], log, seconds, **options)  # type: ignore[arg-type]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # a zombie that nobody has waited for has ended too
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def ends_soon(pid: int) -> bool:
    until = time.monotonic() + 10
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


def test_a_success_has_no_reason_and_its_output_is_in_the_log(tmp_path: Path) -> None:
    ended = run("print('hello')", tmp_path / "logs" / "a.log")
    assert (ended.status, ended.reason, ended.tail) == (0, "", "hello\n")
    assert (tmp_path / "logs" / "a.log").read_text().endswith("hello\n")


def test_the_log_grows_and_the_tail_is_that_of_the_last_child_only(tmp_path: Path) -> None:
    run("print('first')", tmp_path / "log")
    assert run("pass", tmp_path / "log").tail == ""
    assert "first" in (tmp_path / "log").read_text()


def test_a_crash_names_its_signal_and_the_last_line(tmp_path: Path) -> None:
    ended = run("import os; print('about to'); os.abort()", tmp_path / "log")
    assert ended.status == -signal.SIGABRT
    assert ended.reason == "ended by SIGABRT; last output: about to"


def test_an_error_names_its_status_and_the_exception(tmp_path: Path) -> None:
    assert run("raise ValueError('no such thing')", tmp_path / "log").reason == (
        "exit status 1; last output: ValueError: no such thing"
    )


def test_a_hanging_child_is_interrupted_and_says_where_it_was(tmp_path: Path) -> None:
    ended = run("import time\nprint('waiting')\ntime.sleep(600)", tmp_path / "log", seconds=1.5)
    assert ended.status is None
    assert "KeyboardInterrupt" in ended.tail
    assert "its time was over" in ended.reason


def test_a_child_listens_to_sigint_though_its_parent_ignores_it(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job of a shell
    try:
        ended = run("import time\ntime.sleep(600)", tmp_path / "log", seconds=3.0, patience=30.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "KeyboardInterrupt" in ended.tail


def test_a_child_that_refuses_to_end_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, time\n"
        "for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)\n"
        "print(os.getpid(), flush=True)\n"
        "while True: time.sleep(1)"
    )
    ended = run(code, tmp_path / "log", seconds=1.5, patience=0.2)
    assert ended.status is None
    assert ends_soon(int(ended.tail))


def test_what_a_child_leaves_running_ends_with_it(tmp_path: Path) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    assert ends_soon(int(run(code, tmp_path / "log").tail))


def test_it_ends_early_when_the_caller_says_so(tmp_path: Path) -> None:
    started = time.monotonic()
    ended = run("import time; time.sleep(600)", tmp_path / "log", 300.0, overdue=lambda: time.monotonic() > started + 1)
    assert ended.status is None
    assert ended.seconds < 200


def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("asked of Linux only")
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = (
        "from pathlib import Path; import sys\n"
        "from fastjepa.sweeping.child_process import run_child\n"
        f"run_child([sys.executable, '-c', {child!r}], Path({str(tmp_path / 'log')!r}), 600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        parent.kill()
        parent.wait()
    assert ends_soon(int((tmp_path / "pid").read_text()))


def test_seconds_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seconds must be more than 0, got 0"):
        run("pass", tmp_path / "log", 0)
