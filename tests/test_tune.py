"""Candidates for the launch tables: an entry is replaced for one call only, and only what it may be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import batch_norm, tune
from bench.harness.case import random_cotangents
from bench.harness.rows import read_rows
from bench.harness.variants import channels_last

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
