"""What a calibration's child does: the real candidates at tiny sizes, kernels in the interpreter without a GPU.

In networks this small one ReLU that switches is a good part of a gradient, and a CPU's channels-last convolutions round
more than its others; so what runs either is held to a contract for whole models, and the policy is seen at work on the
rest.
"""

from __future__ import annotations

import functools
import gc
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from bench.harness import timing
from calibration_standins import some_setting
from fastjepa import policy as norms
from fastjepa.calibration.choice import EAGER, Choice
from fastjepa.calibration.layers import LAYERS
from fastjepa.calibration.search import everything, rival
from fastjepa.calibration.setting import (
    RunPrecision,
    Setting,
    ambient_precision,
    setting_of_config,
    setting_of_jepa,
)
from fastjepa.config import Config
from fastjepa.policy import Error, ambient_tf32, is_out_of_memory, judge_norms, norm_bound, norm_errors
from fastjepa.trials import contest as contest_module
from fastjepa.trials import layers, work
from fastjepa.trials.contest import Contest
from fastjepa.trials.work import Rollout, Step, Tensors, Work, arithmetic, make_work
from tiny import tiny_jepa

CUDA = torch.device("cuda")
WHOLE_MODEL = 1e-4  # fp32, of a tensor's norm
SMALL = {"henc": 8, "hpre": 8, "dstc": 8, "projector": "8-16-16", "batch": 4, "frames": 6, "height": 32, "width": 32}


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest_module, "ROUND_SECONDS", 0.0)


def outcome(choice: Choice, device: str, make: Any = make_work, **changes: Any) -> Any:
    contest = Contest(some_setting(**changes), torch.device(device), make)
    contest.prepare()
    return contest.try_out(choice)


def test_everything_at_once_is_trained_and_timed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the graph is the same code, plainly; there only the kernels are slow."""
    monkeypatch.setattr(norms, "norm_bound", lambda *_: WHOLE_MODEL)
    trial = outcome(everything("train"), device)
    assert trial.status == "exact", trial.reason
    assert trial.error <= trial.bound == WHOLE_MODEL
    assert trial.checked_batch == 1
    assert trial.milliseconds > 0
    assert trial.reference_milliseconds > 0


def test_everything_at_once_rolls_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By own convolutions; two layers are timed, and in the interpreter neither is faster by them."""
    monkeypatch.setattr(norms, "norm_bound", lambda *_: WHOLE_MODEL)
    monkeypatch.setattr(
        work, "pairs_of_networks", lambda *a, **k: itertools.islice(layers.pairs_of_networks(*a, **k), 2)
    )
    monkeypatch.setattr(layers, "SECONDS", 0.0)
    monkeypatch.setattr(layers, "TURN_MS", 0.0)
    trial = outcome(everything("inference"), device, purpose="inference", frames=2)
    assert trial.status == "exact", trial.reason
    assert trial.faster_layers is not None
    assert device != "cpu" or trial.faster_layers == ()


def test_the_rival_of_own_convolutions_rolls_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "norm_bound", lambda *_: WHOLE_MODEL)
    trial = outcome(rival(), device, purpose="inference", frames=2)
    assert trial.status == "exact", trial.reason
    assert trial.faster_layers is None


def test_own_convolutions_in_some_layers_roll_out(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "norm_bound", lambda *_: WHOLE_MODEL)
    monkeypatch.setattr(Rollout, "faster_layers", lambda _: pytest.fail("only of all layers"))
    some = Choice(cuda_graph=True, convolutions="encoder.conv1,predictor.dec1.conv1,predictor.up2")
    trial = outcome(some, device, purpose="inference", frames=2, steps=2)
    assert trial.status == "exact", trial.reason


@pytest.mark.usefixtures("needs_triton")
def test_own_convolutions_are_refused_in_training() -> None:
    trial = outcome(Choice(convolutions="all"), "cpu")
    assert trial.status == "failed"
    assert "own convolutions are for inference" in trial.reason


# ---- layer by layer ----


class Layered:
    """A rollout by own convolutions, of which so many calls were asked which layers are faster."""

    def __init__(self, found: Any) -> None:
        self.found, self.asked = found, 0

    def __call__(self, *_: Any) -> Layered:
        return self

    def run(self) -> None:
        pass

    def results(self) -> Tensors:
        return {"numbers": torch.arange(4.0)}

    def faster_layers(self) -> tuple[str, ...]:
        self.asked += 1
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.usefixtures("needs_triton")
def test_of_all_layers_alone_it_is_asked_which_are_faster_and_once() -> None:
    work = Layered(("encoder.conv1",))
    contest = Contest(some_setting(purpose="inference"), torch.device("cpu"), work)
    contest.prepare()
    trials = [contest.try_out(Choice(cuda_graph=graph, convolutions="all")) for graph in (True, False)]
    assert [trial.faster_layers for trial in trials] == [("encoder.conv1",)] * 2
    assert contest.try_out(Choice(convolutions="encoder.conv1")).faster_layers is None
    assert contest.try_out(Choice(batch_norm=True)).faster_layers is None
    assert work.asked == 1


@pytest.mark.usefixtures("needs_triton")
def test_where_there_is_no_memory_to_time_layers_the_whole_is_exact_all_the_same() -> None:
    choice = Choice(convolutions="all")
    trial = outcome(choice, "cpu", Layered(torch.OutOfMemoryError("CUDA out of memory")), purpose="inference")
    assert (trial.status, trial.faster_layers, trial.reason) == ("exact", None, "no memory to time its layers")
    assert outcome(choice, "cpu", Layered(RuntimeError("broken")), purpose="inference").status == "failed"


def test_layers_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands still but for what calls take, and that is slow in the first round."""
    pretended = PretendedDevice(monkeypatch)
    monkeypatch.setattr(layers, "SECONDS", 60.0)
    calls: list[str] = []

    def call(name: str, milliseconds: float, first: float = 0.0) -> Any:
        def run() -> None:
            pretended.now += milliseconds + (first if name not in calls else 0.0)
            calls.append(name)

        return run

    pairs = {
        "encoder.conv1": layers.Pair(call("a", 1.0, 50.0), call("b", 2.0)),
        "predictor.conv1": layers.Pair(call("c", 0.02), call("d", 0.01)),
        "encoder.layer1.conv1": layers.Pair(call("e", 3.0), call("f", 3.1)),
        "predictor.up1": layers.Pair(call("g", 3.0), call("h", 3.0)),
    }
    found = layers.faster_layers(pairs.items(), torch.device("cpu"))
    assert found == ("encoder.conv1", "encoder.layer1.conv1")
    assert calls.count("a") == calls.count("b") == 2 + 1 + layers.MOST_ROUNDS
    # What is short is repeated in a turn, as often on both sides.
    assert calls.count("c") == calls.count("d") == 2 + (1 + layers.MOST_ROUNDS) * layers.MOST_CALLS
    assert gc.get_freeze_count() == 0


def test_layers_that_take_long_get_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "SECONDS", 0.0)
    calls: list[str] = []
    pair = layers.Pair(lambda: calls.append("ours"), lambda: calls.append("torchs"))
    monkeypatch.setattr(layers, "TURN_MS", 0.0)
    layers.faster_layers([("encoder.conv1", pair)], torch.device("cpu"))
    assert calls.count("ours") == calls.count("torchs") == 2 + 1 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_of_every_layer_compute_the_same(dtype: torch.dtype, device: str) -> None:
    """At the sizes of a rollout: all frames are encoded at once, and the states of each clip predicted."""
    jepa = tiny_jepa().to(device).eval()
    video = torch.rand(2, 1, 3, 8, 8, device=device)
    shapes = {}
    for name, pair in layers.pairs_of_networks(jepa.encoder, jepa.predictor, video, dtype, tf32=False):
        ours, torchs = pair.ours(), pair.torchs()
        assert ours.dtype == torchs.dtype == dtype
        assert ours.abs().max() > 0
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(ours.float(), torchs.float(), rtol=tolerance, atol=tolerance * torchs.abs().max())
        shapes[name] = tuple(ours.shape)
    assert tuple(shapes) == LAYERS
    assert shapes["encoder.layer1.conv1"] == (6, 2, 8, 8)
    assert shapes["predictor.dec1.conv2"] == (2, 4, 8, 8)
    assert shapes["predictor.bott.conv1"] == (2, 16, 1, 1)


@pytest.mark.parametrize("choice", [Choice(losses="closed_form", cuda_graph=True), Choice(cuda_graph=True)], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_needs_no_kernels(choice: Choice, precision: str) -> None:
    trial = outcome(choice, "cpu", precision=precision, **SMALL)
    assert trial.status == "exact", trial.reason
    assert trial.rounds >= contest_module.LEAST_ROUNDS


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_folded_rollout_without_kernels(precision: str) -> None:
    choice = Choice(cuda_graph=True, channels_last=True)
    trial = outcome(choice, "cpu", purpose="inference", precision=precision, **{**SMALL, "steps": 2})
    assert trial.status == "exact", trial.reason


def test_videos_of_several_channels_are_trained_on_step_by_step() -> None:
    assert outcome(Choice(losses="closed_form"), "cpu", dobs=2, **SMALL).status == "exact"
    graphed = outcome(Choice(cuda_graph=True), "cpu", dobs=2, **SMALL)
    assert graphed.status == "failed"
    assert "a graphed step takes clips of one channel, and these have 2" in graphed.reason


class Planted:
    """Work whose results are off in one group, at batches of at least `batch`."""

    def __init__(self, group: str, factor: float, batch: int = 1) -> None:
        self.group, self.factor, self.batch = group, factor, batch

    def __call__(
        self, setting: Setting, choice: Choice, batch: int, device: torch.device, dtype: torch.dtype, draw: int
    ) -> Work:
        work = Step(setting, choice, batch, device, dtype, draw)
        if choice != EAGER and batch >= self.batch:
            found = work.results

            def results() -> Tensors:
                values = found()
                return {**values, self.group: values[self.group] * self.factor}

            work.results = results  # type: ignore[method-assign]
        return work


def test_memory_layout_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "norm_bound", lambda *_: 1e-2)
    assert outcome(Choice(channels_last=True), "cpu", **SMALL).status == "exact"


@pytest.mark.parametrize("group", ["losses", "gradient of encoder", "buffers of predictor", "gradient of projector"])
@pytest.mark.parametrize("factor", [1.02, float("nan")])
def test_a_planted_error_is_found(group: str, factor: float) -> None:
    trial = outcome(Choice(losses="closed_form"), "cpu", Planted(group, factor))
    assert trial.status == "wrong"
    assert trial.reason.startswith(f"{group} is off by ")
    assert trial.milliseconds is None


def test_what_breaks_at_the_full_size_only_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest_module, "CHECKED_BATCH", 1)
    choice = Choice(losses="closed_form")
    assert outcome(choice, "cpu", **SMALL).checked_batch == 1
    # What one ReLU may do.
    assert outcome(choice, "cpu", Planted("gradient of encoder", 1.001, batch=4), **SMALL).status == "exact"
    assert outcome(choice, "cpu", Planted("losses", 1.001, batch=4), **SMALL).status == "wrong"
    trial = outcome(choice, "cpu", Planted("gradient of encoder", 1.5, batch=4), **SMALL)
    assert trial.status == "wrong"
    assert trial.reason.startswith("at 4 clips gradient of encoder differs from eager by ")


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.5, 0.9, 1.01])
@pytest.mark.parametrize("group", ["gradient of predictor", "gradient of encoder"])
def test_in_bf16_a_wrong_formula_shows_in_fp32(group: str, factor: float) -> None:
    trial = outcome(Choice(losses="closed_form"), "cpu", Planted(group, factor), precision="bf16", **SMALL)
    assert trial.status == "wrong"
    assert f"{group} is off by " in trial.reason
    assert " of its norm in fp32, allowed are " in trial.reason


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.5])
def test_in_bf16_what_breaks_at_the_full_size_only_is_found(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest_module, "CHECKED_BATCH", 1)
    choice, group = Choice(losses="closed_form"), "gradient of predictor"
    trial = outcome(choice, "cpu", Planted(group, factor, batch=4), precision="bf16", **SMALL)
    assert trial.status == "wrong"
    assert trial.reason.startswith(f"at 4 clips {group} differs from eager by ")


def test_in_bf16_candidates_that_round_elsewhere_stay_below_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels-last convolutions of a CPU are others: those of fp32 are checked with the contract for whole models."""
    monkeypatch.setattr(contest_module, "CHECKED_BATCH", 1)
    bound = norms.norm_bound
    monkeypatch.setattr(norms, "norm_bound", lambda e, d, p: WHOLE_MODEL * 100 if p == "fp32" else bound(e, d, p))
    trial = outcome(Choice(channels_last=True), "cpu", precision="bf16", **SMALL)
    assert trial.status == "exact", trial.reason


class JumpsInDraws:
    """The closed form, whose encoder's gradient is off by so much in the first draws."""

    def __init__(self, draws: int, off: float, group: str = "gradient of encoder") -> None:
        self.draws, self.factor, self.group = draws, 1 + off, group

    def __call__(
        self, setting: Setting, choice: Choice, batch: int, device: torch.device, dtype: torch.dtype, draw: int
    ) -> Work:
        factor = self.factor if draw < self.draws else 1.0
        return Planted(self.group, factor)(setting, choice, batch, device, dtype, draw)


def test_a_gradient_that_jumps_gets_another_draw_and_nothing_else_does() -> None:
    choice = Choice(losses="closed_form")
    assert outcome(choice, "cpu", JumpsInDraws(1, 3e-3)).status == "exact"
    assert outcome(choice, "cpu", JumpsInDraws(3, 3e-3)).status == "wrong"
    assert outcome(choice, "cpu", JumpsInDraws(1, 3e-2)).status == "wrong"  # more than a ReLU
    assert outcome(choice, "cpu", JumpsInDraws(1, 3e-3, "losses")).status == "wrong"
    assert outcome(choice, "cpu", JumpsInDraws(1, 3e-3, "buffers of encoder")).status == "wrong"


class LittleMemory:
    """Eager and float64 need as much memory as they have clips, other candidates half of that; there is some."""

    def __init__(self, clips: int) -> None:
        self.clips = clips

    def __call__(
        self, setting: Setting, choice: Choice, batch: int, device: torch.device, dtype: torch.dtype, draw: int
    ) -> Work:
        if (batch if choice == EAGER else batch / 2) > self.clips:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Step(setting, choice, batch, device, dtype, draw)


def test_where_eager_has_no_memory_candidates_are_checked_small_and_timed_alone() -> None:
    choice = Choice(losses="closed_form")
    trial = outcome(choice, "cpu", LittleMemory(2), **SMALL)
    assert (trial.status, trial.checked_batch) == ("exact", 2)
    assert trial.milliseconds is not None
    assert trial.reference_milliseconds is None
    assert outcome(choice, "cpu", LittleMemory(1), **SMALL).status == "out of memory"
    with pytest.raises(torch.OutOfMemoryError, match="no memory for one clip in float64"):
        outcome(choice, "cpu", LittleMemory(0), **SMALL)


class SlowTruth:
    """Float64 takes so many seconds a clip, and longer the first time; what was asked for is kept."""

    def __init__(self, device: PretendedDevice, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.first = 1.5
        self.clips: list[int] = []

    def __call__(
        self, setting: Setting, choice: Choice, batch: int, device: torch.device, dtype: torch.dtype, draw: int
    ) -> Work:
        work = Numbers()
        if dtype == torch.float64:
            self.clips.append(batch)

            def run() -> None:
                self.device.launch(0.0, 1e3 * (self.first + self.seconds * batch))
                self.first = 0.0

            work.run = run  # type: ignore[method-assign]
        return work


class Numbers:
    def run(self) -> None:
        pass

    def results(self) -> Tensors:
        return {"numbers": torch.arange(4.0)}


@pytest.mark.parametrize(
    ("seconds", "batch", "checked"),
    [(0.001, 64, 16), (0.3, 64, 16), (0.4, 64, 8), (2.0, 64, 2), (9.0, 64, 1), (9.0, 1, 1), (0.6, 12, 6)],
)
def test_the_truth_takes_seconds_at_most(
    seconds: float, batch: int, checked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = SlowTruth(PretendedDevice(monkeypatch), seconds)
    contest = Contest(some_setting(batch=batch), torch.device("cuda"), make)
    contest.prepare()
    assert contest.batch == checked
    assert make.clips == ([1, checked] if batch > 1 else [1])  # none of them more than it may


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastjepa.calibration.setting.device_name", lambda _: "Some GPU")
    monkeypatch.setattr("fastjepa.calibration.setting.driver_version", lambda _: "1")


class PretendedDevice:
    """A clock, and a device that works on what is queued while the host goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.busy_until = 0.0  # milliseconds
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now / 1e3))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def synchronize(self) -> None:
        self.now = max(self.now, self.busy_until)

    def launch(self, host: float, device: float) -> None:
        self.now += host
        self.busy_until = max(self.now, self.busy_until) + device


class Queued:
    """A step: the host prepares, and launches kernels."""

    def __init__(self, device: PretendedDevice, launches: int, host: float, device_ms: float) -> None:
        self.device, self.launches, self.host, self.device_ms = device, launches, host, device_ms

    def run(self) -> None:
        for _ in range(self.launches):
            self.device.launch(self.host, self.device_ms)


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        ((1500, 0.02, 0.001), 30.0),  # bound by launches, which eager's 100 ms would hide
        ((1, 0.1, 30.0), 30.0),  # a graph
        ((1, 30.0, 30.0), 40.0),  # in a loop, the host is ahead: 30 ms and a third of what comes before the first
    ],
)
def test_a_step_bound_by_launches_is_as_slow_as_it_is(
    candidate: tuple[int, float, float], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended = PretendedDevice(monkeypatch)
    contest = Contest(some_setting(), torch.device("cuda"), make_work)
    contest._reference = Queued(pretended, 100, 0.01, 1.0)  # type: ignore[assignment]
    times, reference_times = contest._time(Queued(pretended, *candidate))  # type: ignore[arg-type]
    assert times == pytest.approx([expected] * len(times), rel=0.01)
    assert reference_times == pytest.approx([100.0] * len(times), rel=0.01)


def test_who_rolls_out_waits_for_each_result(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = PretendedDevice(monkeypatch)
    contest = Contest(some_setting(purpose="inference"), torch.device("cuda"), make_work)
    contest._reference = Queued(pretended, 1, 30.0, 30.0)  # type: ignore[assignment]
    assert contest._time(Queued(pretended, 1, 30.0, 30.0))[0] == pytest.approx([60.0] * 3)  # type: ignore[arg-type]


def test_what_is_hopeless_gets_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended = PretendedDevice(monkeypatch)
    contest = Contest(some_setting(), torch.device("cuda"), make_work)
    contest._reference = Queued(pretended, 1, 0.0, 10.0)  # type: ignore[assignment]
    assert contest._time(Queued(pretended, 1, 0.0, 51.0)) == ([pytest.approx(51.0)], [pytest.approx(10.0)])  # type: ignore[arg-type]


def test_kernels_that_cannot_run_are_unavailable(needs_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastjepa.kernels.launch.INTERPRET", False)
    trial = outcome(Choice(losses="fused"), "cpu")
    assert trial.status == "unavailable"
    assert "need a CUDA device" in trial.reason


@pytest.fixture
def torch_settings() -> Iterator[Any]:
    """PyTorch's switches of fp32's precision, none of them set; afterwards they are as before."""
    backends: Any = torch.backends
    modules = (backends, backends.cuda.matmul, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn)
    for module in modules:
        module.fp32_precision = "none"
    yield backends
    for module in modules:
        module.fp32_precision = "none"
    backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = False  # as conftest has it


@pytest.mark.parametrize("matmul", [False, True])
@pytest.mark.parametrize("cudnn", [False, True])
@pytest.mark.parametrize("general", ["none", "tf32", "ieee"])
def test_the_arithmetic_is_that_of_the_setting_and_then_as_before(
    matmul: bool, cudnn: bool, general: str, torch_settings: Any
) -> None:
    torch_settings.fp32_precision = general
    before = ambient_tf32(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    with arithmetic(some_setting(matmul_tf32=matmul, cudnn_tf32=cudnn, deterministic=not before[1])):
        assert ambient_tf32() == (matmul, cudnn)
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (matmul, cudnn)
        assert torch.backends.cudnn.deterministic is not before[1]
    assert (ambient_tf32(), torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == before


@pytest.mark.parametrize(
    ("switch", "expected"),
    [
        ("fp32_precision", (True, True)),
        ("cuda.matmul.fp32_precision", (True, False)),
        ("cudnn.conv.fp32_precision", (False, True)),
    ],
)
def test_tf32_is_seen_however_it_was_asked_for(
    switch: str, expected: tuple[bool, bool], torch_settings: Any, pretended_gpu: None
) -> None:
    *path, name = switch.split(".")
    setattr(functools.reduce(getattr, path, torch_settings), name, "tf32")
    assert ambient_tf32() == expected
    setting = setting_of_jepa(tiny_jepa(), CUDA, example=None, purpose="train", precision="fp32")
    assert isinstance(setting, Setting)
    assert (setting.matmul_tf32, setting.cudnn_tf32, setting.rule) == (*expected, "tf32")
    assert (ambient_precision(CUDA), Setting.from_json(setting.to_json())) == ("fp32", setting)


def test_pytorchs_own_arithmetic_is_a_setting_of_its_own(torch_settings: Any, pretended_gpu: None) -> None:
    """TF32 in convolutions, fp32 in matrix products."""
    torch_settings.cuda.matmul.allow_tf32, torch_settings.cudnn.allow_tf32 = False, True
    setting = setting_of_jepa(tiny_jepa(), CUDA, example=None, purpose="train", precision="fp32")
    assert isinstance(setting, Setting)
    assert "train in fp32 (TF32 in convolutions) of " in str(setting)
    contest = Contest(setting, CUDA, make_work)
    assert [checked.rule for checked in contest.checked] == ["fp32", "tf32"]
    with arithmetic(setting):
        assert ambient_tf32() == (False, True)


def test_a_run_in_tf32_is_so_everywhere_and_one_in_bf16_nowhere(pretended_gpu: None) -> None:
    settings = {name: setting_of_config(Config(), CUDA, name) for name in get_args(RunPrecision)}
    flags = {name: (s.precision, s.matmul_tf32, s.cudnn_tf32, s.rule) for name, s in settings.items()}
    assert flags == {
        "fp32": ("fp32", False, False, "fp32"),
        "tf32": ("fp32", True, True, "tf32"),
        "bf16": ("bf16", False, False, "bf16"),
    }
    assert "train in TF32 of " in str(settings["tf32"])


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
    assert norm_bound(Error(9e-6, torch.float32), torch.float32, "fp32") == 1e-5
    assert norm_bound(Error(1e-4, torch.float32), torch.float32, "fp32") == pytest.approx(2e-4, rel=1e-2)
    assert norm_bound(Error(0.0, torch.float32), torch.float32, "bf16") == pytest.approx(2**-8, rel=1e-3)


@pytest.mark.parametrize("eager", [0.5, 3.0, float("inf"), float("nan")])
@pytest.mark.parametrize("found", [0.0, 1.0, float("inf")])
def test_what_eager_is_no_measure_of_is_not_exact(eager: float, found: float) -> None:
    errors, eager_errors = {"x": Error(found, torch.float32)}, {"x": Error(eager, torch.float32)}
    assert not judge_norms(errors, eager_errors, "bf16").exact


def test_how_libraries_say_that_memory_is_out() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("out of memory"))
