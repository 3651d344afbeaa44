from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import projected_losses
from bench.harness import memory
from bench.harness.case import BACKWARD, BOTH, FORWARD, Case, Runner, Work, truth_of
from bench.harness.rows import Row, format_table, read_rows, write_rows, write_text
from bench.harness.run import render, run_case
from bench.harness.session import Settings
from bench.harness.timing import HostTimer, quantile
from bench.harness.variants import Tensors, Variant, channels_last, eager, eager_bf16, needs_cuda
from bench.recipe import Recipe, losses_work
from fastjepa.environment import Environment
from fastjepa.files.safe_files import CheckpointError
from fastjepa.policy import is_out_of_memory

CPU = torch.device("cpu")
ENVIRONMENT = Environment(
    "python -m bench toy", "abc", False, "2026-01-02T03:04:05+00:00", "a CPU", "", 1, {"torch": "2"}
)
SETTINGS = Settings(warmup=1, rounds=3, least=3, memory=False)
MEGABYTE = 1 << 20


def toy_inputs(device: torch.device, dtype: torch.dtype) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, generator=generator).to(device, dtype).requires_grad_()
    w = torch.randn(5, generator=generator).to(device, dtype).requires_grad_()
    return {"x": x, "w": w}


def toy(inputs: Tensors, scale: float = 1.0) -> Tensors:
    y = (inputs["x"] * inputs["w"]).sin() * scale
    return {"y": y, "count": torch.tensor(float(y.numel()), dtype=y.dtype)}


def ones_for_y(outputs: Tensors) -> Tensors:
    return {"y": torch.ones_like(outputs["y"])}


def toy_work(phase: str, dtype: torch.dtype) -> Work:
    return Work(1000, 2000)


def toy_case(**changes: Any) -> Case:
    fields = {
        **{"suite": "toy", "name": "3x5", "make_inputs": toy_inputs, "truth": toy, "work": toy_work},
        **{"baseline": "eager", "eager": {"fp32": "eager", "bf16": "eager bf16"}, "cotangents": ones_for_y},
    }
    return Case(**{**fields, **changes})


def variant(name: str, function: Callable[[Tensors], Tensors], **changes: Any) -> Variant:
    return Variant(name, lambda _: function, **changes)


def measure(variants: list[Variant], case: Case | None = None, **changes: Any) -> dict[tuple[str, str], Row]:
    settings = Settings(**{**vars(SETTINGS), **changes})
    rows = run_case(case or toy_case(), variants, CPU, ENVIRONMENT, settings)
    return {(row.variant, row.phase): row for row in rows}


def out_of_memory(inputs: Tensors) -> Tensors:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 TiB")


def broken(inputs: Tensors) -> Tensors:
    raise ZeroDivisionError("a mistake\nwith details")


# -- the harness


def test_rows_of_an_exact_variant_are_complete() -> None:
    rows = measure([eager(toy), eager(toy, "twin")])
    assert [key[1] for key in rows if key[0] == "twin"] == [FORWARD, BACKWARD, BOTH]
    for row in rows.values():
        assert (row.status, row.reason, row.rounds, row.quantiles) == ("exact", "", 3, (0.2, 0.8))
        assert row.median_ms is not None
        assert row.low_ms is not None
        assert row.high_ms is not None
        assert 0 < row.low_ms <= row.median_ms <= row.high_ms
        assert row.gigabytes_per_second == pytest.approx(1000 / row.median_ms / 1e6)
        assert row.teraflops_per_second == pytest.approx(2000 / row.median_ms / 1e9)
        assert (row.command, row.commit, row.dirty, row.device) == ("python -m bench toy", "abc", False, "a CPU")
        assert (row.timing, row.percent_of_roofline, row.peak_extra_bytes) == ("host", None, None)
        assert row.baseline_ms is not None
        assert row.speedup == pytest.approx(row.baseline_ms / row.median_ms)
    assert rows["eager", BOTH].speedup == 1.0


def test_no_speedup_without_the_accuracy() -> None:
    rows = measure([eager(toy), variant("fast but wrong", partial(toy, scale=1.001))])
    for phase in (FORWARD, BACKWARD, BOTH):
        row = rows["fast but wrong", phase]
        assert (row.status, row.speedup) == ("inexact", None)
        assert row.error == pytest.approx(1e-3, rel=0.01)
        assert row.error_of in {FORWARD: ("y",), BACKWARD: ("grad x", "grad w")}.get(phase, ("y", "grad x", "grad w"))
        assert row.median_ms is not None
    line = next(text for text in render(rows.values()).splitlines() if text.startswith("fast but wrong"))
    assert "inexact: y: error 1.0" in line
    assert not line.endswith("x")


def test_nan_is_inexact() -> None:
    rows = measure([eager(toy), variant("nan", partial(toy, scale=math.nan))])
    assert rows["nan", FORWARD].status == "inexact"
    assert rows["nan", FORWARD].error == math.inf


def test_inexact_baseline_gives_nobody_a_speedup() -> None:
    rows = measure([variant("eager", partial(toy, scale=math.nan)), variant("other", toy)])
    assert rows["other", FORWARD].speedup is None


def test_error_that_appears_only_after_the_first_call_is_found() -> None:
    calls = 0

    def decays(inputs: Tensors) -> Tensors:
        nonlocal calls
        calls += 1
        return toy(inputs, 1.0 if calls <= 4 else 2.0)  # the check, the warm-up and two rounds are right

    rows = measure([eager(toy), variant("decays", decays)])
    assert rows["decays", FORWARD].status == "inexact"


@pytest.mark.parametrize(
    ("function", "status", "reason"),
    [
        (out_of_memory, "out of memory", "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 TiB"),
        (broken, "failed", "ZeroDivisionError: a mistake"),
        (lambda inputs: {"y": inputs["x"]}, "failed", "ValueError: result 'count': expected shape (), got nothing"),
    ],
)
def test_variant_that_cannot_be_measured_is_a_row(function: Any, status: str, reason: str) -> None:
    rows = measure([variant("bad", function), eager(toy), variant("elsewhere", toy, available=needs_cuda)])
    row = rows["bad", BACKWARD]
    assert (row.status, row.reason, row.median_ms, row.speedup) == (status, reason, None, None)
    assert rows["eager", FORWARD].status == "exact"
    elsewhere = rows["elsewhere", FORWARD]
    assert (elsewhere.status, elsewhere.reason) == ("unavailable", "needs a CUDA device")
    assert f"{status}: {reason}" in render(rows.values())


def test_variant_that_fails_during_the_rounds_is_a_row_and_the_others_keep_their_times() -> None:
    calls = 0

    def fails_late(inputs: Tensors) -> Tensors:
        nonlocal calls
        calls += 1
        return toy(inputs) if calls <= 3 else out_of_memory(inputs)

    rows = measure([eager(toy), variant("late", fails_late)])
    assert rows["late", FORWARD].status == "out of memory"
    assert rows["eager", BOTH].rounds == 3


def test_bf16_is_judged_by_eager_bf16_and_by_nothing_else() -> None:
    half = {"precision": "bf16", "dtype": torch.bfloat16}
    rows = measure([eager(toy), eager_bf16(toy), variant("fused bf16", toy, **half)])
    row = rows["fused bf16", FORWARD]
    assert row.status == "exact"
    assert 1e-4 < (row.error or 0) < (row.error_bound or 0) < 0.1
    alone = measure([eager(toy), variant("fused bf16", toy, **half)])["fused bf16", FORWARD]
    assert (alone.status, alone.speedup, alone.error_bound) == ("unjudged", None, None)
    assert alone.reason.startswith("eager bf16 did not run")


def test_each_variant_takes_turns_with_the_baseline_and_both_are_warm_before_the_first_round() -> None:
    order: list[str] = []

    def logged(name: str) -> Variant:
        def function(inputs: Tensors) -> Tensors:
            order.append(name)
            return toy(inputs)

        return variant(name, function)

    measure([logged("a"), logged("b"), logged("c")], toy_case(baseline="a", eager={"fp32": "a"}))
    # Check and warm-up; three rounds, with the other first in every second; the last check.
    assert "".join(order) == "aa aaa a bb abbaab b cc accaac c".replace(" ", "")


def test_forward_only_case_has_one_phase_and_states_latency_and_rates() -> None:
    case = toy_case(cotangents=None, phase="rollout", latency=True, rates={"frames_per_second": 8.0})
    (row,) = measure([eager(toy)], case).values()
    assert (row.phase, row.timing, row.quantiles) == ("rollout", "latency", (0.5, 0.99))
    assert row.quality["frames_per_second"] == pytest.approx(8e3 / (row.median_ms or 0))


def test_facts_stand_beside_rates_and_cost_nothing_that_was_measured() -> None:
    asked = []

    def unknown() -> dict[str, float]:
        asked.append("unknown")
        raise ZeroDivisionError("cannot count")

    def never() -> dict[str, float]:
        raise AssertionError("asked of a variant that was not measured")

    case = toy_case(cotangents=None, rates={"frames_per_second": 8.0})
    rows = measure(
        [
            replace(eager(toy), facts=lambda: {"launches": 3.0}),
            replace(eager(toy, "uncounted"), facts=unknown),
            replace(eager(toy, "elsewhere"), facts=never, available=needs_cuda),
        ],
        case,
    )
    known, uncounted = rows["eager", FORWARD], rows["uncounted", FORWARD]
    assert (known.status, known.quality["launches"]) == ("exact", 3.0)
    assert known.quality["frames_per_second"] == pytest.approx(8e3 / (known.median_ms or 0))
    assert (uncounted.status, uncounted.quality.keys(), asked) == ("exact", {"frames_per_second"}, ["unknown"])
    assert rows["elsewhere", FORWARD].quality == {}


def test_time_budget_ends_the_rounds_after_the_least() -> None:
    assert measure([eager(toy)], rounds=1000, least=2, seconds=0.0)["eager", FORWARD].rounds == 2


def test_two_variants_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="different names"):
        measure([eager(toy), eager(toy)])


def test_backward_is_timed_apart_from_forward() -> None:
    events: list[str] = []

    class Logged(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            events.append("forward")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            events.append("backward")
            return grad

    class LoggingTimer(HostTimer):
        def time(self, function: Callable[[], Any]) -> Any:
            events.append("start")
            result = super().time(function)
            events.append("stop")
            return result

    def logged(inputs: Tensors) -> Tensors:
        return toy({"x": Logged.apply(inputs["x"]), "w": inputs["w"]})

    case = toy_case()
    runner = Runner(case, variant("logged", logged), CPU, toy_inputs(CPU, torch.float32))
    timer = LoggingTimer(CPU, "host")
    timer.time(lambda: None)  # what a variant that failed half-way leaves behind
    events.clear()
    runner.time_once(timer)
    assert events == ["start", "forward", "stop", "start", "backward", "stop"]
    forward, backward, both = (runner.times[phase] for phase in case.phases)
    assert both == [forward[0] + backward[0]]


# -- truth and inputs


def test_truth_is_float64_with_gradients_of_the_same_values() -> None:
    inputs = toy_inputs(CPU, torch.bfloat16)
    truth = truth_of(toy_case(), inputs)
    x, w = inputs["x"].double(), inputs["w"].double()
    assert set(truth) == {"y", "count", "grad x", "grad w"}
    assert all(tensor.dtype == torch.float64 and not tensor.requires_grad for tensor in truth.values())
    torch.testing.assert_close(truth["grad x"], ((x * w).cos() * w).detach(), rtol=1e-14, atol=0)


def test_channels_last_keeps_values_and_leaves() -> None:
    inputs = {"x": torch.randn(2, 3, 4, 5, 6).requires_grad_(), "w": torch.randn(3).requires_grad_()}
    laid_out = channels_last(inputs)
    x = laid_out["x"]
    assert x.is_contiguous(memory_format=torch.channels_last_3d)
    assert x.is_leaf
    assert x.requires_grad
    assert torch.equal(x, inputs["x"])
    assert laid_out["w"] is inputs["w"]


def test_quantile_interpolates() -> None:
    assert (quantile([3.0, 1.0, 2.0], 0.5), quantile([0.0, 10.0], 0.2)) == (2.0, 2.0)


# -- memory


kept: list[Tensor] = []


def hungry_run(end_of: Callable[[str], None]) -> None:
    blocks = [torch.ones(32 * 1024, dtype=torch.uint8) for _ in range(90 * 32)]  # written, so they are resident
    kept.append(torch.ones(32 * 1024, dtype=torch.uint8))  # above them on the heap, which therefore cannot shrink
    del blocks
    end_of("first")
    torch.ones(40 * MEGABYTE, dtype=torch.uint8)
    end_of("second")


def prepare_hungry() -> Callable[[Callable[[str], None]], None]:
    return hungry_run


def prepare_failing(error: Exception) -> Any:
    raise error


def test_cpu_memory_is_the_peak_of_each_phase() -> None:
    peaks = memory.measure_on_cpu(prepare_hungry)
    assert peaks is not None
    # A page table and the allocator's slack come on top; a quarter of a megabyte was seen.
    assert peaks["first"] == pytest.approx(90 * MEGABYTE, abs=2 * MEGABYTE)
    assert peaks["second"] == pytest.approx(40 * MEGABYTE, abs=2 * MEGABYTE)


def test_failures_of_the_measuring_process_are_told_apart() -> None:
    with pytest.raises(MemoryError, match="no room"):
        memory.measure_on_cpu(prepare_failing, MemoryError("no room"))
    with pytest.raises(TypeError, match="module-level functions"):
        memory.measure_on_cpu(lambda: None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_out_of_memory_is_recognised(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


# -- rows


def a_row(**changes: Any) -> Row:
    fields = {"suite": "toy", "case": "3x5", "variant": "eager", "phase": FORWARD, "status": "exact", "rounds": 3}
    return Row(**{**fields, "median_ms": 1.5, **changes})


def test_rows_survive_writing_and_reading(tmp_path: Path) -> None:
    rows = [
        a_row(quantiles=(0.2, 0.8), quality={"mAP": 0.5}, versions={"torch": "2"}, dirty=True, speedup=2.0),
        a_row(status="inexact", reason="y: too large, by far", error=math.inf),
        a_row(status="unavailable", reason='needs a "GPU"', median_ms=None, rounds=0),
    ]
    lines, table = write_rows(rows, tmp_path / "new" / "toy")
    assert read_rows(lines) == rows
    with table.open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert [row["variant"] for row in cells] == ["eager"] * 3
    assert (cells[0]["median_ms"], cells[0]["quantiles"], cells[2]["median_ms"]) == ("1.5", "[0.2, 0.8]", "")
    assert cells[1]["reason"] == "y: too large, by far"
    assert sorted(path.name for path in lines.parent.iterdir()) == ["toy.csv", "toy.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "great"}, "status is 'great'"),
        ({"median_ms": "fast"}, "median_ms is 'fast'"),
        ({"median_ms": math.nan}, "median_ms is nan"),
        ({"median_ms": None}, "median_ms is None"),
        ({"rounds": 0}, "rounds is 0"),
        ({"rounds": True}, "rounds is True"),
        ({"status": "inexact", "reason": "y"}, None),
        ({"status": "inexact"}, "without a reason"),
        ({"status": "inexact", "reason": "y", "speedup": 2.0}, "there can be no speed-up"),
        ({"status": "failed", "reason": "y"}, "but median_ms is 1.5"),
        ({"quality": {"mAP": "high"}}, r"quality\['mAP'\] is 'high'"),
    ],
)
def test_rows_are_validated(changes: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert a_row(**changes).status == changes["status"]
        return
    with pytest.raises((TypeError, ValueError), match=message):
        a_row(**changes)


@pytest.mark.parametrize("line", ['{"suite": "toy"}', "[1]", "not json", '{"suite": "toy", "unknown": 1}'])
def test_file_that_is_not_rows_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    good = write_rows([a_row()], tmp_path / "good")[0].read_text()
    path.write_text(good + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: "):
        read_rows(path)


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_table_is_aligned() -> None:
    assert format_table(["name", "ms"], [["a", "10.5"], ["long", "2"]]).splitlines() == [
        "name    ms",
        "----  ----",
        "a     10.5",
        "long     2",
    ]


# -- python -m bench projected_losses


def test_losses_inputs_are_the_same_values_at_every_precision() -> None:
    recipe = Recipe(batch=1, frames=2, pixels=4)
    single, half = (projected_losses.make_inputs(recipe, CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert [name for name in single if name.startswith("prediction")] == [f"prediction{k}" for k in (1, 2, 3, 4)]
    assert torch.equal(single["z"].bfloat16(), half["z"])
    assert single["z"].min() >= 0
    assert half["weight1"].dtype == torch.float32
    assert all(x.is_leaf and x.requires_grad for x in half.values())


def test_losses_work_is_the_closed_forms_at_the_default_size() -> None:
    assert Recipe().rows == 2_621_440
    one_pass = 5 * 2_621_440 * 16 * 2  # five states in bf16
    works = [losses_work(Recipe(), phase, torch.bfloat16) for phase in (FORWARD, BACKWARD, BOTH)]
    assert [work.bytes_moved for work in works] == [2 * one_pass, 3 * one_pass, 5 * one_pass]
    assert works[2].flops == works[0].flops + works[1].flops


def test_losses_smoke_run_writes_exact_rows(tmp_path: Path) -> None:
    flags = ["--quick", "--no-memory", "--device", "cpu", "--variant", "eager", "closed form", "fused"]
    assert projected_losses.main([*flags, "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "projected_losses.jsonl")
    status = {(row.variant, row.phase): row.status for row in rows}
    for phase in (FORWARD, BACKWARD, BOTH):
        assert status["eager", phase] == status["closed form", phase] == "exact"
        assert status["fused", phase] == "unavailable"
    assert {row.suite for row in rows} == {"projected_losses"}


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--variant", "magic"], ["--device", "tpu"]])
def test_losses_refuses_what_it_cannot_serve(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        projected_losses.main(arguments)
    assert arguments[1] in capsys.readouterr().err
