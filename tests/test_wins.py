"""What `auto` takes on a GPU is something that it asks for, and has a committed measurement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from bench.harness.rows import read_rows, write_rows
from fastjepa.environment import ROOT
from fastjepa.kernels import OPS
from fastjepa.measuring.wins import CANDIDATES, MEASURED_WINS


def problems(wins: Mapping[str, str]) -> list[str]:
    """Why entries of such a table are none: "<candidate>: <reason>"."""
    found = []
    for candidate, path in wins.items():
        if candidate not in CANDIDATES:
            found.append(f"{candidate}: nobody asks for it")
        elif not (ROOT / path).is_file():
            found.append(f"{candidate}: no file")
        elif not any(row.speedup is not None and row.speedup > 1 for row in read_rows(ROOT / path)):
            found.append(f"{candidate}: nothing wins")
    return found


def test_every_win_has_its_measurement() -> None:
    assert problems(MEASURED_WINS) == []


def test_an_entry_without_a_measurement_is_noticed(tmp_path: Path) -> None:
    rows = "bench/results/amd-epyc-2026-11-23/step.jsonl"
    slow, _ = write_rows([replace(row, speedup=None) for row in read_rows(ROOT / rows)], tmp_path / "slow")
    planted = {"train_step": rows, "batch_norm": str(slow), "rollout": "bench/results/none.jsonl", "convolution": rows}
    assert problems(planted) == [
        "batch_norm: nothing wins",
        "rollout: no file",
        "convolution: nobody asks for it",
    ]


def test_candidates_are_ops_and_graphs() -> None:
    assert set(CANDIDATES) - set(OPS) == {"train_step", "rollout"}
