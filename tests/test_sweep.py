"""Sweeps: what a grid means, which runs are finished, and that the rest is trained, resumed, or refused."""

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

from fastjepa.config import Config
from fastjepa.storage.run_folder import CHECKPOINT_NAME
from fastjepa.sweep import main
from fastjepa.sweeping import one_run
from fastjepa.sweeping.grid import NAMED, SEEDS, parse_grid, parse_seeds
from fastjepa.sweeping.one_by_one import duration
from fastjepa.sweeping.plan import NO_AXIS, Run, plan_runs
from fastjepa.sweeping.state import FAILURE_NAME, LOG_NAME, read_state
from fastjepa.training.command_line import parse_config, run_from_command_line
from fastjepa.training.trainer import Trainer
from made_up_sweep import FLAGS, leave, leave_finished, planned, row

pytestmark = pytest.mark.packages("tyro", "torchmetrics", "cv2", "sklearn", "matplotlib", "PIL")

TINY = (
    "--device cpu --preset demo --henc 2 --hpre 2 --dstc 4 --canvas 16 --digit_size 8 --n_train 6 --n_val 5 "
    "--n_frames 5 --batch_size 3 --epochs 2"
).split()


# ---- what is asked for ----


def test_the_last_axis_is_the_fastest_and_the_first_seed_is_trained_first(tmp_path: Path) -> None:
    runs = planned(tmp_path, "cov_coeff=1,10.0", "lr=1e-3,5e-05")
    assert [str(run.folder.relative_to(tmp_path)) for run in runs] == [
        f"cov_coeff={cov},lr={lr}/seed-{seed}" for seed in (1, 2) for cov in ("1", "10") for lr in ("0.001", "5e-05")
    ]
    last = runs[-1]
    assert (last.config.cov_coeff, last.config.lr, last.config.seed) == (10.0, 5e-5, 2)
    assert last.config == parse_config(last.flags)  # the words that the trainer is given mean the same
    assert last.flags[-6:] == ("--cov_coeff", "10", "--lr", "5e-05", "--seed", "2")


def test_the_grids_that_have_names() -> None:
    published = list(parse_grid(["published"]).cells())
    assert len(published) == 9
    assert published[-2] == {"cov_coeff": "100", "std_coeff": "10"}
    original = parse_grid(["original"])
    assert {name: {float(value) for value in values} for name, values in original.axes.items()} == {
        "batch_size": {32, 64}, "lr": {1e-3, 1e-4, 5e-4}, "std_coeff": {1, 10, 100, 200}, "cov_coeff": {1, 10, 100, 200}
    }  # fmt: skip
    assert parse_seeds(SEEDS) == (1, 1000, 10000)
    assert len(list(original.cells())) * len(parse_seeds(SEEDS)) == 288


@pytest.mark.parametrize("name", NAMED)
def test_a_named_grid_is_served(name: str, tmp_path: Path) -> None:
    runs = planned(tmp_path, name, seeds=(1,), flags=("--preset", "full", "--device", "cpu"))
    assert {run.config.steps for run in runs} == {4}
    assert len({run.folder for run in runs}) == len(runs) == {"published": 9, "original": 96}[name]


def test_every_option_is_an_axis_or_says_why_not() -> None:
    axes = {
        "batch_size", "dobs", "henc", "hpre", "dstc", "projector", "hdet", "steps", "cov_coeff", "std_coeff", "epochs",
        "lr", "precision", "n_train", "max_steps",
    }  # fmt: skip
    assert axes | NO_AXIS.keys() == vars(Config)["__dataclass_fields__"].keys()
    assert not axes & NO_AXIS.keys()


REFUSED = [
    ("--grid lrr=1", "--grid lrr: there is no such option of the trainer; perhaps lr is meant"),
    ("--grid colour=1", "--grid colour: there is no such option of the trainer; axes may be batch_size, "),
    ("--grid cov_coeff=1,x", "--grid cov_coeff=x: --cov_coeff must be a number; got 'x'"),
    ("--grid batch_size=8,2.5", "--grid batch_size=2.5: --batch_size must be a whole number; got '2.5'"),
    ("--grid cov_coeff=1,-1", "--grid cov_coeff=-1: --cov_coeff must be a number ≥ 0, got -1.0"),
    ("--grid cov_coeff=1,1.0", "--grid cov_coeff has the value 1 twice"),
    ("--grid cov_coeff=1 cov_coeff=2", "--grid has cov_coeff twice; give all its values at once"),
    ("--grid cov_coeff=1 cov-coeff=2", "--grid has cov_coeff twice"),
    ("--grid cov_coeff=1,,2", "--grid cov_coeff=1,,2: an empty value"),
    ("--grid cov_coeff=", "--grid cov_coeff=: an empty value"),
    ("--grid cov_coeff", "--grid takes NAME=VALUE,VALUE,… or one of published, original; got 'cov_coeff'"),
    ("--grid published lr=1", "--grid published is a whole grid; it stands alone, and published lr=1 was given"),
    ("--grid out=x", "--grid out is the sweep's own"),
    ("--grid resume=x", "--grid resume is not needed"),
    ("--grid seed=1,2", "--grid seed is not an axis: --seeds has the seeds"),
    ("--grid device=cpu", "--grid device says where a run computes or lies, not what it learns"),
    ("--grid canvas=32,64", "--grid canvas changes the validation clips, so that mAP could not be compared"),
    ("--grid precision=auto,bf16", "--grid precision=auto: a value of a grid is named"),
    ("--grid precision=fp32,tf32", "--precision tf32 needs a CUDA device"),
    (
        "--grid dstc=8,16 projector=16-64",
        "cell dstc=8,projector=16-64 with seed 1: --projector must be sizes that begin",
    ),
    ("--grid lr=1 --seeds 1,1", "--seeds must be different numbers; 1 is there twice in 1,1"),
    ("--grid lr=1 --seeds 1,x", "--seeds must be whole numbers of at least 0, like 1,1000,10000; got 'x'"),
    ("--grid lr=1 --seeds -1", "--seeds must be whole numbers of at least 0, like 1,1000,10000; got '-1'"),
    (f"--grid lr=1 --seeds {2**63}", f"cell lr=1 with seed {2**63}: --seed must be less than 2^63"),
    ("--grid lr=1 -- --lr 1", "--lr is an axis of the grid already"),
    ("--grid cov_coeff=1 -- --cov-coeff=1", "--cov-coeff is an axis of the grid already"),
    ("--grid lr=1 -- --seed 1", "--seed is the sweep's own: name all seeds with --seeds"),
    ("--grid lr=1 -- --out x", "--out is the sweep's own: name its folder before --"),
    ("--grid lr=1 -- --resume x", "--resume is not needed: the same command goes on"),
    ("--grid lr=1 -- --steps 0", "--steps must be at least 1, got 0"),
    ("--grid lr=1 -- --colour red", "there is no flag --colour"),
    ("--grid lr=1 --steps 2", "--steps is not a flag of this command; the trainer's follow --: -- --steps 2"),
    ("--seeds 1", "--seeds needs --grid"),
    ("-- --lr 1", "-- --lr 1 needs --grid"),
    ("", "runs/sweep holds no sweep (sweep.json is not there); a new one needs --grid"),
    ("--report_only", "runs/sweep holds no sweep (sweep.json is not there)"),
    ("--report_only --grid lr=1", "--report_only reports the sweep in --out as it was asked for; it takes no --grid"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[arguments for arguments, _ in REFUSED])
def test_what_cannot_be_served_is_one_line_before_anything_is_made(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {'--out ' if message.startswith('runs') else ''}{message}"), line
    assert not list(tmp_path.iterdir())


# ---- how far a run is ----


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return planned(tmp_path, "lr=1e-3", seeds=(1,))[0]


def test_a_run_is_finished_when_its_last_epoch_was_evaluated_and_all_is_written(run: Run) -> None:
    state = read_state(leave_finished(run, 0.25) and run)
    assert (state.status, state.epochs, state.row["map"]) == ("finished", 2, 0.25)


def test_a_run_that_was_stopped_half_way_is_not_finished(run: Run) -> None:
    assert read_state(run).status == "not begun"
    leave(run)  # the checkpoint of the beginning
    assert read_state(run).status == "begun"
    leave(run, row(1, 30, 0.2))
    assert (read_state(run).status, read_state(run).epochs, read_state(run).row["map"]) == ("begun", 1, 0.2)
    # Within the second epoch; the rows are those of the first.
    leave(run, row(1, 30, 0.2), epoch=1, cut_short=row(2, 45, 0.2))
    assert read_state(run).status == "begun"


def test_a_run_at_its_last_epoch_that_was_not_evaluated_there_is_not_finished(run: Run) -> None:
    leave(run, row(1, 30, 0.2), row(2, 60, None))
    assert (read_state(run).status, read_state(run).row["map"]) == ("begun", 0.2)  # that of the epoch before
    leave(run, row(1, 30, 0.2), row(2, 60, 0.2), epoch=2, cut_short=row(3, 70, None))
    assert read_state(run).status == "begun"


@pytest.mark.packages("safetensors")
@pytest.mark.parametrize("missing", ["pictures", "weights"])
def test_a_run_whose_last_files_are_missing_is_not_finished(missing: str, run: Run) -> None:
    leave(run, row(1, 30, 0.2), row(2, 60, 0.2), **{missing: False})
    assert read_state(run).status == "begun"


def test_a_run_of_few_steps_is_finished_within_its_epoch(tmp_path: Path) -> None:
    (run,) = planned(tmp_path, "lr=1e-3", seeds=(1,), flags=(*FLAGS, "--max_steps", "45"))
    leave(run, row(1, 30, 0.2), epoch=1, cut_short=row(2, 44, 0.2))
    assert read_state(run).status == "begun"
    leave(run, row(1, 30, 0.2), epoch=1, cut_short=row(2, 45, 0.3))
    assert (read_state(run).status, read_state(run).row["map"]) == ("finished", 0.3)


def test_a_damaged_checkpoint_is_a_broken_run(run: Run) -> None:
    (leave_finished(run, 0.25) / CHECKPOINT_NAME).write_bytes(b"nothing")
    state = read_state(run)
    assert state.status == "broken"
    assert str(run.folder / CHECKPOINT_NAME) in state.reason


def test_the_trainers_own_folder_is_read_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run, stopped by a signal within its second epoch, and resumed to its end."""
    (run,) = planned(tmp_path, "lr=1e-3", seeds=(1,), flags=(*TINY, "--cache_dir", str(tmp_path / "cache")))
    train_epoch = Trainer._train_epoch

    def stopped_in_the_second(trainer: Trainer, *rest: object) -> bool:
        if trainer.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_epoch(trainer, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_train_epoch", stopped_in_the_second)
    stopped = run_from_command_line(parse_config([*run.flags, "--out", str(run.folder)]))
    assert stopped == 128 + signal.SIGTERM
    assert (read_state(run).status, read_state(run).epochs) == ("begun", 1)
    monkeypatch.undo()
    assert one_run.train_command(run.folder, run.flags)[-2:] == ["--resume", str(run.folder)]
    assert run_from_command_line(parse_config(one_run.train_command(run.folder, run.flags)[4:])) == 0
    state = read_state(run)
    assert (state.status, state.epochs) == ("finished", 2)
    last = list(csv.DictReader((run.folder / "metrics.csv").open()))[-1]
    assert state.row["map"] == float(last["map"])


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


def test_where_and_when_a_run_writes_may_change(run: Run) -> None:
    leave(run, row(1, 30, 0.2), log_every=7, checkpoint_every=3, cache_dir="/elsewhere", device="cuda", out="x")
    assert read_state(run).status == "begun"


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
