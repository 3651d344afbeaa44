"""What a calibration's child does: the real candidates, at tiny sizes, kernels in the interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calibration_standins import some_setting
from fastjepa.calibration.choice import EAGER, Choice
from fastjepa.calibration.search import everything
from fastjepa.calibration.setting import Setting
from fastjepa.measuring.policy import Error
from fastjepa.trials import contest as contest_module
from fastjepa.trials.contest import Contest, is_out_of_memory, judge_norms, norm_bound, norm_errors
from fastjepa.trials.work import Step, Tensors, Work, arithmetic, make_work

TINY = {"henc": 1, "hpre": 1, "dstc": 2, "projector": "2-3-2"}


def outcome(choice: Choice, device: str, make: Any = make_work, **changes: Any) -> Any:
    contest = Contest(some_setting(**{**TINY, **changes}), torch.device(device), make)
    contest.prepare()
    return contest.try_out(choice)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_everything_at_once_trains_exactly(device: str, precision: str) -> None:
    """On a CPU the graph is the same code, plainly; there only the kernels are slow."""
    trial = outcome(everything("train"), device, precision=precision)
    assert trial.status == "exact", trial.reason
    assert trial.error <= trial.bound
    assert trial.checked_batch == 1
    assert trial.milliseconds > 0
    assert trial.reference_milliseconds > 0


def test_everything_at_once_rolls_out_exactly(device: str) -> None:
    trial = outcome(everything("inference"), device, purpose="inference", frames=2, steps=2)
    assert trial.status == "exact", trial.reason


@pytest.mark.parametrize(
    "choice",
    [
        Choice(losses="closed_form", channels_last=True),
        Choice(losses="closed_form", cuda_graph=True),
        Choice(channels_last=True),
    ],
    ids=str,
)
def test_what_needs_no_kernels(choice: Choice) -> None:
    trial = outcome(choice, "cpu", frames=4, height=16, width=16, batch=3)
    assert trial.status == "exact", trial.reason
    assert trial.rounds >= contest_module.LEAST_ROUNDS


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_folded_rollout_without_kernels(precision: str) -> None:
    choice = Choice(cuda_graph=True, channels_last=True)
    trial = outcome(choice, "cpu", purpose="inference", steps=2, height=16, width=16, precision=precision)
    assert trial.status == "exact", trial.reason


def test_videos_of_several_channels_are_trained_on_step_by_step() -> None:
    assert outcome(Choice(losses="closed_form"), "cpu", dobs=2).status == "exact"
    graphed = outcome(Choice(cuda_graph=True), "cpu", dobs=2)
    assert graphed.status == "failed"
    assert "a graphed step takes clips of one channel, and these have 2" in graphed.reason


class Planted:
    """Work whose results are off in one group, at batches of at least `batch`."""

    def __init__(self, group: str, factor: float, batch: int = 1) -> None:
        self.group, self.factor, self.batch = group, factor, batch

    def __call__(self, setting: Setting, choice: Choice, batch: int, device: torch.device, dtype: torch.dtype) -> Work:
        work = Step(setting, choice, batch, device, dtype)
        if choice != EAGER and batch >= self.batch:
            found = work.results

            def results() -> Tensors:
                values = found()
                return {**values, self.group: values[self.group] * self.factor}

            work.results = results  # type: ignore[method-assign]
        return work


@pytest.mark.parametrize("group", ["losses", "gradient of encoder", "buffers of predictor", "gradient of projector"])
@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_planted_error_is_found(group: str, factor: float) -> None:
    trial = outcome(Choice(channels_last=True), "cpu", Planted(group, factor))
    assert trial.status == "wrong"
    assert trial.reason.startswith(f"{group} is off by ")
    assert trial.milliseconds is None


def test_what_breaks_at_the_full_size_only_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest_module, "CHECKED_BATCH", 1)
    choice = Choice(channels_last=True)
    assert outcome(choice, "cpu", batch=2).status == "exact"
    trial = outcome(choice, "cpu", Planted("gradient of encoder", 1.5, batch=2), batch=2)
    assert trial.status == "wrong"
    assert trial.reason.startswith("at 2 clips gradient of encoder differs from eager by ")


class LittleMemory:
    """Eager and float64 need as much memory as they have clips, other candidates half of that; there is some."""

    def __init__(self, clips: int) -> None:
        self.clips = clips

    def __call__(self, setting: Setting, choice: Choice, batch: int, device: torch.device, dtype: torch.dtype) -> Work:
        if (batch if choice == EAGER else batch / 2) > self.clips:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Step(setting, choice, batch, device, dtype)


def test_where_eager_has_no_memory_candidates_are_checked_small_and_timed_alone() -> None:
    trial = outcome(Choice(channels_last=True), "cpu", LittleMemory(2), batch=4)
    assert (trial.status, trial.checked_batch) == ("exact", 2)
    assert trial.milliseconds is not None
    assert trial.reference_milliseconds is None
    assert outcome(Choice(channels_last=True), "cpu", LittleMemory(1), batch=4).status == "out of memory"
    with pytest.raises(torch.OutOfMemoryError, match="no memory for one clip in float64"):
        outcome(Choice(channels_last=True), "cpu", LittleMemory(0), batch=4)


def test_kernels_that_cannot_run_are_unavailable(needs_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastjepa.kernels.launch.INTERPRET", False)
    trial = outcome(Choice(losses="fused"), "cpu")
    assert trial.status == "unavailable"
    assert "need a CUDA device" in trial.reason


def test_the_arithmetic_is_that_of_the_setting_and_then_as_before() -> None:
    before = torch.backends.cudnn.deterministic, torch.backends.cuda.matmul.allow_tf32
    with arithmetic(some_setting(precision="tf32", deterministic=not before[0])):
        assert torch.backends.cudnn.deterministic is not before[0]
        assert torch.backends.cuda.matmul.allow_tf32
    assert (torch.backends.cudnn.deterministic, torch.backends.cuda.matmul.allow_tf32) == before


def test_errors_by_norm() -> None:
    truth = {"x": torch.tensor([3.0, 4.0], dtype=torch.float64), "zero": torch.zeros(2, dtype=torch.float64)}
    errors = norm_errors({"x": torch.tensor([3.0, 4.5]), "zero": torch.zeros(2)}, truth)
    assert errors == {"x": Error(0.1, torch.float32), "zero": Error(0.0, torch.float32)}
    for bad in (float("nan"), float("inf")):
        assert norm_errors({"x": torch.tensor([3.0, bad]), "zero": torch.ones(2)}, truth)["x"].relative == float("inf")
    with pytest.raises(ValueError, match="result 'x': expected shape \\(2,\\), got nothing"):
        norm_errors({}, truth)
    eager = {"x": Error(1e-6, torch.float32), "zero": Error(0.0, torch.float32)}
    verdict = judge_norms(errors, eager, "fp32")
    assert (verdict.name, verdict.exact) == ("x", False)
    # fp32 stays within 1e-5, unless eager itself does not.
    assert norm_bound(9e-6, torch.float32, "fp32") == 1e-5
    assert norm_bound(1e-4, torch.float32, "fp32") == pytest.approx(2e-4, rel=1e-2)
    assert norm_bound(0.0, torch.float32, "bf16") == pytest.approx(2**-8, rel=1e-3)


def test_how_libraries_say_that_memory_is_out() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("out of memory"))
