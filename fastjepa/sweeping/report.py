"""What came of a sweep, so far or in the end: the table, and the pictures of the runs that are finished."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastjepa.figures.sweeps import MAX_PANELS, Cell, draw_cell_curves, draw_heat_map, panels_of
from fastjepa.sweeping.plan import Run, count_of, text
from fastjepa.sweeping.state import State
from fastjepa.sweeping.table import write_table


def cells_of(runs: Sequence[Run], states: Sequence[State]) -> list[Cell]:
    """The cells in the order of the grid, each with what its finished runs found, by seed."""
    by_name: dict[str, tuple[dict[str, str], list[State]]] = {}
    for run, state in zip(runs, states, strict=True):
        values = {name: text(value) for name, value in run.values.items()}
        by_name.setdefault(run.cell, (values, []))[1].append(state)
    cells = []
    for values, of_seeds in by_name.values():
        # mAP is NaN where no validation clip has a digit.
        rows = [state.row for state in of_seeds if state.status == "finished" and np.isfinite(state.row["map"])]
        horizons = max((sum(name.startswith("ap_") for name in row) for row in rows), default=0)
        ap = [[row.get(f"ap_{s}", np.nan) for s in range(horizons)] for row in rows]
        shares = [row["positive_share"] for row in rows if "positive_share" in row]
        cells.append(
            Cell(
                values=values,
                map=np.array([row["map"] for row in rows], dtype=np.float64),
                ap=np.array(ap, dtype=np.float64).reshape(len(rows), horizons),
                n_seeds=len(of_seeds),
                positive_share=float(np.mean(shares)) if shares else None,
            )
        )
    return cells


def write_report(runs: Sequence[Run], states: Sequence[State], out: Path) -> list[Path]:
    """Write OUT/sweep.csv, heatmap.png and curves.png; the paths written.

    There are no pictures before a run is finished, and no heat-map of more than `MAX_PANELS` maps: the table has all.
    """
    written = [write_table(runs, states, out)]
    cells = cells_of(runs, states)
    if not any(len(cell.map) for cell in cells):
        return written
    if (panels := len(panels_of(cells))) <= MAX_PANELS:
        written.append(draw_heat_map(cells, out / "heatmap.png"))
    else:
        print(f"heatmap.png is left out: it would be {panels} maps, of at most {MAX_PANELS}; sweep.csv has all values")
    written.append(draw_cell_curves(cells, out / "curves.png"))
    return written


def summary(runs: Sequence[Run], states: Sequence[State]) -> str:
    """How many runs are how far; the best cell by the mean over its seeds, and how far seeds of one cell are apart."""
    counts = Counter(state.status for state in states)
    lines = [f"{count_of(len(runs))}: {', '.join(f'{count} {status}' for status, count in counts.items())}"]
    cells = [cell for cell in cells_of(runs, states) if len(cell.map)]
    if cells:
        best = max(cells, key=lambda cell: float(cell.map.mean()))
        words = ", ".join(f"{name} {value}" for name, value in best.values.items())
        lines.append(f"best: {words}: mAP {best.map.mean():.3f} (mean of {_seeds(len(best.map))})")
    spreads = [float(np.ptp(cell.map)) for cell in cells if len(cell.map) > 1]
    if spreads:
        means = [float(cell.map.mean()) for cell in cells]
        lines.append(
            f"cells' means lie within {max(means) - min(means):.3f} of each other, seeds of one cell within "
            f"{max(spreads):.3f}"
        )
    for run, state in zip(runs, states, strict=True):
        if state.status == "broken":
            lines.append(f"broken: {run.folder}: {state.reason}")
    return "\n".join(lines)


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"
