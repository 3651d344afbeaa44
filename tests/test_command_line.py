from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from fastjepa.config import PRESETS, Config, preset_config, resolve_device, resolve_preset
from fastjepa.training.command_line import parse_config

pytestmark = pytest.mark.packages("tyro")

PUBLISHED = (
    "--batch_size 64 --dobs 1 --henc 32 --hpre 32 --dstc 16 --steps 1 --cov_coeff 10.0 --std_coeff 200.0 --epochs 100 "
    "--lr 5e-4"
).split()


def test_the_published_command_line() -> None:
    config = parse_config([*PUBLISHED, "--preset", "full"])
    assert (config.batch_size, config.steps, config.std_coeff, config.epochs, config.lr) == (64, 1, 200.0, 100, 5e-4)


def test_defaults_are_the_published_recipe() -> None:
    config = preset_config("full")
    assert (config.batch_size, config.dobs, config.henc, config.hpre, config.dstc, config.steps) == (
        64,
        1,
        32,
        32,
        16,
        4,
    )
    assert (config.cov_coeff, config.std_coeff, config.epochs, config.lr, config.seed) == (100.0, 10.0, 50, 1e-3, 2025)
    assert (config.n_train, config.n_val, config.n_frames, config.canvas) == (18_000, 2_000, 10, 64)


def test_the_preset_of_the_first_readme() -> None:
    """Its command, but for what it has in common with the recipe: batch size and widths."""
    by_flags = parse_config([*PUBLISHED, "--preset", "full"])
    assert dataclasses.replace(parse_config(["--preset", "readme"]), preset="full") == by_flags
    assert parse_config(["--preset", "readme", "--steps", "4"]).steps == 4


def test_presets() -> None:
    assert resolve_preset("auto", torch.device("cuda")) == "full"
    assert resolve_preset("auto", torch.device("cpu")) == "demo"
    assert parse_config(["--device", "cpu"]).preset == "demo"
    assert parse_config(["--device", "cpu", "--preset", "auto"]).canvas == PRESETS["demo"]["canvas"]
    flags_win = parse_config(["--preset", "demo", "--canvas", "48"])
    assert flags_win.canvas == 48
    assert flags_win.henc == PRESETS["demo"]["henc"]


def test_a_digits_file_implies_idx() -> None:
    assert parse_config(["--digits", "x.gz"]).data == "idx"


def test_config_survives_json() -> None:
    config = Config(digits=Path("a/b"), max_steps=3)
    assert Config.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="unknown options in a saved configuration: colour"):
        Config.from_json({"colour": 1})
    with pytest.raises(ValueError, match="option henc in a saved configuration is '8', expected int"):
        Config.from_json({"henc": "8"})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "-3"], "--batch_size must be at least 1, got -3"),
        (["--n_frames", "2"], "--n_frames must be at least 3"),
        (["--lr", "nan"], "--lr must be a positive number, got nan"),
        (["--cov_coeff", "-1"], "--cov_coeff must be a number ≥ 0, got -1.0"),
        (["--dobs", "3"], "--dobs must be 1"),
        (["--canvas", "16", "--digit_size", "20"], "--digit_size must be at most --canvas = 16, got 20"),
        (["--max_steps", "0"], "--max_steps must be at least 1, got 0"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N; got 'tpu'"),
        (["--device", "cpu", "--precision", "tf32"], "--precision tf32 needs a CUDA device"),
        (["--device", "mps", "--backend", "fused"], "--device must be auto, cpu, cuda or cuda:N; got 'mps'"),
        (["--preset", "huge"], f"--preset must be one of auto, {', '.join(PRESETS)}; got 'huge'"),
        (["--resume", "/nowhere"], "--resume takes the folder of a run; /nowhere does not exist"),
        (["--colour", "red"], "--colour"),
        (["--hdet", "0"], "--hdet must be at least 1, got 0"),
        (["--projector", "16"], "--projector must be sizes that begin with --dstc, like 16-64-64; got '16'"),
        (["--projector", "8-64-64"], "--projector must be sizes that begin with --dstc"),
        (["--projector", "16-0-64"], "--projector must be sizes that begin with --dstc"),
        (["--from_eb_jepa", "/nowhere"], "could not read /nowhere"),
    ],
)
def test_bad_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_config(flags)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_cuda_without_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--device", "cuda"])
    assert "--device cuda was asked for, but" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cuda:1 was asked for"):
        resolve_device("cuda:1")


def test_resume_needs_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--resume", str(tmp_path)])
    assert "there is nothing to resume" in capsys.readouterr().err


@pytest.mark.usefixtures("needs_triton")
def test_fused_where_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fastjepa.kernels.launch.INTERPRET", False)
    with pytest.raises(SystemExit):
        parse_config(["--device", "cpu", "--backend", "fused"])
    assert "--backend fused is not supported here: Triton kernels need a CUDA device" in capsys.readouterr().err
