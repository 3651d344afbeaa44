"""What a rollout in folded convolutions is expected to take, by the machine code that is made without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness.rows import Row, read_rows
from fastjepa.environment import ROOT
from fastjepa.kernels.convolution.recipe import predictor_layers

MOST_MICROSECONDS = {1: 500.0, 64: 2500.0}  # of 8 steps, by the number of clips


def test_eight_steps_are_expected_to_take_no_longer_than_they_may(tmp_path: Path, needs_triton: None) -> None:
    """Asked for where kernels are interpreted, as in these tests."""
    batches = list(map(str, MOST_MICROSECONDS))
    command = [sys.executable, "-m", "bench", "convolution", "--estimate", "--batch", *batches, "--out", str(tmp_path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(tmp_path / "convolution.jsonl")
    for clips, most in MOST_MICROSECONDS.items():
        *launches, whole = (row for row in rows if row.case.endswith(f" B={clips}"))
        check_rows(clips, launches, whole)
        assert f"8 steps: {whole.quality['estimate_us_of_8_steps']:.0f} us" in done.stdout
        assert whole.quality["estimate_us_of_8_steps"] <= most, done.stdout


def check_rows(clips: int, launches: list[Row], whole: Row) -> None:
    """They are the layers of a step and their sum."""
    layers = predictor_layers(clips)
    assert len(layers) == 18
    assert [row.phase for row in launches] == list(layers)
    for row in launches:
        layer, parts = layers[row.phase], row.quality
        assert (row.status, row.median_ms, row.precision) == ("counted", None, "bf16")
        assert (row.bytes_moved, row.flops) == (layer.bytes_moved, layer.flops)
        assert parts["roofline_us"] > 0.999 * layer.bytes_moved / 4.3e6  # an H200's memory moves 4.3 TB/s
        assert parts["issue_us"] > 0
        assert parts["estimate_us"] == pytest.approx(parts["roofline_us"] + parts["issue_us"] + 1.0)
    total = sum(row.quality["estimate_us"] for row in launches)
    assert whole.phase == "all"
    assert whole.bytes_moved == sum(layer.bytes_moved for layer in layers.values())
    assert whole.quality["launches"] == 18
    assert whole.quality["estimate_us"] == pytest.approx(total)
    assert whole.quality["estimate_us_of_8_steps"] == pytest.approx(8 * total)


def test_kernels_that_are_interpreted_cannot_be_estimated(interpreted: None) -> None:
    from bench import convolution_estimate

    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        convolution_estimate.estimate_step(1)
