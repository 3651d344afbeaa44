"""What a sweep is asked for: grids, seeds, the runs that they mean; and how far a run is."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path

import pytest

from fastjepa.config import Config
from fastjepa.storage.run_folder import CHECKPOINT_NAME
from fastjepa.sweep import main
from fastjepa.sweeping import one_run
from fastjepa.sweeping.grid import NAMED, SEEDS, parse_grid, parse_seeds
from fastjepa.sweeping.plan import NO_AXIS, Run
from fastjepa.sweeping.state import read_state
from fastjepa.training.command_line import parse_config, run_from_command_line
from fastjepa.training.trainer import Trainer
from made_up_sweep import FLAGS, TINY, leave, leave_finished, planned, row

pytestmark = pytest.mark.packages("tyro", "torchmetrics", "cv2", "sklearn", "matplotlib", "PIL")

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
    monkeypatch.setattr(one_run, "train_command", None)  # what is not refused would train for minutes
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {'--out ' if message.startswith('runs') else ''}{message}"), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("own", [[], ["--grid", "lr=1", "--slurm", "time=5"]])
def test_help_after_the_dashes_is_the_trainers(own: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*own, "--", "--help"], prog="fastjepa sweep")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: fastjepa sweep -- ")
    assert "--cov_coeff" in printed


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
    leave(run, row(1, 30, 0.2), row(2, 60, 0.2), step=75)  # it went on after its evaluation
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


def test_where_and_when_a_run_writes_may_change(run: Run) -> None:
    leave(run, row(1, 30, 0.2), log_every=7, checkpoint_every=3, cache_dir="/elsewhere", device="cuda", out="x")
    assert read_state(run).status == "begun"


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


def test_a_sweep_is_not_for_torchrun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main(["--grid", "lr=1", "--out", str(tmp_path / "sweep")])
    assert "each as one process; this is one of 2" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
