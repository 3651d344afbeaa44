"""Runs of a sweep that nobody trained: folders as the trainer leaves them, for tests of what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastjepa.storage.checkpoint import save_checkpoint
from fastjepa.storage.run_folder import CHECKPOINT_NAME
from fastjepa.sweeping.grid import parse_grid
from fastjepa.sweeping.plan import Run, plan_runs

# Of a run that is really trained, in a second.
TINY = (
    "--device cpu --preset demo --henc 2 --hpre 2 --dstc 4 --canvas 16 --digit_size 8 --n_train 6 --n_val 5 "
    "--n_frames 5 --batch_size 3 --epochs 2"
).split()
FLAGS = ("--preset", "demo", "--device", "cpu", "--epochs", "2")


def planned(out: Path, *axes: str, seeds: tuple[int, ...] = (1, 2), flags: tuple[str, ...] = FLAGS) -> list[Run]:
    return plan_runs(parse_grid(axes), seeds, flags, out, prog="sweep", here=True)


def row(epoch: int, step: int, map_: float | None) -> dict[str, Any]:
    """A row of metrics.csv; without evaluation if `map_` is None."""
    values: dict[str, Any] = {"epoch": epoch, "step": step, "seconds": 2.5 * epoch, "total": 1.0}
    if map_ is not None:
        values |= {"ap_0": map_ + 0.1, "ap_1": map_ - 0.1, "map": map_, "positive_share": 0.025}
    return values


def leave(
    run: Run, *rows: dict[str, Any], epoch: int | None = None, step: int | None = None,
    cut_short: dict[str, Any] | None = None, folder: Path | None = None, pictures: bool = True, weights: bool = True,
    **config: Any,
) -> Path:  # fmt: skip
    """Make the folder of `run` as it is after these `rows`; `epoch` epochs done (default: as many as rows), at `step`
    (default: that of the last row).

    `config` are options in which it differs from what `run` asks for.
    """
    folder = run.folder if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    last = cut_short or (rows[-1] if rows else {"step": 0})
    state = {
        "config": run.config.to_json() | config,
        "progress": {
            "epoch": len(rows) if epoch is None else epoch,
            "global_step": last["step"] if step is None else step,
        },
        "rows": list(rows),
        "cut_short": cut_short,
        "modules": {"jepa": {"weight": torch.zeros(1)}},
    }
    save_checkpoint(folder / CHECKPOINT_NAME, state)
    if pictures:
        (folder / "figures").mkdir(exist_ok=True)
        (folder / "figures" / "training.png").touch()
    if weights:
        (folder / "pretrained").mkdir(exist_ok=True)
    return folder


def leave_finished(run: Run, map_: float, folder: Path | None = None) -> Path:
    """The folder of `run` as it is at its end."""
    return leave(run, *(row(epoch, 30 * epoch, map_) for epoch in (1, 2)), folder=folder)
