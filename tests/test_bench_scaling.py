"""What a step exchanges among GPUs, counted, and what it is estimated to take."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import scaling
from bench.collectives import (
    BACKWARD,
    FORWARD,
    GRADIENTS,
    LOSSES,
    PROBES,
    Collective,
    activations,
    batch_norm_collectives,
    loss_collectives,
    step_collectives,
)
from bench.harness.rows import read_rows, write_rows
from bench.recipe import TINY, Recipe, build_model, make_batch
from bench.report import page
from bench.scaling import Compute, Machine, estimate, numbers_of_gpus
from fastjepa.environment import ROOT
from fastjepa.model.networks import ResidualBlock
from fastjepa.model.step import TrainStep

CPU = torch.device("cpu")
RECIPE = Recipe()


def counted(collectives: list[Collective], what: str) -> Counter[int]:
    """Calls by bytes."""
    found: Counter[int] = Counter()
    for c in collectives:
        if c.what == what:
            found[c.bytes] += c.calls
    return found


# ---- what is exchanged ----


def test_the_published_step() -> None:
    """By hand: 7 activations of the encoder, 15 of the predictor, four times; a shortcut's BatchNorm goes along."""
    found = step_collectives(RECIPE)
    calls = {what: sum(c.calls for c in found if c.what == what) for what in (FORWARD, BACKWARD, LOSSES, PROBES)}
    assert calls == {FORWARD: 7 + 4 * 15, BACKWARD: 7 + 4 * 15, LOSSES: 3, PROBES: 1}
    encoder = 4 * 32 + (64 + 2 * 64) + (16 + 2 * 16) - 32  # of stem, layer1's two, and layers with a shortcut
    predictor = 3 * 32 + (64 + 2 * 64) + (128 + 2 * 128) + (256 + 2 * 256)
    predictor += (128 + 2 * 128) + (64 + 2 * 64) + (32 + 2 * 32)
    assert sum(size * n for size, n in counted(found, FORWARD).items()) == 3 * 4 * (encoder + 4 * predictor)
    assert counted(found, LOSSES) == Counter({5 * (16 + 256) * 8: 1, 5 * 65 * 64 * 8: 1, 5 * (64 * 16 + 64) * 8: 1})


def test_gradients_are_those_of_what_is_trained_once() -> None:
    jepa, decoder, head = build_model(TINY, CPU)
    batch = make_batch(TINY, CPU, torch.float32)
    step = TrainStep(jepa, decoder, head, steps=TINY.steps)
    step(batch["video"], batch["digit_location"])
    gradients = {p for module in (jepa, decoder, head) for p in module.parameters() if p.grad is not None}
    (found,) = counted(step_collectives(TINY), GRADIENTS)
    assert found == sum(p.numel() * p.element_size() for p in gradients)
    assert jepa.regularizer.proj is jepa.predcost.proj


def batch_norms_called(recipe: Recipe) -> Counter[int]:
    """Channels of each BatchNorm2d that a forward pass calls, with its calls."""
    jepa, *_ = build_model(recipe, CPU)
    called: Counter[int] = Counter()
    for module in jepa.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda norm, *_: called.update([norm.num_features]))
    video = make_batch(recipe, CPU, torch.float32)["video"]
    jepa.unroll(video, None, nsteps=recipe.steps, unroll_mode="parallel", compute_loss=False)
    return called


@pytest.mark.parametrize("what", [FORWARD, BACKWARD])
def test_eager_networks_exchange_once_for_each_batch_norm_that_is_called(what: str) -> None:
    vectors = 3 if what == FORWARD else 2  # pivot, mean and M2; then two sums
    expected = {vectors * channels * 4: calls for channels, calls in batch_norms_called(TINY).items()}
    assert counted(step_collectives(TINY, "eager"), what) == expected


def test_fused_networks_exchange_once_for_each_activation(monkeypatch: pytest.MonkeyPatch, interpreted: None) -> None:
    from fastjepa.fused import networks
    from fastjepa.fused.networks import FusedResNet5, FusedStateOnlyPredictor

    forward: Counter[int] = Counter()
    backward: Counter[int] = Counter()
    real = networks.batch_norm_act_repeatable

    def noted(x: torch.Tensor, bn: Any, residual: Any = None, residual_bn: Any = None, **options: Any) -> Any:
        norms = 1 if residual_bn is None else 2
        forward[3 * norms * bn.num_features * 4] += 1
        backward[(1 + norms) * bn.num_features * 4] += 1
        return real(x, bn, residual, residual_bn, **options)

    monkeypatch.setattr(networks, "batch_norm_act_repeatable", noted)
    jepa, *_ = build_model(TINY, CPU)
    encoder = FusedResNet5.from_eager(jepa.encoder)
    predictor = FusedStateOnlyPredictor.from_eager(jepa.predictor)
    with torch.no_grad():
        state = encoder(make_batch(TINY, CPU, torch.float32)["video"])
        predictor.unroll_parallel(state, TINY.steps)
    found = step_collectives(TINY)
    assert counted(found, FORWARD) == forward
    assert counted(found, BACKWARD) == backward


def test_every_batch_norm_belongs_to_one_activation() -> None:
    jepa, *_ = build_model(RECIPE, torch.device("meta"))
    for network in (jepa.encoder, jepa.predictor):
        norms = [norm for each in activations(network) for norm in each]
        assert sorted(map(id, norms)) == sorted(id(m) for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    assert [len(each) for each in activations(ResidualBlock(4, 4))] == [1, 1]
    assert [len(each) for each in activations(ResidualBlock(4, 8))] == [1, 2]


def test_more_predictions_exchange_more() -> None:
    jepa, *_ = build_model(RECIPE, torch.device("meta"))
    assert counted(batch_norm_collectives(jepa.predictor, 3, "fused"), FORWARD) == Counter(
        {size: 3 * n for size, n in counted(batch_norm_collectives(jepa.predictor, 1, "fused"), FORWARD).items()}
    )
    proj = jepa.regularizer.proj
    assert isinstance(proj, nn.Module)
    one, three = (sum(c.bytes for c in loss_collectives(proj, steps)) for steps in (1, 3))
    assert three == 2 * one


def test_statistics_of_each_gpu_alone_exchange_gradients_and_numbers() -> None:
    kinds = [c.what for c in step_collectives(RECIPE, sync_stats=False)]
    assert kinds == [GRADIENTS, PROBES, "control"]


def test_bytes_that_are_sent() -> None:
    """A ring all-reduce sends each part twice around, an all-gather once."""
    assert Collective("x", "all-reduce", 80, 2).sent(8) == 2 * 2 * 80 * 7 / 8
    assert Collective("x", "all-gather", 80, 2).sent(8) == 2 * 80 * 7
    assert Collective("x", "all-reduce", 80).sent(1) == Collective("x", "all-gather", 80).sent(1) == 0


# ---- how long it takes ----


def test_small_gathers_take_latency() -> None:
    small, machine = Collective("x", "all-gather", 0), Machine()
    assert machine.milliseconds(small, 8) == pytest.approx((5 + 6.6 + 7 * 0.6) / 1e3)
    assert machine.milliseconds(small, 64) == pytest.approx((5 + 6.6 + 56 * 0.6 * 1.8 + 7 * 2.7) / 1e3)
    assert machine.milliseconds(small, 1) == 0
    assert Machine(around_us=0, latency_scale=2).milliseconds(small, 8) == pytest.approx(2 * (6.6 + 7 * 0.6) / 1e3)


def test_large_ones_take_bandwidth() -> None:
    """The ring that sends fewest bytes at the whole bandwidth, and latency hardly counts."""
    size = 10**10
    for kind, times in (("all-gather", 7.0), ("all-reduce", 2 * 7 / 8)):
        large = Collective("x", kind, size)  # type: ignore[arg-type]
        assert Machine().milliseconds(large, 8) == pytest.approx(times * size / (0.8 * 450e9) * 1e3, rel=1e-2)
        slow = Machine(network_gb_per_s=10)
        assert slow.milliseconds(large, 8) == Machine().milliseconds(large, 8)
        n = 16
        times = {"all-gather": n - 1.0, "all-reduce": 2 * (n - 1) / n}[kind]
        assert slow.milliseconds(large, n) == pytest.approx(times * size / (0.8 * 10e9) * 1e3, rel=1e-2)


def test_small_sums_over_many_hosts_go_up_and_down_a_tree() -> None:
    small = Collective("x", "all-reduce", 0)
    tree = 5 + 6.8 + 2 * (7 * 0.6 * 1.8 + 3 * 5.0)
    assert Machine().milliseconds(small, 64) == pytest.approx(tree / 1e3)


def test_a_step_is_the_sum_of_its_parts() -> None:
    compute, machine = Compute(100.0, 64, 4.0, "declared"), Machine()
    found = step_collectives(RECIPE)
    e = estimate(found, compute, machine, 8, 32, overlap=False, scaling="strong")
    assert e.compute_ms == 4 + 96 / 2
    assert e.step_ms == pytest.approx(e.compute_ms + sum(machine.milliseconds(c, 8) for c in found))
    assert e.efficiency == pytest.approx((4 + 96 * 4) / 8 / e.step_ms)
    assert (e.collectives, e.hosts) == (139, 1)
    hidden = estimate(found, compute, machine, 8, 32, overlap=True, scaling="strong")
    assert hidden.step_ms == pytest.approx(e.step_ms - e.gradients_ms)
    short = estimate(found, Compute(0.05, 64, 0, "declared"), machine, 8, 64, overlap=True)  # too short to hide them
    assert short.exposed_ms == pytest.approx(short.gradients_ms - 0.05 * 2 / 3)
    alone = estimate(found, compute, machine, 1, 64, overlap=False)
    assert (alone.step_ms, alone.efficiency, alone.sent_bytes, alone.collectives) == (100, 1, 0, 0)


def test_numbers_of_gpus_are_powers_of_two_and_whole_hosts() -> None:
    assert numbers_of_gpus([1, 2, 4, 8], 8) == [1, 2, 4, 8, 16, 32, 64]
    assert numbers_of_gpus([1], 6) == [1, 2, 4, 6]
    assert numbers_of_gpus([3], 8) == [1, 24]


# ---- the command ----


def test_the_step_of_one_gpu_is_read_from_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = (r for r in read_rows(scaling.STEP_ROWS) if r.variant == scaling.GRAPH)
    compute = scaling.measured_step(scaling.STEP_ROWS, scaling.GRAPH, RECIPE, 2.0)
    assert compute.step_ms == row.median_ms
    assert compute.fixed_ms == pytest.approx(2e-3 * scaling.counted_kernels(RECIPE))
    assert compute.fixed_ms > 0
    assert "NVIDIA H100" in compute.source
    write_rows([row.__class__(**{**vars(row), "median_ms": 50.0})], tmp_path / "step")
    assert scaling.main(["--rows", str(tmp_path / "step.jsonl"), "--hosts", "1"]) == 0
    assert "step of one GPU: 50.00 ms at 64 clips" in capsys.readouterr().out


def test_rows_say_that_they_are_estimates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "numbers.json"
    command = ["--hosts", "1", "2", "--step_ms", "100", "--out", str(tmp_path / "rows"), "--json", str(target)]
    assert scaling.main(command) == 0
    out = capsys.readouterr().out
    assert "an estimate, nothing was timed" in out
    assert "(declared with --step_ms)" in out
    rows, numbers = read_rows(tmp_path / "rows" / "scaling.jsonl"), json.loads(target.read_text())
    assert len(rows) == len(numbers) == 2 * 4 * 5
    for row, values in zip(rows, numbers, strict=True):
        assert (row.status, row.median_ms, row.reason) == ("counted", None, "estimated, not timed")
        assert "estimated" in row.device
        assert row.quality["step_ms"] == pytest.approx(values["step_ms"])
        assert row.phase == f"{values['gpus']} GPUs"
        assert f"{values['step_ms']:.2f}" in out
    assert page.main([str(tmp_path / "rows")]) == 0
    report = (tmp_path / "rows" / "report.md").read_text()
    assert report.count("estimate, not measured") == 1
    assert f"| 16 | 64 | {numbers[4]['step_ms']:.2f} |" in report


def test_more_costs_more() -> None:
    """Statistics that are the batch's cost more than each GPU's own; more GPUs, more; eager, more than fused."""
    compute, machine = Compute(100.0, 64, 1.0, "declared"), Machine()
    for overlap in (False, True):
        times = {
            (path, sync, n): estimate(
                step_collectives(RECIPE, path, sync_stats=sync), compute, machine, n, 64, overlap=overlap
            ).step_ms
            for path in ("fused", "eager") for sync in (False, True) for n in (1, 2, 8, 16, 64)
        }  # fmt: skip
        for (path, sync, n), ms in times.items():
            assert ms >= 100
            assert ms <= times[path, True, n]
            assert ms <= times["eager", sync, n]
            assert ms <= times[path, sync, max(n, 2)]
            assert math.isfinite(ms)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch 0", "--batch must be at least 1, got 0"),
        ("--hosts 0 1", "--hosts must be at least 1, got 0"),
        ("--nvlink_gb_per_s 0", "--nvlink_gb_per_s must be more than 0, got 0"),
        ("--around_us -1", "--around_us must be 0 or more, got -1"),
        ("--latency_scale nan", "--latency_scale must be 0 or more, got nan"),
        ("--step_ms 0", "--step_ms must be more than 0, got 0"),
        ("--step_ms 1", "--kernel_us 2: launches alone would take"),
        ("--variant nothing", "has no measured row of 'nothing' at B=64"),
        ("--rows nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_is_refused(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        scaling.main(flags.split())
    assert message in capsys.readouterr().err


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """A block of text in docs/scaling.md is a part of what the command above it prints."""
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    blocks = re.findall(r"`python -m bench scaling([^`]*)`[^`]*```text\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == text.count("```text") >= 4
    printed: dict[str, list[str]] = {}
    for flags, block in blocks:
        if flags not in printed:
            assert scaling.main(flags.split()) == 0
            printed[flags] = capsys.readouterr().out.splitlines()
        left = iter(printed[flags])
        for line in block.splitlines():  # in this order, so that each is of the table that the first line names
            assert line in left, line
