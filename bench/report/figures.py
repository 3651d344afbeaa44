"""Pictures of rows: the waterfall of the step, the roofline, rollout latency, memory, mAP against time.

Each takes rows of one device and returns a matplotlib figure, or None if they have nothing for it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.harness.case import BOTH
from bench.harness.roofline import ceilings_of
from bench.harness.rows import Row
from bench.recipe import GRAPH
from fastjepa.figures.style import INK, MUTED, SERIES_COLOURS, plot_style, series_style
from fastjepa.files.safe_files import write_atomic
from fastjepa.optional_packages import needed_for

with needed_for("drawing"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

_SUMMED = {"exact": SERIES_COLOURS[0], "inexact": SERIES_COLOURS[1], "unjudged": MUTED}


def draw_all(rows: Sequence[Row]) -> list[tuple[str, Figure]]:
    """(title, figure) of every picture that the rows have something for."""
    pictures: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
        "Training step": waterfall,
        "Roofline": roofline,
        "Rollout latency": rollout_latency,
        "Memory": memory,
        "mAP against time": learning,
    }
    with plot_style():
        drawn = [(name, draw(rows)) for name, draw in pictures.items()]
    return [(name, figure) for name, figure in drawn if figure is not None]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plot_style():
        FigureCanvasAgg(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160)
    write_atomic(path, lambda file: file.write(buffer.getvalue()))


def waterfall(rows: Sequence[Row]) -> Figure | None:
    """Bars of the step's variants from the original's down, each with its time, speed-up and error."""
    return _bars(
        _last_case(_timed(rows, "step")),
        "One training step",
        "milliseconds",
        lambda row: row.median_ms,
        lambda row: _step_label(row),
    )


def memory(rows: Sequence[Row]) -> Figure | None:
    """Bars of peak memory of the step's variants."""
    return _bars(
        # A graph's memory is set aside when it is captured, before the measured call.
        [r for r in _last_case(_timed(rows, "step")) if r.peak_extra_bytes is not None and r.variant != GRAPH],
        "Peak memory of one training step",
        "MB above weights and batch",
        lambda row: None if row.peak_extra_bytes is None else row.peak_extra_bytes / 1e6,
        lambda row: "" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / 1e6:,.0f} MB",
    )


def _step_label(row: Row) -> str:
    speedup = f", {row.speedup:.2f}×" if row.speedup is not None else f", {row.status}"
    share = "" if row.percent_of_roofline is None else f", {row.percent_of_roofline:.0f} % of roofline"
    error = "" if row.error is None else f", error {row.error:.0e}"
    return f"{row.median_ms:,.4g} ms{speedup}{share}{error}"


def _bars(
    rows: Sequence[Row],
    title: str,
    unit: str,
    value_of: Callable[[Row], float | None],
    label_of: Callable[[Row], str],
) -> Figure | None:
    if not rows:
        return None
    figure = Figure(figsize=(8.0, 1.3 + 0.36 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    values = [value_of(row) or 0.0 for row in rows]
    axes.barh(range(len(rows)), values, color=[_SUMMED[row.status] for row in rows], height=0.68)
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        axes.annotate(
            label_of(row), (value, place), xytext=(5, 0), textcoords="offset points", va="center", color=INK, fontsize=8
        )
    axes.set_yticks(range(len(rows)), [row.variant for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.75 * max(values))  # room for the labels
    axes.set_xlabel(unit)
    axes.set_title(f"{title}, {rows[0].case}, {rows[0].device}")
    return figure


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Rate against intensity of whatever declares both, below the device's ceilings; None where nobody knows them."""
    points = [
        row
        for row in rows
        if row.median_ms is not None and row.flops and row.bytes_moved and row.phase in (BOTH, "step", "rollout")
    ]
    ceilings = ceilings_of(points[0].device) if points else None
    if ceilings is None:
        return None
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for index, suite in enumerate(dict.fromkeys(row.suite for row in points)):
        of_suite = [row for row in points if row.suite == suite]
        intensities = [(row.flops or 0) / (row.bytes_moved or 1) for row in of_suite]
        rates = [row.teraflops_per_second or 0.0 for row in of_suite]
        axes.plot(intensities, rates, linestyle="none", alpha=0.75, label=suite, **series_style(index))
    every = [(row.flops or 0) / (row.bytes_moved or 1) for row in points]
    span = [min(every) / 2, max(*every, 1000.0) * 2]
    for precision, colour in (("bf16", INK), ("fp32", MUTED)):
        top = ceilings.flops_per_second[precision]
        xs = sorted({span[0], top / ceilings.dram_bytes_per_second, span[1]})
        ys = [min(top, x * ceilings.dram_bytes_per_second) / 1e12 for x in xs]
        axes.plot(xs, ys, color=colour, linewidth=1.2, label=f"{precision} roofline")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte that any implementation must move")
    axes.set_ylabel("TFLOP/s of necessary work")
    axes.set_title(f"Roofline, {points[0].device}")
    axes.legend(fontsize=8)
    return figure


def rollout_latency(rows: Sequence[Row]) -> Figure | None:
    """Median latency with its p99 against the horizon, one panel for each batch size."""
    timed = _timed(rows, "rollout")
    found = [(row, *_batch_and_steps(row.case)) for row in timed]
    if not found:
        return None
    batches = sorted({batch for _, batch, _ in found})
    figure = Figure(figsize=(0.8 + 3.2 * max(len(batches), 2), 4.2), layout="constrained")
    names = list(dict.fromkeys(row.variant for row in timed))
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        for index, name in enumerate(names):
            points = sorted(
                (steps, row) for row, size, steps in found if (row.variant, size) == (name, batch) and row.median_ms
            )
            if points:
                horizons = [steps for steps, _ in points]
                axes.plot(horizons, [row.median_ms for _, row in points], label=name, **series_style(index))
                axes.plot(horizons, [row.high_ms for _, row in points], ":", lw=1, color=series_style(index)["color"])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("predicted frames")
        axes.set_title(f"B = {batch}")
    panels[0].set_ylabel("milliseconds: p50 —, p99 ···")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), fontsize=8)
    figure.suptitle(f"Rollout latency, {timed[0].device}", x=0.01, ha="left", fontsize=9.5, fontweight="bold")
    return figure


def _batch_and_steps(case: str) -> tuple[int, int]:
    """The sizes in a rollout case's name, "B=8 steps=50"."""
    values = dict(word.split("=") for word in case.split() if "=" in word)
    return int(values["B"]), int(values["steps"])


def learning(rows: Sequence[Row]) -> Figure | None:
    """mAP against the wall clock of training runs."""
    runs = [row for row in rows if row.suite == "train"]
    if not runs:
        return None
    figure = Figure(figsize=(7.0, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for index, name in enumerate(dict.fromkeys(f"{row.case}, {row.variant}" for row in runs)):
        points = [row.quality for row in runs if f"{row.case}, {row.variant}" == name]
        axes.plot([p["seconds"] for p in points], [p["mAP"] for p in points], label=name, **series_style(index))
    axes.axhline(runs[0].quality["chance"], color=MUTED, linewidth=1, linestyle="--", label="guessing")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds of training and evaluation")
    axes.set_ylabel("mAP")
    axes.set_title(f"mAP against time, {runs[0].device}")
    axes.legend(fontsize=8)
    return figure


def _timed(rows: Sequence[Row], suite: str) -> list[Row]:
    return [row for row in rows if row.suite == suite and row.median_ms is not None]


def _last_case(rows: Sequence[Row]) -> list[Row]:
    """The rows of the case that was measured last."""
    return [row for row in rows if (row.case, row.date) == (rows[-1].case, rows[-1].date)]
