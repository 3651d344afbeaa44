"""What `auto` takes, what a flag must get, and how a run goes on as it began."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastjepa import autotune
from fastjepa.config import Config
from fastjepa.distributed.ranks import Ranks
from fastjepa.execution import ExecutionConfig
from fastjepa.files.safe_files import CheckpointError
from fastjepa.fused import auto
from fastjepa.fused.auto import Widths, auto_problem, fused_problem, resolve_execution
from fastjepa.graphs import GraphCaptureError, GraphedRollout, GraphedTrainStep, make_capturable
from fastjepa.training.command_line import parse_config
from fastjepa.training.execution import first_decides, no_graph_reason, read_execution, resumed_execution
from fastjepa.training.trainer import Trainer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WIDTHS = Widths(1, 4, 3, 4, "4-6-5")
FUSED = ExecutionConfig("bf16", fused=True, cuda_graph=True, channels_last=True)
TINY = (
    "--preset demo --device cpu --n_train 6 --n_val 3 --n_frames 4 --canvas 16 --digit_size 8 --henc 4 --hpre 3 "
    "--batch_size 3 --epochs 2 --steps 1"
).split()


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As on a GPU that passes the self-check."""
    monkeypatch.setattr(auto, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(auto, "auto_problem", lambda *_, **__: None)
    return monkeypatch


def test_the_rule_on_a_cpu() -> None:
    found, told = resolve_execution(CPU, "fp32", WIDTHS)
    assert found == ExecutionConfig(channels_last=True)
    assert told == ""


def test_the_rule_on_a_gpu(a_gpu: pytest.MonkeyPatch) -> None:
    assert resolve_execution(CUDA, "bf16", WIDTHS) == (FUSED, "")


def test_a_gpu_whose_kernels_are_not_exact_stays_eager(a_gpu: pytest.MonkeyPatch) -> None:
    a_gpu.setattr(auto, "auto_problem", lambda *_, **__: "losses are off")
    found, told = resolve_execution(CUDA, "bf16", WIDTHS)
    assert found == ExecutionConfig("bf16", channels_last=True)
    assert told == "no fused kernels: losses are off"


def test_what_cannot_be_captured_is_fused_without_a_graph(a_gpu: pytest.MonkeyPatch) -> None:
    found, told = resolve_execution(CUDA, "bf16", WIDTHS, no_graph="clips are streamed")
    assert found == dataclasses.replace(FUSED, cuda_graph=False)
    assert told == "no CUDA graphs: clips are streamed"


def test_flags_win(a_gpu: pytest.MonkeyPatch) -> None:
    eager, _ = resolve_execution(CUDA, "fp32", WIDTHS, backend="eager", cuda_graph="on")
    assert eager == ExecutionConfig(cuda_graph=True)
    again, _ = resolve_execution(CUDA, "bf16", WIDTHS, cuda_graph="off", recompute=True)
    assert again == dataclasses.replace(FUSED, cuda_graph=False, recompute=True)


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        (CPU, {"cuda_graph": "on"}, "--cuda_graph on is not supported here: graphs need a CUDA device"),
        (CUDA, {"cuda_graph": "on", "no_graph": "clips are streamed"}, "not supported here: clips are streamed"),
        (CPU, {"recompute": True}, "--recompute on needs fused networks, which this run does not have: auto uses them"),
        (CUDA, {"backend": "eager", "recompute": True}, "this run does not have: --backend eager"),
        (torch.device("meta"), {"backend": "fused"}, "--backend fused is not supported here: device type 'meta'"),
    ],
)
def test_a_flag_that_is_not_supported(device: torch.device, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_execution(device, "fp32", WIDTHS, **options)


def test_what_a_gpu_needs_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "on CUDA devices" in (auto_problem(CPU, "fp32", WIDTHS) or "")
    monkeypatch.setattr(auto, "unavailable_reason", lambda device: "no Triton")
    assert auto_problem(CUDA, "fp32", WIDTHS) == "no Triton"
    monkeypatch.setattr(auto, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert auto_problem(CUDA, "fp32", WIDTHS) == "they are made for sm_80 and later, this GPU is sm_75"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert auto_problem(CUDA, "fp32", None) == "the model is not of the published form"


def test_auto_asks_the_self_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(auto, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(auto, "device_name", lambda device: "a GPU")
    monkeypatch.setattr("fastjepa.environment.device_name", lambda device: "a GPU")
    monkeypatch.setattr("fastjepa.environment.driver_version", lambda device: "1")
    found: list[tuple[Any, ...]] = []

    def problem(*arguments: Any) -> str:
        found.append(arguments)
        return "losses are off"

    monkeypatch.setattr(auto, "fused_problem", problem)
    monkeypatch.delenv("FASTJEPA_SELF_CHECK", raising=False)
    for _ in range(2):
        assert "losses are off" in (auto_problem(CUDA, "bf16", WIDTHS, cache_dir=tmp_path) or "")
    assert found == [(CUDA, "bf16", WIDTHS)]


# ---- the self-check itself: the kernels in the interpreter, or a GPU's ----


@pytest.fixture
def small_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BATCH": 1, "FRAMES": 3, "SIDE": 8, "STEPS": 1}.items():
        monkeypatch.setattr(auto, name, value)


@pytest.mark.usefixtures("small_check")
def test_the_kernels_pass_the_self_check(device: str) -> None:
    assert fused_problem(torch.device(device), "bf16", WIDTHS) is None


@pytest.mark.usefixtures("small_check")
def test_a_wrong_kernel_fails_the_self_check(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastjepa.fused import losses

    compute = losses.closed_form_losses

    def wrong(*arguments: Any, **options: Any) -> Any:
        found = compute(*arguments, **options)
        return found._replace(cov_loss=1.01 * found.cov_loss)

    monkeypatch.setattr(losses, "closed_form_losses", wrong)
    assert " is off by " in (fused_problem(torch.device(device), "fp32", WIDTHS) or "")


@pytest.mark.usefixtures("small_check")
@pytest.mark.parametrize("projector", ["4-6-6-5", "4-6"])
def test_a_projector_without_kernels_is_checked_with_eager_losses(projector: str, device: str) -> None:
    assert fused_problem(torch.device(device), "fp32", WIDTHS._replace(projector=projector)) is None


# ---- saved with a run, and used again ----


@pytest.mark.parametrize(
    ("old", "expected", "told"),
    [
        ({"batch_norm": True, "losses": "fused", "cuda_graph": True, "recompute": True, "channels_last": True},
         ExecutionConfig("bf16", fused=True, cuda_graph=True, recompute=True, channels_last=True), ""),
        ({"batch_norm": False, "losses": "closed_form", "cuda_graph": False, "recompute": False, "channels_last": True,
          "convolutions": ""}, ExecutionConfig("bf16", channels_last=True), ""),
        ({"batch_norm": False, "losses": "eager", "channels_last": True},
         ExecutionConfig("bf16", channels_last=True), "goes on in closed form"),
        ({"batch_norm": True, "losses": "eager", "cuda_graph": True, "recompute": True, "channels_last": False},
         ExecutionConfig("bf16", cuda_graph=True), "goes on eagerly"),
    ],
)  # fmt: skip
def test_checkpoints_of_earlier_versions(old: dict[str, Any], expected: ExecutionConfig, told: str) -> None:
    found, line = read_execution({"resolved": {"precision": "bf16", **old}}, CPU, Path("x"))
    assert found == expected
    assert told in line
    assert bool(line) == bool(told)


def test_a_checkpoint_of_before_any_record_is_eager() -> None:
    state = {"config": {"precision": "fp32"}}
    assert read_execution(state, CUDA, Path("x")) == (ExecutionConfig(), "")
    found, told = read_execution(state, CPU, Path("x"))
    assert found == ExecutionConfig()
    assert "a CPU goes on in closed form" in told


@pytest.mark.parametrize(
    "state",
    [
        {"execution": {"precision": "fp32"}},
        {"execution": {**FUSED.to_json(), "fused": 1}},
        {"execution": {**FUSED.to_json(), "precision": "fp8"}},
        {"resolved": {"precision": "bf16"}},
        {"resolved": [1]},
        {"config": [1]},
        {"execution": FUSED.to_json(), "autotuned": {"a": 1}},
    ],
)
def test_a_damaged_record_is_named(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="how the run computes is damaged"):
        read_execution(state, CPU, Path("x"))


def resumed(began: ExecutionConfig, device: torch.device, **flags: Any) -> ExecutionConfig:
    config = Config(precision=began.precision, **flags)
    return resumed_execution({"execution": began.to_json()}, config, device, Path("run/checkpoint.pt"))[0]


def test_a_resumed_run_goes_on_as_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastjepa.training.execution.unavailable_reason", lambda device: None)
    assert resumed(FUSED, CUDA) == FUSED
    assert resumed(FUSED, CUDA, recompute="on").recompute
    assert not resumed(dataclasses.replace(FUSED, recompute=True), CUDA, recompute="off").recompute
    assert not resumed(FUSED, CUDA, cuda_graph="off").cuda_graph


def test_every_process_goes_on_with_what_the_first_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first reads the checkpoint; another that timed what is settled there would wait for it forever."""
    monkeypatch.setattr(autotune, "_chosen", {})
    ranks: Any = SimpleNamespace(from_first=lambda work: (FUSED, "a note", {"a rollout": "ours"}))  # on the second
    assert first_decides(ranks, lambda: pytest.fail("only the first resolves")) == (FUSED, "a note")
    assert autotune.chosen() == {"a rollout": "ours"}


@pytest.mark.parametrize(
    ("began", "flags", "message"),
    [
        (FUSED, {}, "began with CUDA graphs, and this runs on cpu; --cuda_graph off"),
        (ExecutionConfig(), {"recompute": "on"}, "--recompute on needs fused networks"),
        (ExecutionConfig(), {"cuda_graph": "on"}, "needs a CUDA device"),
    ],
)
def test_a_run_that_cannot_go_on_as_it_began(began: ExecutionConfig, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resumed(began, CPU, **flags)


def test_why_a_run_has_no_graphs() -> None:
    assert no_graph_reason(Config(data="shards"), Ranks(), CUDA).startswith("a graph gathers clips")
    assert no_graph_reason(Config(data="shards"), Ranks(), CPU) == ""
    assert no_graph_reason(Config(), Ranks(), CUDA) == ""


# ---- runs of the trainer ----


def trainer(folder: Path, *flags: str) -> Trainer:
    words = [*TINY, "--out", str(folder / "run"), "--cache_dir", str(folder / "cache"), *flags]
    return Trainer(parse_config(words))


@pytest.mark.parametrize("projector", ["16-32-32-32", "16-64", "16-64-1"])
def test_any_projector_trains(projector: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, "--projector", projector, "--max_steps", "1")
    assert run.run() is not None
    resumed_run = Trainer(parse_config(["--resume", str(tmp_path / "run"), "--max_steps", "2"]))
    assert resumed_run.run() is not None
    assert resumed_run.execution == run.execution


class NoGraph(GraphedTrainStep):
    def __call__(self, *_: Any, **__: Any) -> Any:
        raise GraphCaptureError("the training step cannot be recorded as a CUDA graph: stand-in")


def test_a_capture_that_fails_leaves_auto_without_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The graph's objects, which a CPU runs plainly, are forced."""
    plain = trainer(tmp_path / "plain")
    make_capturable(plain.optimizer)  # the arithmetic of a graph
    plain.run()
    with_graphs = ExecutionConfig(cuda_graph=True, channels_last=True)
    monkeypatch.setattr("fastjepa.training.trainer.begun_execution", lambda *_: (with_graphs, ""))
    monkeypatch.setattr("fastjepa.training.trainer.GraphedTrainStep", NoGraph)
    run = trainer(tmp_path / "failing")
    run.run()
    assert "no CUDA graphs: the training step cannot be recorded" in capsys.readouterr().out
    assert not run.execution.cuda_graph
    for name, value in plain.jepa.state_dict().items():
        assert torch.equal(value, run.jepa.state_dict()[name]), name


def test_a_capture_that_fails_ends_a_run_that_asked_for_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path)
    run.config = dataclasses.replace(run.config, cuda_graph="on")
    run.graphed_step = NoGraph(run.step, run.train_clips)
    with pytest.raises(GraphCaptureError):
        run.run()


def test_an_evaluation_that_cannot_be_captured_goes_on_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise GraphCaptureError("the rollout cannot be recorded as a CUDA graph: stand-in")

    run = trainer(tmp_path)
    run.graphed_rollout = GraphedRollout(run.jepa, fold_batch_norm=True)
    monkeypatch.setattr(GraphedRollout, "tails", refuse)
    assert run.run() is not None
    assert run.graphed_rollout is None


def test_a_trainer_that_ends_leaves_autotune_to_this_process(tmp_path: Path) -> None:
    run = trainer(tmp_path, "--max_steps", "1")
    autotune.decide_by(lambda work: pytest.fail("the other processes have ended"))
    run.run()
    assert autotune._decide is autotune._call


def test_out_of_memory_names_recomputation(tmp_path: Path) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    run = trainer(tmp_path)
    run.step.losses = full  # type: ignore[method-assign]
    run.execution = ExecutionConfig(fused=True)
    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB\.; --recompute on needs less memory"):
        run.run()
