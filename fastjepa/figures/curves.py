"""Curves as PNG: average precision against the horizon, and losses against the epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastjepa.figures import style
from fastjepa.optional_packages import needed_for

with needed_for("drawing"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter


def draw_ap_curves(
    curves: Mapping[str, Sequence[float] | np.ndarray], path: Path, positive_share: float | None = None
) -> Path:
    """Average precision against the horizon, as PNG.

    Args:
        curves: label → (AP_0, AP_1, ...); NaN where a horizon has no value.
        positive_share: share of positive cells, which is the AP of random guessing; None draws no such line.

    Raises:
        ValueError: no curve, an empty one, or a value outside [0, 1].
    """
    with style.plot_style():
        return style.write_plot(_ap_figure(curves, positive_share), path)


def _ap_figure(curves: Mapping[str, Sequence[float] | np.ndarray], positive_share: float | None) -> Figure:
    if not curves:
        raise ValueError("curves: expected at least one")
    figure = Figure(figsize=(5.6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    horizons = 0
    for i, (label, values) in enumerate(curves.items()):
        ap = np.asarray(values, dtype=np.float64)
        if ap.ndim != 1 or ap.size == 0 or ((ap < 0) | (ap > 1)).any():
            raise ValueError(f"curves: {label!r} must be a sequence of values in [0, 1], got {values!r}")
        horizons = max(horizons, ap.size)
        axes.plot(np.arange(ap.size), ap, label=label, clip_on=False, zorder=3, **style.series_style(i))
        if len(curves) == 1:
            for s in np.flatnonzero(np.isfinite(ap)):
                axes.annotate(f"{ap[s]:.2f}", (s, ap[s]), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    if positive_share is not None:
        if not 0 <= positive_share <= 1:
            raise ValueError(f"positive_share: expected a value in [0, 1], got {positive_share}")
        axes.axhline(
            positive_share,
            color=style.MUTED,
            linestyle=(0, (4, 3)),
            linewidth=1.2,
            label=f"chance: {positive_share:.1%} of cells are positive",
        )
    axes.set(xlim=(-0.2, horizons - 0.8), ylim=(0, 1), xlabel="horizon s  (predicted s + 1 steps ahead)")
    axes.set_xticks(range(horizons))
    axes.set_title("Average precision of digit detection by horizon")
    axes.grid(axis="x", visible=False)
    axes.legend(loc="best")
    return figure


# Panel title → (column, label) of its curves. Labels are shown where a panel has more than one.
_TRAINING_PANELS = {
    "Total loss": [("loss", "total"), ("jepa_loss", "JEPA")],
    "Prediction loss": [("pred_loss", "prediction")],
    "Variance loss": [("std_loss", "variance")],
    "Covariance loss": [("cov_loss", "covariance")],
    "Weighted VC loss": [("vc_loss", "VC")],
    "Reconstruction (MSE)": [("recon_loss", "train"), ("val_recon_loss", "validation")],
    "Detection (BCE)": [("det_loss", "train"), ("val_det_loss", "validation")],
    "mAP": [("map", "mean over batches"), ("pooled_map", "pooled")],
}


def draw_training_curves(metrics: Mapping[str, np.ndarray], path: Path) -> Path:
    """Losses and mAP against the epoch, as a PNG of small panels; a panel without any column in `metrics` is left out.

    Raises:
        ValueError: `metrics` has no `epoch`, or none of the columns that are drawn.
    """
    with style.plot_style():
        return style.write_plot(_training_figure(metrics), path)


def _training_figure(metrics: Mapping[str, np.ndarray]) -> Figure:
    panels = {
        title: present
        for title, curves in _TRAINING_PANELS.items()
        if (present := [(column, label) for column, label in curves if column in metrics])
    }
    if "epoch" not in metrics or not panels:
        raise ValueError(f"metrics: expected `epoch` and losses or mAP, got {', '.join(metrics) or 'nothing'}")
    for column in ["epoch", *(column for curves in panels.values() for column, _ in curves)]:
        if np.ndim(metrics[column]) != 1 or len(metrics[column]) != len(metrics["epoch"]):
            raise ValueError(f"metrics: {column} has shape {np.shape(metrics[column])}, expected one value per epoch")
    n_columns = min(4, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(2.6 * n_columns, 2.1 * n_rows), layout="constrained")
    for i, (title, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(n_rows, n_columns, i + 1)
        axes.set_title(title)
        for j, (column, label) in enumerate(curves):
            look = style.series_style(j)
            if len(metrics["epoch"]) > 12:
                look["marker"] = ""  # points this close would hide the curve
            axes.plot(metrics["epoch"], metrics[column], label=label, markersize=3.5, **look)
        if title == "mAP":
            _finish_map_panel(axes, metrics)
        else:
            _scale_losses(axes, np.concatenate([metrics[column] for column, _ in curves]))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        if i >= len(panels) - n_columns:
            axes.set_xlabel("epoch")
        if len(axes.lines) > 1:
            axes.legend(fontsize=7.5, handlelength=1.4)
    return figure


def _finish_map_panel(axes: Axes, metrics: Mapping[str, np.ndarray]) -> None:
    axes.set_ylim(0, 1)
    if "positive_share" in metrics:
        axes.plot(
            metrics["epoch"], metrics["positive_share"], color=style.MUTED, linestyle="--", lw=1.2, label="chance"
        )


def _scale_losses(axes: Axes, values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    if finite.size and finite.min() > 0 and finite.max() > 20 * finite.min():
        axes.set_yscale("log")
        few = finite.max() < 1000 * finite.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif finite.size and finite.min() >= 0:
        axes.set_ylim(bottom=0)
