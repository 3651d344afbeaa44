"""The commands: `fastjepa` and its subcommands, evaluating a run again, comparing numbers of prediction steps."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import fastjepa
from absence import python, run_as_main, without
from bench import train as bench_train
from fastjepa import compare_steps, evaluate
from fastjepa.__main__ import COMMANDS
from fastjepa.__main__ import main as command
from fastjepa.graphs import GraphedRollout
from fastjepa.training.command_line import parse_config
from fastjepa.training.evaluation import Evaluation
from fastjepa.training.evaluation import evaluate as evaluation
from fastjepa.training.handed_on import refuse_flags, split_at_dashes
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


@pytest.mark.parametrize("options", [[], ["--original"], ["--batch_size", "2"]])
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


@pytest.mark.parametrize(
    ("flags", "trained_with_graphs", "expected"),
    [("", False, False), ("", True, True), ("--cuda_graph off", True, False), ("--cuda_graph on", False, True),
     ("--original", True, False)],
)  # fmt: skip
def test_evaluating_with_rollouts_in_one_launch(
    run: Path, flags: str, trained_with_graphs: bool, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a pretended GPU: auto does as the run did."""
    load = evaluate.load_run_and_execution

    def loaded(checkpoint: Path, device: torch.device) -> tuple[Any, ...]:
        execution, *rest = load(checkpoint, device)
        return dataclasses.replace(execution, cuda_graph=trained_with_graphs), *rest

    def chosen(choice: str, _: torch.device, *, auto: bool = True) -> bool:
        return choice == "on" or (choice == "auto" and auto)

    rollouts = []

    def noted(*arguments: Any, rollout: GraphedRollout | None, **options: Any) -> Evaluation:
        rollouts.append(rollout)
        return evaluation(*arguments, rollout=rollout, **options)

    monkeypatch.setattr(evaluate, "load_run_and_execution", loaded)
    monkeypatch.setattr(evaluate, "use_cuda_graph", chosen)
    monkeypatch.setattr(evaluate, "evaluate", noted)
    evaluate.main(["--checkpoint", str(run), "--device", "cpu", "--json", str(tmp_path / "a.json"), *flags.split()])
    (rollout,) = rollouts
    assert (rollout is not None) == expected
    assert rollout is None or rollout.recordings_made == 2  # of three clips, and of the two that are left
    (row,) = csv.DictReader((run / "metrics.csv").open())
    assert json.loads((tmp_path / "a.json").read_text())["pooled_map"] == pytest.approx(
        float(row["pooled_map"]), rel=1e-2
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cuda_graph on", "--cuda_graph on needs a CUDA device, and this runs on cpu"),
        ("--cuda_graph on --original", "--cuda_graph on is not supported with --original"),
    ],
)
def test_a_graph_that_cannot_be_served(run: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--checkpoint", str(run), "--device", "cpu", *flags.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_evaluating_what_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--checkpoint", str(tmp_path)])
    assert stopped.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_comparing_steps_and_calling_again(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--steps", "1", "2", "--out", str(tmp_path / "steps")]
    assert compare_steps.main([*own, "--", "--cache_dir", str(cache), *TINY]) == 0
    picture = tmp_path / "steps" / "steps.png"
    assert picture.stat().st_size > 1000
    configs = [json.loads((tmp_path / "steps" / f"steps-{k}" / "config.json").read_text()) for k in (1, 2)]
    assert [config["steps"] for config in configs] == [1, 2]
    before = (tmp_path / "steps" / "steps-1" / "metrics.csv").read_bytes()
    assert compare_steps.main([*own, "--cache_dir", str(cache), *TINY]) == 0  # finished runs are not repeated
    assert (tmp_path / "steps" / "steps-1" / "metrics.csv").read_bytes() == before


# ---- flags that are handed on to the trainer ----


def test_what_follows_the_dashes_is_the_trainers() -> None:
    assert split_at_dashes(["--out", "x", "--", "--lr", "1", "--"]) == (["--out", "x"], ["--lr", "1", "--"])
    assert split_at_dashes(["--out", "x"]) == (["--out", "x"], [])
    refuse_flags(["--outer", "out"], {"--out": "is taken"})
    with pytest.raises(ValueError, match=r"^--out is taken$"):
        refuse_flags(["--lr", "1", "--out=x"], {"--out": "is taken"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "x"], "error: --resume is not needed: calling the command again continues the comparison"),
        (["--", "--resume=x"], "error: --resume is not needed"),
        (["--", "--steps", "3"], "error: --steps is the comparison's own: name all numbers of steps before --"),
        (["--", "--out", "x"], "error: --out is the comparison's own"),
        (["--steps", "1", "0"], "error: --steps must be numbers of at least 1, got 0"),
        (["--", "--lr", "-1"], "--lr must be a positive number, got -1.0"),
        (["--", "--colour", "red"], "--colour"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_comparing_steps_refuses_before_it_trains(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        compare_steps.main(arguments)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "1"], "error: --lr is not a flag of this command; the trainer's follow --: -- --lr 1"),
        (["--sec", "1"], "error: --sec is not a flag of this command"),
        (["--", "--out", "y"], "error: --out is this command's own: name the folder before --"),
        (["--", "--resume", "y"], "error: --resume is not needed: the same command goes on"),
    ],
)
def test_timing_a_training_run_refuses_what_would_be_lost(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_train.main(["--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


# ---- the command `fastjepa` ----


def test_its_help_lists_every_command_and_its_version_names_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--help"]) == 0
    listed = re.findall(r"^  (\S+)  +\w", capsys.readouterr().out, re.MULTILINE)
    assert listed == list(COMMANDS)
    assert set(COMMANDS) == {"train", "evaluate", "rollout", "compare-steps", "sweep", "figures", "export"}
    assert command(["--version"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"fastjepa {fastjepa.__version__}, torch ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "--epochs", "1"], "there is no command 'trian'; did you mean train?"),
        (["compare_step"], "there is no command 'compare_step'; did you mean compare-steps?"),
        (["Evaluate"], "there is no command 'Evaluate'; did you mean evaluate?"),
        (["xyz"], f"there is no command 'xyz'; the commands are {', '.join(COMMANDS)}"),
        (["--epochs", "1"], f"there is no command '--epochs'; the commands are {', '.join(COMMANDS)}"),
        ([], f"no command was given; the commands are {', '.join(COMMANDS)}"),
    ],
)
def test_what_is_no_command_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(arguments) == 2
    assert capsys.readouterr().err == f"error: {message} (fastjepa --help)\n"


@pytest.mark.parametrize("name", [*COMMANDS, "compare_steps"])
def test_each_command_is_called_what_the_user_typed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command([name, "--help"], prog="python -m fastjepa")
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m fastjepa {name.replace('_', '-')} ")


@pytest.mark.packages("matplotlib", "PIL", "safetensors")
def test_a_run_from_the_command_to_its_pictures(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(["train", *TINY, "--cache_dir", str(cache), "--out", "run"]) == 0
    assert str(Path("run", "pretrained")) in capsys.readouterr().out.split()
    assert command(["evaluate", "--checkpoint", "run", "--device", "cpu"]) == 0
    assert command(["rollout", "--checkpoint", "run", "--horizon", "3", "--device", "cpu"]) == 0
    assert command(["figures", "run", "--compare", "compared.png"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run", "compared.png"}
    assert (tmp_path / "run" / "figures" / "rollout-3.gif").is_file()
    assert "mAP" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "words"), [("train", []), ("compare-steps", ["--steps", "1", "--"])])
def test_a_stopped_run_says_how_the_user_goes_on(
    name: str, words: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    step = Trainer._train_epoch

    def stopped_at_once(trainer: Trainer, *rest: object) -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_train_epoch", stopped_at_once)
    out = ["--out", "the run"] if name == "train" else []
    assert command([name, *words, *TINY, "--cache_dir", str(cache), *out]) == 128 + signal.SIGTERM
    _, _, hint = capsys.readouterr().out.strip().partition("continue with: ")
    assert hint.startswith(f"fastjepa {name} ")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert command(shlex.split(hint)[1:]) == 0


def test_a_missing_package_is_one_line() -> None:
    done = run_as_main(without("torch"), "fastjepa", "train")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"error: python -m fastjepa train needs the Python package torch, which is not installed; pip install torch\n",
        done.stderr,
    )


def test_interrupted_while_it_is_imported_is_one_line() -> None:
    code = (
        "import importlib, sys\nfrom fastjepa.__main__ import main\n"
        "def interrupted(name): raise KeyboardInterrupt\n"
        "importlib.import_module = interrupted\nsys.exit(main(['train']))"
    )
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")
