"""What came of a sweep as one table: sweep.csv, a row for each run."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from fastjepa.files.safe_files import write_text_atomic
from fastjepa.sweeping.plan import Run, text
from fastjepa.sweeping.state import State

TABLE_NAME = "sweep.csv"


def write_table(runs: Sequence[Run], states: Sequence[State], out: Path) -> Path:
    """Write OUT/sweep.csv: the grid's values, seed, status, epochs done, mAP, AP_0.., positive_share, seconds, folder.

    mAP and the columns after it are those of a run's last evaluation, and empty before there is one; `status` says
    whether that is the final one. `seconds` is training time, as in metrics.csv. Written whole or not at all.
    """
    horizons = max((_horizons(state) for state in states), default=0)
    metrics = {"mAP": "map", **{f"AP_{s}": f"ap_{s}" for s in range(horizons)}, "positive_share": "positive_share"}
    metrics["seconds"] = "seconds"
    axes = list(runs[0].values)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*axes, "seed", "status", "epochs_done", *metrics, "folder"])
    for run, state in zip(runs, states, strict=True):
        writer.writerow(
            [
                *(text(run.values[name]) for name in axes), run.seed, state.status, state.epochs,
                *(state.row.get(column, "") for column in metrics.values()), os.path.relpath(run.folder, out),
            ]
        )  # fmt: skip
    write_text_atomic(out / TABLE_NAME, file.getvalue())
    return out / TABLE_NAME


def _horizons(state: State) -> int:
    count = 0
    while f"ap_{count}" in state.row:
        count += 1
    return count
