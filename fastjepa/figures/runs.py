"""Pictures of a training run, drawn from the files in its folder.

A run folder holds config.json, metrics.csv (one row per epoch) and rollout.npz (a few validation clips). Every draw
function writes atomically, creates the folder it writes to, and returns the path it wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fastjepa.figures.curves import draw_ap_curves, draw_training_curves
from fastjepa.figures.data import read_config, read_metrics, read_rollout
from fastjepa.figures.rollouts import draw_rollout_gif, draw_rollout_strip


def draw_run(run_folder: Path) -> list[Path]:
    """Draws rollout.png, rollout.gif, ap.png and training.png into run_folder/figures/ and returns their paths.

    Raises:
        FileNotFoundError: `run_folder` is not the folder of a run that was evaluated at least once.
        ValueError: one of its files is damaged; the message names it.
    """
    folder = _run_folder(run_folder, "config.json", "metrics.csv", "rollout.npz")
    read_config(folder / "config.json")  # a folder whose config cannot be read is not a run's
    metrics = read_metrics(folder / "metrics.csv")
    arrays = read_rollout(folder / "rollout.npz")
    figures = folder / "figures"
    curves = {"mean over validation batches": _last_ap(metrics, "ap_", folder)}
    if "pooled_ap_0" in metrics:
        curves["pooled over the validation set"] = _last_ap(metrics, "pooled_ap_", folder)
    return [
        draw_rollout_strip(arrays, figures / "rollout.png"),
        draw_rollout_gif(arrays, figures / "rollout.gif"),
        draw_ap_curves(_with_map(curves), figures / "ap.png", _last_share(metrics)),
        draw_training_curves(metrics, figures / "training.png"),
    ]


def draw_step_comparison(run_folders: Sequence[Path], path: Path) -> Path:
    """AP against the horizon for runs trained with different `steps`, ordered by it, as PNG.

    Raises:
        FileNotFoundError: one of the folders is not the folder of an evaluated run.
        ValueError: no folder, a folder named twice, a damaged file, no `steps` in a config, or runs whose validation
            sets differ.
    """
    if not run_folders:
        raise ValueError("run_folders: expected at least one")
    runs = []
    for given in run_folders:
        folder = _run_folder(given, "config.json", "metrics.csv")
        steps = read_config(folder / "config.json").get("steps")
        if type(steps) is not int or steps < 1:
            raise ValueError(f"{folder / 'config.json'}: expected `steps` to be a whole number ≥ 1, got {steps!r}")
        metrics = read_metrics(folder / "metrics.csv")
        runs.append((steps, str(folder), _last_ap(metrics, "ap_", folder), _last_share(metrics)))
    runs.sort(key=lambda run: run[:2])
    shares = [share for *_, share in runs if share is not None]
    if shares and not np.allclose(shares, shares[0], rtol=1e-3, atol=0):
        raise ValueError(f"run_folders: the runs were validated on different data, with positive shares {shares}")
    if len({name for _, name, *_ in runs}) < len(runs):
        raise ValueError(f"run_folders: the same folder is named twice: {', '.join(name for _, name, *_ in runs)}")
    all_steps = [steps for steps, *_ in runs]
    curves = {}
    for steps, name, ap, _ in runs:
        curves[f"steps {steps}" if all_steps.count(steps) == 1 else f"steps {steps} ({name})"] = ap
    return draw_ap_curves(_with_map(curves), path, shares[0] if shares else None)


def _run_folder(folder: Path, *names: str) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a run folder: there is no such folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not the folder of an evaluated run: it lacks {', '.join(missing)} "
            "(a run writes them at its first evaluation)"
        )
    return folder


def _last_ap(metrics: Mapping[str, np.ndarray], prefix: str, folder: Path) -> np.ndarray:
    """AP_0.. of the last row that was evaluated, as many horizons as there are columns."""
    columns: list[np.ndarray] = []
    while f"{prefix}{len(columns)}" in metrics:
        columns.append(metrics[f"{prefix}{len(columns)}"])
    table = np.stack(columns, axis=1) if columns else np.empty((0, 0))
    evaluated = table[np.isfinite(table).any(axis=1)]
    if len(evaluated) == 0:
        raise ValueError(
            f"{folder / 'metrics.csv'}: holds no average precision ({prefix}0, ...): it was not evaluated "
            "yet, or there is no digit in its validation clips"
        )
    return evaluated[-1]


def _last_share(metrics: Mapping[str, np.ndarray]) -> float | None:
    shares = metrics.get("positive_share", np.empty(0))
    shares = shares[np.isfinite(shares)]
    return float(shares[-1]) if len(shares) else None


def _with_map(curves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{label}, mAP {np.nanmean(ap):.3f}": ap for label, ap in curves.items()}
