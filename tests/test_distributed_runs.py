"""Whole runs of several processes: what they leave, how they end, and how they go on."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastjepa.distributed.launch import Launch
from fastjepa.environment import ROOT
from fastjepa.moving_mnist import write_shards
from fastjepa.storage.checkpoint import load_checkpoint
from fastjepa.storage.folder_lock import LOCK_NAME
from fastjepa.storage.run_folder import CHECKPOINT_NAME
from fastjepa.training.command_line import parse_config
from fastjepa.training.evaluation import evaluate
from fastjepa.training.run_clips import load_run_clips
from fastjepa.training.trainer import Trainer
from several import TRAIN, Ended, ended, run, started

pytestmark = pytest.mark.packages("tyro", "torchmetrics", "cv2", "sklearn")

# 3 steps an epoch, the last batch of 1 clip: of 2 processes one has nothing of it. Two epochs, 6 steps.
TINY = (
    "--device cpu --preset demo --henc 2 --hpre 2 --dstc 4 --canvas 16 --digit_size 8 --n_train 9 --n_val 9 "
    "--n_frames 5 --batch_size 4 --epochs 2 --lr 1e-3 --log_every 4 --checkpoint_every 2 --timeout_minutes 1"
).split()
FAULTS = [sys.executable, str(ROOT / "tests" / "several_faults.py")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def flags(cache: Path, folder: Path, *more: str) -> list[str]:
    return [*TINY, "--cache_dir", str(cache), "--out", str(folder), *more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    modules = load_checkpoint(folder / CHECKPOINT_NAME)["modules"]
    return {f"{root}.{name}": value for root, module in modules.items() for name, value in module.items()}


def rows(folder: Path) -> list[dict[str, float]]:
    found = [
        {name: float(value) for name, value in row.items()} for row in csv.DictReader((folder / "metrics.csv").open())
    ]
    for row in found:
        row.pop("seconds")
    return found


def assert_same_run(actual: Path, expected: Path) -> None:
    """Bitwise equal weights and buffers, and equal metrics."""
    a, b = weights(actual), weights(expected)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert rows(actual) == rows(expected)


def assert_close_run(actual: Path, expected: Path) -> None:
    """Losses to what fp32 keeps of another order of summation after a few steps of Adam; average precision, which jumps
    where two scores change places, about.
    """
    for a, b in zip(rows(actual), rows(expected), strict=True):
        assert a.keys() == b.keys()
        losses = {name: value for name, value in b.items() if not re.search(r"ap(_\d)?$", name)}
        assert len(losses) == len(b) - 6  # two horizons, their mean, and the same pooled
        assert {name: a[name] for name in losses} == pytest.approx(losses, rel=1e-5, abs=0)
        assert a == pytest.approx(b, rel=1e-5, abs=5e-3)


def assert_one_says(endings: list[Ended], *parts: str, status: int = 2) -> None:
    """All end so, and only the first says why, in one line."""
    assert [ending.status for ending in endings] == [status] * len(endings), endings
    first, *others = endings
    assert all(part in first.error for part in parts), first.error
    assert first.error.count("error:") == 1
    assert "Traceback" not in first.error
    assert [other.out + other.error for other in others] == [""] * len(others)


@pytest.fixture(scope="module")
def alone(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "alone"
    assert run(1, [*TRAIN, *flags(cache, folder)])[0].status == 0
    return folder


@pytest.fixture(scope="module")
def two(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "two"
    endings = run(2, [*TRAIN, *flags(cache, folder)])
    assert [ending.status for ending in endings] == [0, 0], endings
    first, second = endings
    assert "2 processes over gloo" in first.out
    assert "mAP" in first.out
    assert second.out + second.error == ""
    return folder


def test_a_run_of_two_is_that_of_one(two: Path, alone: Path) -> None:
    assert_close_run(two, alone)
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in alone.iterdir())
    assert load_checkpoint(two / CHECKPOINT_NAME)["progress"] | {"seconds": 0} == load_checkpoint(
        alone / CHECKPOINT_NAME
    )["progress"] | {"seconds": 0}


def assert_evaluated_as_by_one(folder: Path) -> None:
    """The metrics of the run's last row are, bit for bit, those of its checkpoint in one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer = Trainer(parse_config(["--resume", str(folder)]))
        found = evaluate(
            trainer.jepa, trainer.image_decoder, trainer.detection_head, trainer.val_clips, trainer.config.batch_size
        )
    finally:
        torch.set_num_threads(threads)
    last = rows(folder)[-1]
    assert {name: last[name] for name in found.as_row()} == found.as_row()


def test_the_evaluation_of_two_is_that_of_one_bit_for_bit(two: Path) -> None:
    """Three batches: the first process has two of them."""
    assert_evaluated_as_by_one(two)


def test_a_checkpoint_of_two_goes_on_with_three_and_with_one(cache: Path, two: Path, tmp_path: Path) -> None:
    assert [e.status for e in run(2, [*TRAIN, *flags(cache, tmp_path / "3", "--max_steps", "2")])] == [0, 0]
    shutil.copytree(tmp_path / "3", tmp_path / "1")
    for n in (3, 1):
        folder = tmp_path / str(n)
        endings = run(n, [*TRAIN, "--resume", str(folder), "--max_steps", "100"])
        assert [ending.status for ending in endings] == [0] * n, endings
        assert_close_run(folder, two)


def test_statistics_of_each_process_alone_are_other_numbers_and_said(cache: Path, two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first, second = run(2, [*TRAIN, *flags(cache, folder, "--no-sync_stats", "--checkpoint_every", "4")])
    assert (first.status, second.status) == (0, 0), first.error
    assert "these are not the numbers of one process" in first.out
    own, of_all = rows(folder), rows(two)
    assert own[0]["total"] != pytest.approx(of_all[0]["total"], rel=1e-4)  # ten times what rounding leaves
    assert own[1]["total"] == pytest.approx(of_all[1]["total"], rel=0.2)
    assert_evaluated_as_by_one(folder)  # also what the second process evaluated, which has other running statistics


# ---- what a user can mend ----


def test_a_batch_smaller_than_the_processes_is_refused(cache: Path, tmp_path: Path) -> None:
    endings = run(2, [*TRAIN, *flags(cache, tmp_path / "run", "--batch_size", "1")])
    assert_one_says(endings, "--batch_size 1 is less than the 2 processes")
    assert not (tmp_path / "run").exists()


def test_flags_that_differ_are_named(cache: Path, tmp_path: Path) -> None:
    command = " ".join([*TRAIN, *flags(cache, tmp_path / "run"), "--lr 1e-$((RANK+2)) --steps $((RANK+1))"])
    endings = run(2, ["sh", "-c", f"exec {command}"])
    assert_one_says(endings, "--lr (0.01 on process 0, 0.001 on process 1)", "--steps (1 on process 0, 2 on process 1)")


def test_flags_that_one_process_cannot_parse_end_all(cache: Path, tmp_path: Path) -> None:
    command = " ".join([*TRAIN, *flags(cache, tmp_path / "run"), "--lr $((1-RANK))"])
    first, second = run(2, ["sh", "-c", f"exec {command}"])
    assert (first.status, second.status) == (2, 2)
    assert "on process 1 of 2: error: --lr must be a positive number, got 0" in first.error
    assert second.error == ""


def test_a_folder_that_cannot_be_written_ends_all(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    endings = run(2, [*TRAIN, *flags(cache, tmp_path / "run")])
    assert_one_says(endings, f"--out {tmp_path / 'run'} cannot be written", "it is a file")


def test_an_error_of_another_process_is_told_by_the_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    without_cache = [*TINY, "--out", str(tmp_path / "run")]
    # Of the second only, the cache cannot be written: it lies in the home folder.
    home = lambda rank: {"HOME": str(tmp_path / ("file" if rank else "home")), "XDG_CACHE_HOME": ""}  # noqa: E731
    endings = run(2, [*TRAIN, *without_cache], home)
    assert_one_says(endings, "process 1 of 2:", "file")
    assert not (tmp_path / "run" / LOCK_NAME).exists()


@pytest.mark.parametrize("missing", ["MASTER_PORT", "LOCAL_RANK"])
def test_a_missing_variable_of_the_launch_is_named(cache: Path, tmp_path: Path, missing: str) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    environment.pop(missing)
    kept = {name: value for name, value in os.environ.items() if name != missing}
    done = subprocess.run(
        [*TRAIN, *flags(cache, tmp_path / "run")], env=kept | environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"lacks {missing}; start with torchrun" in done.stderr
    assert "Traceback" not in done.stderr


# ---- faults ----


def test_sigterm_to_all_saves_once_and_the_run_goes_on(cache: Path, two: Path, tmp_path: Path) -> None:
    """The signal reaches them at different steps; they stop at one."""
    folder = tmp_path / "run"
    faults = "term:0:1,term:1:0"
    endings = run(2, [*FAULTS, faults, *flags(cache, folder, "--checkpoint_every", "100")])
    assert [ending.status for ending in endings] == [128 + signal.SIGTERM] * 2, endings
    saved = re.findall("checkpoint of step (.*)", endings[0].out)
    assert saved[0] == "0"  # when it began
    assert len(saved) == 2
    assert saved[1] in ("1", "2")
    assert "stopped by SIGTERM; continue with: torchrun --nproc_per_node 2" in endings[0].out
    assert endings[0].error.count("error") == 0
    assert not (folder / LOCK_NAME).exists()
    assert load_checkpoint(folder / CHECKPOINT_NAME)["progress"]["global_step"] == int(saved[1])
    assert [ending.status for ending in run(2, [*TRAIN, "--resume", str(folder)])] == [0, 0]
    assert_same_run(folder, two)


@pytest.mark.parametrize("where", ["hang", "evaluate"])
def test_a_process_that_hangs_ends_the_others_by_the_timeout(where: str, cache: Path, tmp_path: Path) -> None:
    command = [*FAULTS, f"{where}:1:3", *flags(cache, tmp_path / "run", "--timeout_minutes", "0.1")]
    with started(2, command) as processes:
        (first,) = ended(processes[:1])
    assert first.status == 2
    assert "process 0 of 2 lost the others at step 3" in first.error
    assert "has not answered for 0.1 minutes (--timeout_minutes)" in first.error
    assert "Traceback" not in first.error
    saved = load_checkpoint(tmp_path / "run" / CHECKPOINT_NAME)["progress"]["global_step"]
    assert saved == (3 if where == "hang" else 2)  # the one of the end of the epoch comes after its evaluation


def test_an_error_within_a_step_ends_all(cache: Path, tmp_path: Path) -> None:
    first, second = run(2, [*FAULTS, "raise:1:1", *flags(cache, tmp_path / "run")])
    assert (first.status, second.status) == (2, 2)
    assert "the disk of this process is on fire" in second.error
    assert "lost the others at step" in first.error


def test_torchrun_starts_a_killed_run_again_and_it_ends_as_if_nothing_had_been(
    cache: Path, two: Path, tmp_path: Path
) -> None:
    """A real process is killed before its fifth step; the last checkpoint is of the fourth."""
    folder = tmp_path / "run"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--max-restarts",
        "1",
    ]
    script = [*FAULTS[1:], "kill:1:5", *flags(cache, folder)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([*torchrun, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = re.findall("checkpoint of step (.*)", done.stdout)
    assert saved == ["0", "2", "3", "4", "6", "6"]  # and none of the first two twice
    assert_same_run(folder, two)


def test_torchrun_with_restarts_needs_a_folder(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch = Launch(0, 2, max_restarts=2)
    with pytest.raises(SystemExit):
        parse_config(flags(cache, Path("x"))[:-2], launch=launch)
    assert "torchrun --max-restarts needs --out" in capsys.readouterr().err
    assert parse_config(flags(cache, Path("x")), launch=launch).out == Path("x")


def test_torchrun_with_restarts_goes_on_with_the_run_in_out(cache: Path, two: Path) -> None:
    """Whichever start it is: hosts count their restarts differently."""
    again = parse_config(flags(cache, two), launch=Launch(0, 2, max_restarts=2))
    assert again.resume == again.out == two
    with pytest.raises(SystemExit):  # another run than that
        parse_config(flags(cache, two, "--steps", "3"), launch=Launch(0, 2, max_restarts=2))
    assert parse_config(flags(cache, two), launch=Launch(0, 2)).resume is None


def test_a_signal_to_all_processes_also_to_those_that_read_shards(cache: Path, tmp_path: Path) -> None:
    for name, clips in zip(("train", "validation"), load_run_clips(parse_config(TINY), cache), strict=True):
        write_shards(clips, tmp_path / "shards" / name, clips_per_shard=4)
    shards = ["--data", "shards", "--data_path", str(tmp_path / "shards")]
    (one,) = run(1, [*FAULTS, "group:0:1", *flags(cache, tmp_path / "run", *shards)])
    assert one.status == 128 + signal.SIGTERM, one
    assert one.out.count("received SIGTERM") == 1
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT_NAME)["progress"]["global_step"] == 2


def test_a_checkpoint_by_the_clock(cache: Path, tmp_path: Path) -> None:
    clock = ["--checkpoint_every", "100", "--checkpoint_minutes", "0.0001", "--max_steps", "2"]
    first, second = run(2, [*FAULTS, "", *flags(cache, tmp_path / "run", *clock)])
    assert (first.status, second.status) == (0, 0), first.error
    assert re.findall("checkpoint of step (.*)", first.out) == ["0", "1", "2", "2"]
