"""Whole runs with graphed steps, and with a trace. On a CPU the choice is forced: the same code runs plainly."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fastjepa.config import Config
from fastjepa.execution import ExecutionConfig
from fastjepa.fused.auto import resolve_execution
from fastjepa.graphs import GraphedRollout, make_capturable
from fastjepa.storage.checkpoint import load_checkpoint
from fastjepa.storage.run_folder import CHECKPOINT_NAME
from fastjepa.training import launches
from fastjepa.training import trainer as trainer_module
from fastjepa.training.command_line import parse_config
from fastjepa.training.stop_signals import Interrupted
from fastjepa.training.trainer import NonFiniteLossError, Trainer

# 3 steps an epoch, the last batch ragged.
TINY = (
    "--preset demo --henc 2 --hpre 2 --dstc 4 --canvas 16 --digit_size 8 --n_train 8 --n_val 3 --n_frames 5 "
    "--batch_size 3 --epochs 2 --log_every 2 --checkpoint_every 2"
).split()

pytestmark = [
    pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True"),
    pytest.mark.packages("tyro", "torchmetrics", "cv2", "sklearn"),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def set_graphs(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    """Begin and resume runs with the objects of graphs, which a CPU runs plainly, or without."""

    def resolved(*arguments: Any, **options: Any) -> tuple[ExecutionConfig, str]:
        return dataclasses.replace(resolve_execution(*arguments, **options)[0], cuda_graph=on), ""

    monkeypatch.setattr("fastjepa.training.execution.resolve_execution", resolved)
    monkeypatch.setattr("fastjepa.training.execution.use_cuda_graph", lambda *_, **__: on)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    set_graphs(monkeypatch, True)


def trainer(cache: Path, folder: Path, *flags: str, device: str = "cpu") -> Trainer:
    return Trainer(parse_config([*TINY, "--device", device, "--cache_dir", str(cache), "--out", str(folder), *flags]))


def assert_same_run(actual: Path, expected: Path) -> None:
    """Bitwise equal weights, buffers and state of Adam, and sums of losses."""
    a, b = (load_checkpoint(folder / CHECKPOINT_NAME) for folder in (actual, expected))
    for module in a["modules"]:
        for name, value in a["modules"][module].items():
            assert torch.equal(value, b["modules"][module][name]), name
    for index, state in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][index][name]) for name, value in state.items())
    for row, other in zip(a["rows"], b["rows"], strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}


@pytest.mark.parametrize(
    "device", [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
)  # fmt: skip
def test_a_graphed_run_is_the_plain_run_and_resumes_exactly(
    cache: Path, tmp_path: Path, graphs: None, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    run = trainer(cache, tmp_path / "whole", device=device)
    run.run()
    assert run.graphed_step is not None
    # Two full ones, one, and the ragged one; evaluations and checkpoints in between cost none.
    assert run.graphed_step.recordings_made == 3
    assert run.epoch_losses.count_nonzero() == 0
    assert run.graphed_rollout is not None
    assert run.graphed_rollout.recordings_made == 1  # the same for both evaluations

    trainer(cache, tmp_path / "stopped", "--max_steps", "4", device=device).run()
    resumed = Trainer(parse_config(["--resume", str(tmp_path / "stopped"), "--max_steps", "100"]))
    assert resumed.global_step == 4
    resumed.run()
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")

    set_graphs(monkeypatch, False)
    plain = trainer(cache, tmp_path / "plain", device=device)
    assert plain.graphed_rollout is None
    make_capturable(plain.optimizer)  # the same Adam
    if device == "cuda":  # and the same evaluation, to the last rounding, of which a rank may depend
        plain.graphed_rollout = GraphedRollout(plain.jepa, fold_batch_norm=True)
    plain.run()
    assert plain.graphed_step is None
    assert_same_run(tmp_path / "plain", tmp_path / "whole")


# ---- several steps in one launch -------------------------------------------------------------------------------------


class Watched:
    """A run whose every checkpoint is kept, and the size of every launch."""

    def __init__(self, cache: Path, folder: Path, flags: str, most: int, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.checkpoints, self.launches = folder, list[dict[str, Any]](), list[int]()
        save, step = trainer_module.save_checkpoint, Trainer._step

        def kept(path: Path, state: dict[str, Any]) -> None:
            self.checkpoints.append(copy.deepcopy(state))
            save(path, state)

        def counted(trainer: Trainer, indices: torch.Tensor, *others: Any) -> None:
            self.launches.append(1 if indices.dim() == 1 else len(indices))
            step(trainer, indices, *others)

        random.seed(0)  # its state, which is in a checkpoint, is the process's
        with patch.context() as during:
            during.setattr(launches, "MOST_STEPS", most)
            during.setattr(trainer_module, "save_checkpoint", kept)
            during.setattr(Trainer, "_step", counted)
            trainer(cache, folder, *flags.split()).run()

    def metrics(self) -> list[dict[str, str]]:
        return [row for row in csv.DictReader((self.folder / "metrics.csv").open()) if row.pop("seconds")]


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Bit for bit, but for the seconds that steps took and the folder."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds", "out"}:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


# 6 full batches an epoch and a ragged one, unless told otherwise; the sizes of the launches.
SEVERAL = {
    "--log_every 4 --checkpoint_every 8": [4, 1, 1, 1, 1, 4, 1, 1],
    "--log_every 3 --checkpoint_every 5": [3, *[1] * 11],  # of which neither divides the other
    "--log_every 50 --checkpoint_every 70": [3, 3, 1, 3, 3, 1],
    "--log_every 50 --checkpoint_every 70 --n_train 18": [3, 3, 3, 3],  # no ragged batch
    "--log_every 50 --checkpoint_every 70 --max_steps 11": [3, 3, 1, 3, 1],
    "--log_every 1": [1] * 14,
    "--batch_size 25": [1, 1],  # no full batch
}


@pytest.mark.parametrize("flags", SEVERAL)
def test_launches_of_several_steps_change_nothing(
    cache: Path, tmp_path: Path, graphs: None, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    """Every checkpoint on the way, and metrics.csv, are those of single steps, bit for bit."""
    most = 3 if "50" in flags else 10
    flags = flags if "n_train" in flags else f"{flags} --n_train 20"
    several = Watched(cache, tmp_path / "several", flags, most, monkeypatch)
    single = Watched(cache, tmp_path / "single", flags, 1, monkeypatch)
    assert several.launches == SEVERAL[flags.removesuffix(" --n_train 20")]
    assert single.launches == [1] * sum(several.launches)
    assert [c["progress"]["global_step"] for c in several.checkpoints] == [
        c["progress"]["global_step"] for c in single.checkpoints
    ]
    assert_equal(several.checkpoints, single.checkpoints)
    assert several.metrics() == single.metrics()


def test_a_stop_signal_waits_for_the_launch_and_the_run_goes_on_exactly(
    cache: Path, tmp_path: Path, graphs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--log_every 4 --checkpoint_every 50 --n_train 20"
    single = Watched(cache, tmp_path / "single", flags, 1, monkeypatch)
    step = Trainer._step

    def signalled(run: Trainer, *arguments: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        step(run, *arguments)

    with monkeypatch.context() as once:
        once.setattr(Trainer, "_step", signalled)
        with pytest.raises(Interrupted):
            trainer(cache, tmp_path / "stopped", *flags.split()).run()
    assert load_checkpoint(tmp_path / "stopped" / CHECKPOINT_NAME)["progress"]["global_step"] == 4
    # Stopped once more, at a step that no launch of 4 ends with, and with other intervals from there on.
    Trainer(parse_config(["--resume", str(tmp_path / "stopped"), "--max_steps", "9"])).run()
    Trainer(parse_config(["--resume", str(tmp_path / "stopped"), "--max_steps", "99", "--log_every", "3"])).run()
    assert_same_run(tmp_path / "stopped", tmp_path / "single")
    assert_equal(load_checkpoint(tmp_path / "stopped" / CHECKPOINT_NAME)["rows"], single.checkpoints[-1]["rows"])


def test_a_trace_is_of_single_steps(cache: Path, tmp_path: Path, graphs: None) -> None:
    assert trainer(cache, tmp_path / "plain").steps_per_launch == 2
    assert trainer(cache, tmp_path / "profiled", "--profile").steps_per_launch == 1


def test_without_a_graph_steps_are_launched_one_by_one(cache: Path, tmp_path: Path) -> None:
    assert trainer(cache, tmp_path / "run").steps_per_launch == 1


def test_a_run_may_go_on_without_graphs(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for first in (True, False):
        set_graphs(monkeypatch, first)
        folder = tmp_path / str(first)
        trainer(cache, folder, "--max_steps", "2").run()
        set_graphs(monkeypatch, not first)
        resumed = Trainer(parse_config(["--resume", str(folder), "--max_steps", "3", "--cuda_graph", "off"]))
        resumed.run()
        saved = load_checkpoint(folder / CHECKPOINT_NAME)
        assert saved["optimizer"]["state"][0]["step"] == 3
        assert [float(group["lr"]) for group in saved["optimizer"]["param_groups"]] == pytest.approx(
            [resumed.config.lr, resumed.config.lr / 10, resumed.config.lr]
        )


def test_a_non_finite_loss_stops_a_graphed_run(cache: Path, tmp_path: Path, graphs: None) -> None:
    run = trainer(cache, tmp_path / "run", "--checkpoint_every", "100", "--log_every", "1")
    with torch.no_grad():
        run.jepa.encoder.conv1.weight[0, 0, 0, 0] = float("nan")  # type: ignore[union-attr, operator]
    with pytest.raises(NonFiniteLossError, match=r"became NaN or infinite at or before step 1\."):
        run.run()
    weights = load_checkpoint(tmp_path / "run" / CHECKPOINT_NAME)["modules"]["jepa"]
    assert all(value.isfinite().all() for value in weights.values())


def test_a_graph_on_a_cpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--device", "cpu", "--cuda_graph", "on"])
    assert "--cuda_graph on needs a CUDA device, and this runs on cpu" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_config(["--device", "cpu", "--cuda_graph", "maybe"])
    with pytest.raises(ValueError, match="need a CUDA device"):
        Trainer(Config(device="cpu", preset="demo", n_train=3, n_val=1, canvas=16, digit_size=8, cuda_graph="on",
                       cache_dir=tmp_path, out=tmp_path / "run"))  # fmt: skip
    assert parse_config(["--device", "cpu"]).cuda_graph == "auto"


def test_profile_writes_a_trace(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(cache, tmp_path / "run", "--profile", "--epochs", "3")
    run.run()
    path = tmp_path / "run" / "trace.json"
    assert f"wrote a trace of training steps: {path}" in capsys.readouterr().out
    names = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
    assert {"data", "encode", "prediction step 1", "losses", "backward", "optimizer"} <= set(names)
    assert path in run.finish()


def test_profile_of_too_few_steps_says_so(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(cache, tmp_path / "run", "--profile", "--max_steps", "2").run()
    assert "no trace was recorded: too few training steps were made" in capsys.readouterr().out
    assert not (tmp_path / "run" / "trace.json").exists()
