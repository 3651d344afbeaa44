"""Whole runs, in this process and as real ones that are killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastjepa
from fastjepa.files.safe_files import CheckpointError
from fastjepa.moving_mnist import write_shards
from fastjepa.storage.checkpoint import load_checkpoint, save_checkpoint
from fastjepa.storage.run_folder import CHECKPOINT_NAME
from fastjepa.training.command_line import parse_config
from fastjepa.training.run_clips import load_run_clips
from fastjepa.training.trainer import NonFiniteLossError, Trainer

pytestmark = pytest.mark.packages("tyro", "torchmetrics", "cv2", "sklearn")

ROOT = Path(__file__).parent.parent
# 7 steps an epoch, the last batch ragged.
TINY = (
    "--device cpu --preset demo --henc 2 --hpre 2 --dstc 4 --canvas 16 --digit_size 8 --n_train 20 --n_val 5 "
    "--n_frames 5 --batch_size 3 --epochs 3 --log_every 4 --checkpoint_every 2"
).split()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def trainer(cache: Path, *flags: str) -> Trainer:
    return Trainer(parse_config([*TINY, "--cache_dir", str(cache), *flags]))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    modules = load_checkpoint(folder / CHECKPOINT_NAME)["modules"]
    return {f"{root}.{name}": value for root, module in modules.items() for name, value in module.items()}


def assert_same_run(actual: Path, expected: Path) -> None:
    """Bitwise equal weights and buffers, and equal metrics but for the time they took."""
    a, b = weights(actual), weights(expected)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    rows = [list(csv.DictReader((folder / "metrics.csv").open())) for folder in (actual, expected)]
    for row in (*rows[0], *rows[1]):
        row.pop("seconds")
    assert rows[0] == rows[1]


@pytest.fixture(scope="module")
def uninterrupted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run = trainer(cache, "--out", str(folder))
    run.run()
    run.finish()
    return folder


def test_what_a_run_leaves(uninterrupted: Path) -> None:
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["henc"] == 2
    assert config["preset"] == "demo"
    assert json.loads((uninterrupted / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    rows = list(csv.DictReader((uninterrupted / "metrics.csv").open()))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "7"), ("2", "14"), ("3", "21")]
    assert float(rows[2]["total"]) < float(rows[0]["total"])  # 14 steps on 20 clips do reduce the loss
    assert {"ap_0", "ap_1", "map", "pooled_map", "positive_share", "recon_loss"} <= rows[0].keys()
    for name in ("rollout.png", "rollout.gif", "ap.png", "training.png"):
        assert (uninterrupted / "figures" / name).stat().st_size > 1000
    assert list((uninterrupted / "tensorboard").glob("events*"))
    model = fastjepa.load_pretrained(uninterrupted / "pretrained")
    video = torch.rand(1, 1, 3, 16, 16)
    assert model.rollout(video, steps=2).shape == (1, 4, 5, 16, 16)
    assert not list(uninterrupted.rglob("*.tmp*"))


def test_two_runs_are_equal_bit_for_bit(cache: Path, uninterrupted: Path, tmp_path: Path) -> None:
    trainer(cache, "--out", str(tmp_path / "again")).run()
    assert_same_run(tmp_path / "again", uninterrupted)


def test_stopped_by_max_steps_and_resumed(cache: Path, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = trainer(cache, "--out", str(folder), "--max_steps", "9")
    assert first.run() is not None  # it is evaluated where it stops, in mid-epoch
    assert first.global_step == 9
    Trainer(parse_config(["--resume", str(folder), "--max_steps", "100"])).run()
    assert_same_run(folder, uninterrupted)


def start(cache: Path, *flags: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    if "--resume" not in flags:
        command += [*TINY, "--cache_dir", str(cache)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_step(process: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    path, deadline = folder / CHECKPOINT_NAME, time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and load_checkpoint(path)["progress"]["global_step"] >= step:
            return
        time.sleep(0.005)
    assert process.stdout is not None
    pytest.fail(f"the run never wrote a checkpoint of step {step}: {process.stdout.read().decode()[-2000:]}")


def test_killed_twice_and_resumed(cache: Path, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for flags, step in ((["--out", str(folder)], 4), (["--resume", str(folder)], 9)):
        process = start(cache, *flags)
        wait_for_step(process, folder, step)
        process.kill()
        process.wait()
    last = start(cache, "--resume", str(folder))
    output = last.communicate()[0].decode()
    assert last.returncode == 0, output
    assert "wrote:" in output
    assert_same_run(folder, uninterrupted)


def test_sigterm_saves_and_says_how_to_go_on(cache: Path, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(cache, "--out", str(folder), "--checkpoint_every", "1")
    wait_for_step(process, folder, 2)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0].decode()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert f"train.py --resume {folder}" in output
    Trainer(parse_config(["--resume", str(folder)])).run()
    assert_same_run(folder, uninterrupted)


def test_a_non_finite_loss_stops_with_the_checkpoint_intact(cache: Path, tmp_path: Path) -> None:
    run = trainer(cache, "--out", str(tmp_path / "run"), "--checkpoint_every", "100", "--log_every", "1")
    with torch.no_grad():
        run.jepa.encoder.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"became NaN or infinite at or before step 1\..*try a smaller --lr"):
        run.run()
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_resume_with_another_configuration(
    cache: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--resume", str(uninterrupted), "--lr", "0.5", "--henc", "4"])
    error = capsys.readouterr().err
    assert "henc: 2 in the checkpoint, 4 now" in error
    assert "lr: 0.003 in the checkpoint, 0.5 now" in error
    with pytest.raises(SystemExit):
        parse_config(["--resume", str(uninterrupted), "--out", "elsewhere"])
    assert "--out cannot be given with --resume" in capsys.readouterr().err


def test_resume_with_other_clips(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    trainer(cache, "--out", str(folder), "--max_steps", "2").run()
    monkeypatch.setattr("fastjepa.moving_mnist.ClipSet.fingerprint", lambda _: "other")
    with pytest.raises(CheckpointError, match="trained on other clips"):
        Trainer(parse_config(["--resume", str(folder)]))


def test_folders(cache: Path, uninterrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a run already: continue it with --resume"):
        trainer(cache, "--out", str(uninterrupted))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"--out .* cannot be written"):
        trainer(cache, "--out", str(tmp_path / "file" / "run"))


def test_a_checkpoint_from_before_rows_that_were_cut_short_were_kept(cache: Path, tmp_path: Path) -> None:
    """Its run is evaluated again, to the same numbers."""

    def rows() -> list[dict[str, str]]:
        return [row for row in csv.DictReader((folder / "metrics.csv").open()) if row.pop("seconds")]

    folder = tmp_path / "run"
    trainer(cache, "--out", str(folder), "--max_steps", "9").run()
    state, before = load_checkpoint(folder / CHECKPOINT_NAME), rows()
    del state["cut_short"]
    save_checkpoint(folder / CHECKPOINT_NAME, state)
    resumed = Trainer(parse_config(["--resume", str(folder)]))
    assert resumed.run() is not None
    assert resumed.global_step == 9
    assert rows() == before
    assert [row["step"] for row in before] == ["7", "9"]


def test_a_run_on_clips_streamed_from_disk_is_that_on_resident_ones(
    uninterrupted: Path, cache: Path, tmp_path: Path
) -> None:
    """Also one that is stopped within an epoch and goes on."""
    for name, clips in zip(("train", "validation"), load_run_clips(parse_config(TINY), cache), strict=True):
        write_shards(clips, tmp_path / "shards" / name, clips_per_shard=6)
    streamed = ["--data", "shards", "--data_path", str(tmp_path / "shards"), "--out", str(tmp_path / "run")]
    trainer(cache, *streamed, "--max_steps", "9").run()
    Trainer(parse_config(["--resume", str(tmp_path / "run"), "--max_steps", "100"])).run()
    assert_same_run(tmp_path / "run", uninterrupted)
