"""A sweep as pictures: mAP over two axes of its grid, and average precision by horizon for each cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastjepa.figures import style
from fastjepa.optional_packages import needed_for

with needed_for("drawing"):
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

MAX_PANELS = 48
MAX_CURVES = 9  # cells of the published grid; more lines than these cannot be told apart
_MAP = colormaps["cividis"]  # lightness grows with the value, the same to every kind of colour vision
_ALPHA = 0.13


@dataclass(frozen=True, eq=False)
class Cell:
    """What the finished runs of one cell found.

    Attributes:
        values: what the cell has, by axis, as words; the same axes in every cell.
        map: (runs,) mAP, one for each finished seed.
        ap: (runs, horizons) average precision; NaN where a horizon has no value.
        n_seeds: how many seeds it should have.
        positive_share: the AP of guessing, a mean over seeds; None if it is not known.
    """

    values: Mapping[str, str]
    map: np.ndarray
    ap: np.ndarray
    n_seeds: int
    positive_share: float | None = None


def panels_of(cells: Sequence[Cell]) -> dict[tuple[str, ...], list[Cell]]:
    """The cells of each map: those that agree in all axes but the first two."""
    panels: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        panels.setdefault(tuple(cell.values.values())[2:], []).append(cell)
    return panels


# ---- heat-map --------------------------------------------------------------------------------------------------------


def draw_heat_map(cells: Sequence[Cell], path: Path) -> Path:
    """mAP over the first axis (rows) and the second (columns), as PNG; one axis alone is a single row.

    A cell has the mean over its seeds, and below it the lowest and the highest. Further axes make further maps, one for
    each combination of their values, side by side on one scale of colours.

    Raises:
        ValueError: no cell with a finished run, or more than `MAX_PANELS` maps.
    """
    finished = [cell.map for cell in cells if len(cell.map)]
    panels = panels_of(cells)
    if not finished:
        raise ValueError("cells: expected at least one with a finished run")
    if len(panels) > MAX_PANELS:
        raise ValueError(f"cells: they make {len(panels)} maps, of at most {MAX_PANELS}")
    with style.plot_style():
        return style.write_plot(_heat_figure(panels, _scale(finished)), path)


def _scale(finished: Sequence[np.ndarray]) -> Normalize:
    """From the lowest mean to the highest, but as wide as seeds of one cell are apart: what is less is no difference to
    be seen.
    """
    means = [float(values.mean()) for values in finished]
    low, high = min(means), max(means)
    lacking = max(*(float(np.ptp(values)) for values in finished), 1e-3) - (high - low)
    return Normalize(low - max(lacking, 0) / 2, high + max(lacking, 0) / 2)


def _heat_figure(panels: Mapping[tuple[str, ...], Sequence[Cell]], norm: Normalize) -> Figure:
    first = next(iter(panels.values()))
    names = list(first[0].values)
    rows, columns = _sides(first)
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    width = max(3.6, 1.05 * len(columns) + 0.9)
    height = max(1.1, 0.72 * len(rows)) + 0.8
    figure = Figure(figsize=(across * width + 0.9, down * height + 0.45), layout="constrained")
    all_axes = []
    for i, (others, cells) in enumerate(panels.items()):
        axes = figure.add_subplot(down, across, i + 1)
        all_axes.append(axes)
        _draw_map(axes, cells, rows, columns, norm)
        axes.set_xlabel(names[-1] if len(names) == 1 else names[1])
        if len(names) > 1:
            axes.set_ylabel(names[0])
        if others:
            axes.set_title(", ".join(f"{name} {value}" for name, value in zip(names[2:], others, strict=True)))
    bar = figure.colorbar(ScalarMappable(norm, _MAP), ax=all_axes, aspect=18, shrink=0.9, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("mAP")
    figure.suptitle(_heat_title(panels), x=0.01, ha="left", fontsize=9.5, fontweight="bold")
    return figure


def _heat_title(panels: Mapping[tuple[str, ...], Sequence[Cell]]) -> str:
    n_seeds = next(iter(panels.values()))[0].n_seeds
    return "mAP" if n_seeds == 1 else f"mAP: mean over {n_seeds} seeds, below it the lowest and highest"


def _sides(cells: Sequence[Cell]) -> tuple[list[str], list[str]]:
    """What rows and columns stand for, in the order of the grid; one axis alone is columns."""
    keys = [_place(cell) for cell in cells]
    return list(dict.fromkeys(row for row, _ in keys)), list(dict.fromkeys(column for _, column in keys))


def _place(cell: Cell) -> tuple[str, str]:
    values = list(cell.values.values())
    return ("", values[0]) if len(values) == 1 else (values[0], values[1])


def _draw_map(axes: Axes, cells: Sequence[Cell], rows: Sequence[str], columns: Sequence[str], norm: Normalize) -> None:
    for cell in cells:
        row, column = _place(cell)
        x, y = columns.index(column), rows.index(row)
        if not len(cell.map):
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor="#eef0f3", edgecolor=style.RULE, hatch="///"))
            box = {"facecolor": "#eef0f3", "edgecolor": "none", "pad": 1.5}
            axes.text(x, y, "no run\nfinished", ha="center", va="center", fontsize=7.5, color=style.MUTED, bbox=box)
            continue
        mean = float(cell.map.mean())
        colour = _MAP(norm(mean))
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
        # Rec. 709 luminance: dark cells have white words.
        ink = "white" if np.dot(colour[:3], (0.2126, 0.7152, 0.0722)) < 0.5 else style.INK
        below = _spread(cell)
        place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "color": ink}
        axes.annotate(f"{mean:.3f}", (x, y), (0, 1 if below else -4), va="baseline", fontsize=11, **place)
        if below:
            axes.annotate(below, (x, y), (0, -5), va="top", fontsize=7, **place)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _spread(cell: Cell) -> str:
    """The lowest and the highest; which seeds are missing is said by their number."""
    parts = [f"{cell.map.min():.3f} – {cell.map.max():.3f}"] if len(cell.map) > 1 else []
    if len(cell.map) < cell.n_seeds:
        parts.append(f"{len(cell.map)} of {cell.n_seeds} seeds")
    return "\n".join(parts)


# ---- curves ----------------------------------------------------------------------------------------------------------


def draw_cell_curves(cells: Sequence[Cell], path: Path) -> Path:
    """Average precision by horizon, as PNG: a line for each cell, the mean over its seeds, in a band from the lowest to
    the highest. Of more than `MAX_CURVES` cells those with the best mAP are drawn, and the title says so.

    Raises:
        ValueError: no cell with a finished run.
    """
    finished = [cell for cell in cells if len(cell.map)]
    if not finished:
        raise ValueError("cells: expected at least one with a finished run")
    with style.plot_style():
        return style.write_plot(_curves_figure(finished), path)


def _curves_figure(cells: Sequence[Cell]) -> Figure:
    best = sorted(cells, key=lambda cell: -float(cell.map.mean()))[:MAX_CURVES]
    shown = [cell for cell in cells if any(cell is one for one in best)]  # in the order of the grid
    figure = Figure(figsize=(8.2, 3.9), layout="constrained")
    axes = figure.add_subplot()
    horizons = 0
    for i, cell in enumerate(shown):
        ap = cell.ap[:, np.isfinite(cell.ap).any(axis=0)]
        s = np.flatnonzero(np.isfinite(cell.ap).any(axis=0))
        look = style.series_style(i)
        look["linestyle"] = "-" if i < len(style.SERIES_COLOURS) else (0, (4, 1.5))  # a colour that comes again
        words = ", ".join(f"{name} {value}" for name, value in cell.values.items())
        label = f"{words}: mAP {cell.map.mean():.3f}"
        axes.plot(s, np.nanmean(ap, axis=0), label=label, zorder=3, clip_on=False, **look)
        if len(ap) > 1:
            low, high = np.nanmin(ap, axis=0), np.nanmax(ap, axis=0)
            axes.fill_between(s, low, high, color=look["color"], alpha=_ALPHA, linewidth=0)
        horizons = max(horizons, cell.ap.shape[1])
    shares = [cell.positive_share for cell in shown if cell.positive_share is not None]
    if shares:
        share = float(np.mean(shares))
        label = f"chance: {share:.1%} of cells are positive"
        axes.axhline(share, color=style.MUTED, linestyle=(0, (4, 3)), linewidth=1.2, label=label)
    top = max(float(np.nanmax(cell.ap)) for cell in shown)
    axes.set(xlim=(-0.2, horizons - 0.8), ylim=(0, min(1.0, np.ceil(top * 10 + 0.5) / 10)))
    axes.set(xlabel="horizon s  (predicted s + 1 steps ahead)", ylabel="average precision")
    axes.set_xticks(range(horizons))
    axes.grid(axis="x", visible=False)
    axes.set_title(_curves_title(shown, len(cells)))
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def _curves_title(shown: Sequence[Cell], n_cells: int) -> str:
    title = "AP by horizon"
    if len(shown) < n_cells:
        title += f", the {len(shown)} best of {n_cells} cells by mAP"
    return title + (": mean over seeds, and from lowest to highest" if any(len(c.map) > 1 for c in shown) else "")
