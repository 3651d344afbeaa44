"""What `auto` takes on a GPU is something that it asks for, and has a committed measurement."""

from __future__ import annotations

from bench.harness.rows import read_rows
from fastjepa.environment import ROOT
from fastjepa.kernels import OPS
from fastjepa.measuring.wins import CANDIDATES, MEASURED_WINS


def test_each_win_is_a_candidate_with_a_file_of_rows_in_which_something_wins() -> None:
    assert MEASURED_WINS.keys() <= set(CANDIDATES)
    for candidate, path in MEASURED_WINS.items():
        rows = read_rows(ROOT / path)
        assert any(row.speedup is not None and row.speedup > 1 for row in rows), f"{candidate}: nothing in {path} wins"


def test_candidates_are_ops_and_graphs() -> None:
    assert set(CANDIDATES) - set(OPS) == {"train_step", "rollout"}
