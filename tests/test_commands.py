"""The commands around a run: evaluate it again, and compare numbers of prediction steps."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from fastjepa import compare_steps, evaluate
from fastjepa.training.command_line import parse_config
from fastjepa.training.trainer import Trainer

pytestmark = pytest.mark.packages("tyro", "torchmetrics", "cv2", "sklearn")

TINY = (
    "--device cpu --preset demo --henc 2 --hpre 2 --dstc 4 --canvas 16 --digit_size 8 --n_train 6 --n_val 5 "
    "--n_frames 5 --batch_size 3 --epochs 1"
).split()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    Trainer(parse_config([*TINY, "--cache_dir", str(cache), "--out", str(folder)])).run()
    return folder


@pytest.mark.parametrize("options", [[], ["--literal"], ["--batch_size", "2"]])
def test_evaluating_again_gives_the_metrics_of_the_run(
    run: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main(["--checkpoint", str(run), "--device", "cpu", "--json", str(tmp_path / "again.json"), *options])
    again = json.loads((tmp_path / "again.json").read_text())
    (row,) = csv.DictReader((run / "metrics.csv").open())
    # AP per batch depends on the batches; everything else does not.
    names = [name for name in again if not ("--batch_size" in options and name.startswith(("ap_", "map")))]
    assert "pooled_ap_0" in names
    for name in names:
        # After two steps probabilities are nearly equal, and another way of computing them swaps a few ranks.
        ranks = "ap_" in name or "map" in name
        assert again[name] == pytest.approx(float(row[name]), rel=1e-2 if ranks and options else 1e-5), name
    assert "AP_0" in capsys.readouterr().out


def test_evaluating_what_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--checkpoint", str(tmp_path)])
    assert stopped.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_comparing_steps_and_calling_again(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--out", str(tmp_path / "steps"), "--cache_dir", str(cache), *TINY]
    assert compare_steps.main(["--steps", "1", "2", *flags]) == 0
    picture = tmp_path / "steps" / "steps.png"
    assert picture.stat().st_size > 1000
    configs = [json.loads((tmp_path / "steps" / f"steps-{k}" / "config.json").read_text()) for k in (1, 2)]
    assert [config["steps"] for config in configs] == [1, 2]
    before = (tmp_path / "steps" / "steps-1" / "metrics.csv").read_bytes()
    assert compare_steps.main(["--steps", "1", "2", *flags]) == 0  # finished runs are not repeated
    assert (tmp_path / "steps" / "steps-1" / "metrics.csv").read_bytes() == before
    with pytest.raises(SystemExit):
        compare_steps.main(["--resume", "x"])
    assert "--resume is not needed" in capsys.readouterr().err
