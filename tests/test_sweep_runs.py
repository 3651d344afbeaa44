"""What a sweep does: trains what is not finished, goes on with what was begun, tells what broke and what changed."""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fastjepa.sweep import main
from fastjepa.sweeping import one_run
from fastjepa.sweeping.grid import parse_grid
from fastjepa.sweeping.one_by_one import duration
from fastjepa.sweeping.plan import Run, plan_runs
from fastjepa.sweeping.state import FAILURE_NAME, LOG_NAME
from made_up_sweep import FLAGS, TINY, leave, leave_finished, planned, row

pytestmark = pytest.mark.packages("tyro", "torchmetrics", "cv2", "sklearn", "matplotlib", "PIL")

# ---- training all ----


class Standin:
    """In place of the trainer's command line: what a child of each run does, as code; and which were called."""

    def __init__(self, runs: list[Run], made: Path) -> None:
        self.called: list[str] = []
        self.words: list[list[str]] = []
        self.code: dict[Path, str] = {}
        for i, run in enumerate(runs):
            whole = leave_finished(run, 0.2 + i / 100, folder=made / str(i))
            self.code[run.folder] = f"shutil.copytree({str(whole)!r}, {str(run.folder)!r}, dirs_exist_ok=True)"
        self.command = one_run.train_command

    def __call__(self, folder: Path, flags: tuple[str, ...]) -> list[str]:
        self.called.append(folder.name)
        self.words.append(self.command(folder, flags))
        return [sys.executable, "-c", f"import os, shutil, signal, sys, time\n{self.code[folder]}"]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[Run], Standin]:
    """(the arguments of a sweep of three runs, they, what stands in for the trainer)."""
    out = tmp_path / "the sweep"
    runs = planned(out, "lr=1e-3", seeds=(1, 2, 3))
    standin = Standin(runs, tmp_path / "made")
    monkeypatch.setattr(one_run, "train_command", standin)
    return ["--grid", "lr=1e-3", "--seeds", "1,2,3", "--out", str(out), "--", *FLAGS], runs, standin


Sweep = tuple[list[str], list[Run], Standin]


def statuses(runs: list[Run]) -> list[str]:
    table = csv.DictReader((runs[0].folder.parent.parent / "sweep.csv").open())
    return [line["status"] for line in table]


def test_what_is_finished_is_skipped_and_what_was_begun_goes_on(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, runs, standin = sweep
    leave_finished(runs[0], 0.3)
    leave(runs[1], row(1, 30, 0.2))
    assert main(argv) == 0
    assert standin.called == ["seed-2", "seed-3"]
    assert [words[-2] for words in standin.words] == ["--resume", "--out"]
    assert statuses(runs) == ["finished"] * 3
    printed = capsys.readouterr().out
    assert "3 runs: 1 finished, 2 to train, 1 of them from where they were" in printed
    assert "[2/3] lr=0.001, seed 2, going on\n    mAP 0.210, AP_0 0.310; " in printed
    assert "[3/3] lr=0.001, seed 3\n    mAP 0.220, AP_0 0.320; " in printed
    assert main(argv) == 0
    assert len(standin.called) == 2


def test_a_run_that_breaks_is_told_and_the_rest_goes_on(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    argv, runs, standin = sweep
    whole = standin.code[runs[1].folder]
    standin.code[runs[1].folder] = "print('no such luck'); sys.exit(3)"
    assert main(argv) == 1
    assert standin.called == ["seed-1", "seed-2", "seed-3"]
    assert statuses(runs) == ["finished", "broken", "finished"]
    log = runs[1].folder / LOG_NAME
    assert f"broken: exit status 3; last output: no such luck (see {log})" in capsys.readouterr().out
    assert "no such luck" in log.read_text()
    assert "exit status 3" in (runs[1].folder / FAILURE_NAME).read_text()
    assert main(["--out", argv[5], "--report_only"]) == 1
    assert f"broken: {runs[1].folder}: exit status 3" in capsys.readouterr().out
    standin.code[runs[1].folder] = whole
    assert main(argv) == 0  # tried again
    assert standin.called[3:] == ["seed-2"]
    assert statuses(runs) == ["finished"] * 3
    assert not (runs[1].folder / FAILURE_NAME).exists()


def test_a_run_that_ends_well_and_is_not_finished_is_told(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    argv, runs, standin = sweep
    standin.code[runs[0].folder] = "pass"
    assert main(argv) == 1
    assert "broken: its process ended well, and it is not finished (see " in capsys.readouterr().out
    assert statuses(runs) == ["broken", "finished", "finished"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_run_save_and_says_how_to_go_on(
    number: signal.Signals, sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, runs, standin = sweep
    whole, started, saved = standin.code[runs[1].folder], tmp_path / "started", tmp_path / "saved"
    standin.code[runs[1].folder] = f"""
def save(number, _):
    time.sleep(0.3)
    open({str(saved)!r}, "w").write(signal.Signals(number).name)
    sys.exit(130)
signal.signal(signal.SIGINT, save)
open({str(started)!r}, "w")
time.sleep(60)
"""
    threading.Thread(target=kill_when, args=(started.exists, number)).start()
    assert main(argv, prog="fastjepa sweep") == 128 + number
    assert saved.read_text() == "SIGINT"  # once, whatever the signal was
    assert standin.called == ["seed-1", "seed-2"]
    printed = capsys.readouterr().out
    assert f"received {number.name}: the run finishes its step and saves" in printed
    assert printed.endswith(f"stopped by {number.name}; continue with: fastjepa sweep {shlex.join(argv)}\n")
    assert not (runs[1].folder / FAILURE_NAME).exists()  # that is no failure
    standin.code[runs[1].folder] = whole
    assert main(argv) == 0
    assert standin.called[2:] == ["seed-2", "seed-3"]


def kill_when(ready: Callable[[], bool], number: int) -> None:
    until = time.monotonic() + 30
    while not ready() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(os.getpid(), number)


# ---- the same folder, another question ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--preset", "demo", "--device", "cpu", "--epochs", "3"), "epochs is 2 there and 3 is asked for"),
        ((*FLAGS, "--steps", "3"), "steps is 2 there and 3 is asked for"),
    ],
)
def test_other_flags_of_the_trainer_are_refused(
    flags: tuple[str, ...], message: str, sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, runs, standin = sweep
    leave(runs[1], row(1, 30, 0.2))
    with pytest.raises(SystemExit) as stopped:
        main([*argv[: argv.index("--")], "--", *flags])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {runs[1].folder} holds a run that was trained with other options: {message}")
    assert not standin.called
    assert not (runs[1].folder.parent.parent / "sweep.json").exists()


def test_a_run_that_wrote_its_options_and_no_checkpoint_is_compared_too(sweep: Sweep) -> None:
    argv, runs, standin = sweep
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "config.json").write_text(json.dumps(runs[0].config.to_json() | {"hdet": 5}))
    with pytest.raises(SystemExit):
        main(argv)
    assert not standin.called


def test_another_grid_is_refused_and_more_values_are_not(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    argv, runs, standin = sweep
    assert main(argv) == 0
    tail = argv[2:]
    for grid, seeds in (("lr=2e-3", "1,2,3"), ("lr=1e-3", "1,2"), ("steps=2", "1,2,3")):
        with pytest.raises(SystemExit) as stopped:
            main(["--grid", grid, "--seeds", seeds, *tail[2:]])
        assert stopped.value.code == 2
        told = capsys.readouterr().err
        assert "holds runs that this grid and these seeds do not have (" in told
        assert ("lr=0.001/seed-3" if seeds == "1,2" else "lr=0.001/seed-1") in told
    more = planned(Path(argv[5]), "lr=1e-3,2e-3", seeds=(1, 2, 3))
    standin.code |= {run.folder: "sys.exit(4)" for run in more if run.config.lr == 2e-3}
    standin.called.clear()
    assert main(["--grid", "lr=1e-3,2e-3", *tail]) == 1
    assert len(standin.called) == 3  # those of the new value
    assert statuses(runs) == ["finished", "broken"] * 3


def test_a_sweep_goes_on_and_is_reported_with_its_folder_alone(sweep: Sweep, tmp_path: Path) -> None:
    argv, runs, standin = sweep
    whole = standin.code[runs[2].folder]
    standin.code[runs[2].folder] = "sys.exit(1)"
    assert main(argv) == 1
    standin.code[runs[2].folder] = whole
    assert main(argv[4:6]) == 0
    assert standin.called == ["seed-1", "seed-2", "seed-3", "seed-3"]
    table = (Path(argv[5]) / "sweep.csv").read_bytes()
    (Path(argv[5]) / "sweep.csv").unlink()
    assert main([*argv[4:6], "--report_only"]) == 0
    assert (Path(argv[5]) / "sweep.csv").read_bytes() == table
    assert len(standin.called) == 4


def test_a_sweep_remembers_which_preset_auto_was(tmp_path: Path) -> None:
    (run,) = plan_runs(parse_grid(["lr=1"]), [1], ["--device", "cpu"], tmp_path, prog="sweep", here=True)
    assert run.config.preset == "demo"
    assert run.flags[:4] == ("--device", "cpu", "--preset", "demo")


# ---- for real ----


def test_two_real_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    flags = [*TINY, "--epochs", "1", "--cache_dir", str(tmp_path / "cache")]
    argv = ["--grid", "steps=1,2", "--seeds", "7", "--out", str(out), "--", *flags]
    assert main(argv) == 0
    assert "2 runs: 2 finished" in capsys.readouterr().out
    table = list(csv.DictReader((out / "sweep.csv").open()))
    assert [(line["steps"], line["seed"], line["status"], line["epochs_done"]) for line in table] == [
        ("1", "7", "finished", "1"), ("2", "7", "finished", "1")
    ]  # fmt: skip
    for line in table:
        folder = out / line["folder"]
        saved = json.loads((folder / "config.json").read_text())
        assert (saved["steps"], saved["seed"]) == (int(line["steps"]), 7)
        (measured,) = csv.DictReader((folder / "metrics.csv").open())
        assert float(line["mAP"]) == float(measured["map"]) > 0
        assert math.isclose(float(line["AP_0"]), float(measured["ap_0"]))
        assert "mAP" in (folder / LOG_NAME).read_text()
    assert {path.name for path in out.iterdir() if path.is_file()} == {
        "sweep.csv", "sweep.json", "heatmap.png", "curves.png"
    }  # fmt: skip


def test_durations_in_words() -> None:
    assert [duration(s) for s in (0.2, 59.4, 61, 3599.4, 11_220)] == [
        "0 s", "59 s", "1 min 1 s", "59 min 59 s", "3 h 7 min"
    ]  # fmt: skip
