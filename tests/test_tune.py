"""Candidates for the launch tables: an entry is replaced for one call only, and only what it may be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import batch_norm, convolution, tune, tune_convolution
from bench.harness.case import random_cotangents
from bench.harness.rows import read_rows
from bench.harness.variants import channels_last
from bench.recipe import Recipe
from compare import assert_close_to_truth
from fastjepa.kernels.convolution import op, table
from fastjepa.kernels.convolution.layer import Layer
from fastjepa.kernels.convolution.operands import Operands
from fastjepa.kernels.convolution.table import Launch

CPU = torch.device("cpu")


def test_an_entry_is_set_for_one_call_only() -> None:
    entry = tune.Entry("fastjepa.kernels.batch_norm.tiling", "TILINGS", "forward/plain")
    before = dict(entry.values)
    candidates = tune.tiling_candidates(entry)
    assert before["forward/plain"] in candidates
    inputs = channels_last(
        batch_norm.make_block_inputs(batch_norm.Block(2, 4, 4, batch_norm.PLAIN), CPU, torch.float32)
    )
    seen = []

    def function(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(entry.values["forward/plain"])
        return batch_norm.block_eager(inputs)

    candidate = tune.Candidate(lambda _: function, random_cotangents, entry, candidates[0], CPU)
    found = candidate(inputs)
    assert seen == [candidates[0]]
    assert entry.values == before
    assert set(found) == {"out", "gradient of x", "gradient of weight", "gradient of bias"}


@pytest.mark.parametrize("module", ["forward", "backward"])
def test_candidates_change_rows_and_warps_and_nothing_else(module: str) -> None:
    entry = tune.Entry(f"fastjepa.kernels.projected_losses.{module}", "_CONFIGS", (64, False))
    now = entry.values[64, False]
    candidates = tune.launch_candidates(entry)
    assert now in candidates
    assert len(candidates) > 3
    for candidate in candidates:
        config, reference = (value[0] if isinstance(value, tuple) else value for value in (candidate, now))
        assert config.blocks["BLOCK_H"] == reference.blocks["BLOCK_H"]
        assert isinstance(candidate, type(now))


def test_tune_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--quick", "--device", "cpu", "--only", "grad/plain", "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "tune.jsonl")
    assert {row.variant: row.status for row in rows}["now"] == "unavailable"
    assert "need a CUDA device" in capsys.readouterr().out


LAYERS = {
    "head": Layer((16, 16), 32, 1, 4, 8, shortcut=(16, 16), head=4),
    "small": Layer((32,), 32, 1, 4, 4),
    "transposed": Layer((32,), 16, 1, 4, 4, kernel_size=2),
    "image": Layer((1,), 16, 1, 8, 8),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_candidate_of_a_convolution_computes_it(name: str, interpreted: None) -> None:
    layer = LAYERS[name]
    now = table.choose(layer)
    candidates = tune_convolution.candidates(layer, now)
    assert now not in candidates
    forms = {
        "head": {"gemm", "split_k", "strip"},
        "small": {"gemm", "split_k", "strip"},
        "transposed": {"transposed"},
        "image": {"gemm", "stem"},
    }
    assert {launch.form for launch in candidates} <= forms[name]
    assert {launch.form for launch in (now, *candidates)} == forms[name]
    inputs = convolution.make_inputs(layer, CPU, torch.float32)
    exact = convolution.compute_eager(layer, {key: x.double() for key, x in inputs.items()})["out"]
    packed = convolution.as_kernels_take(layer, inputs)
    for launch in (now, *candidates):
        if launch.form == "split_k":  # a part of the sum for each warp
            assert launch.config.blocks["BLOCK_P"] == launch.config.num_warps
        found = tune_convolution.launched(layer, launch, CPU)(packed)["out"]
        assert_close_to_truth(found, exact, str(launch))


def test_convolutions_are_tuned_layer_by_layer_against_what_the_table_chooses(needs_triton: None) -> None:
    plans = list(tune_convolution.plans(quick=False))
    rollouts, layers = plans[:2], plans[2:]
    assert [case.name.partition(", ")[2] for case, _ in rollouts] == [f"rollout of 8 steps B={B}" for B in (1, 64)]
    for case, variants in rollouts:
        assert [variant.name for variant in variants] == ["eager bf16", "now", "one after another", "launched early"]
        assert case.baseline == "now"
    assert len(layers) == 2 * (18 + 7)
    for case, variants in layers:
        assert case.name.startswith("convolution.table.choose, ")
        assert [variant.name for variant in variants[:2]] == ["eager bf16", "now"]
        assert len(variants) > 6, case.name
        assert len({variant.name for variant in variants}) == len(variants)


@pytest.mark.parametrize("early", [True, False])
def test_a_rollout_is_launched_early_or_not_at_all(
    early: bool, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    launch = op.launch

    def noted(operands: Operands, chosen: Launch) -> None:
        launched.append(chosen)
        launch(operands, chosen)

    monkeypatch.setattr(op, "launch", noted)
    monkeypatch.setattr(tune_convolution, "_STEPS", 1)
    small = Recipe(batch=1, frames=3, pixels=8, henc=2, hpre=2, dstc=4, steps=1)
    case, variants = tune_convolution.rollout_plan(small)
    (variant,) = (v for v in variants if v.name == ("launched early" if early else "one after another"))
    states = case.make_inputs(CPU, torch.bfloat16)
    frames = variant.build(CPU)(states)["frames"]
    assert case.truth is not None
    assert_close_to_truth(frames, case.truth({"states": states["states"].double()})["frames"], "rollout", limit=0.05)
    assert len(launched) == 18
    assert {chosen.launch_early for chosen in launched} == {early}
    assert op.choose is table.choose
