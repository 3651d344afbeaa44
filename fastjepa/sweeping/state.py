"""How far a run is, from its folder alone: not begun, begun, or finished, with its last evaluation.

A run is finished when the trainer would say so: its checkpoint is at the last epoch or at `max_steps`, the model as it
is there was evaluated, and the pictures and weights that follow are written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastjepa.figures.data import read_config
from fastjepa.files.safe_files import CheckpointError, write_text_atomic
from fastjepa.storage.checkpoint import load_checkpoint
from fastjepa.storage.run_folder import CHECKPOINT_NAME
from fastjepa.sweeping.plan import Run
from fastjepa.training.left_out import PICTURES, WEIGHTS, left_out

LOG_NAME = "sweep.log"  # what a run printed
FAILURE_NAME = "broken.txt"  # why its last attempt ended, if it broke

Status = Literal["not begun", "begun", "finished", "broken"]


@dataclass(frozen=True)
class State:
    """How far a run is.

    Attributes:
        status: "broken" is a run that is not finished and whose last attempt ended with an error.
        epochs: how many it has done.
        row: the columns of its last row with an evaluation, as in metrics.csv; empty before there is one.
        reason: why it is broken.
    """

    status: Status
    epochs: int = 0
    row: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


def read_state(run: Run) -> State:
    """Look at the folder of `run`.

    A checkpoint that cannot be read is a broken run.

    Raises:
        ValueError: it holds a run that was trained with other options; the message names what differs.
        OSError: the system refuses.
    """
    failure = run.folder / FAILURE_NAME
    reason = failure.read_text(encoding="utf-8").strip() if failure.is_file() else ""
    path = run.folder / CHECKPOINT_NAME
    if not path.exists():
        if (run.folder / "config.json").exists():
            _check_same(run, read_config(run.folder / "config.json"))
        return State("broken" if reason else "not begun", reason=reason)
    try:
        saved = load_checkpoint(path)
    except CheckpointError as error:
        return State("broken", reason=str(error))
    config, progress = saved.get("config"), saved.get("progress")
    if not isinstance(config, dict) or not isinstance(progress, dict):
        return State("broken", reason=f"{path} does not say which run it is of, and how far that is")
    _check_same(run, config)
    epochs, step = int(progress.get("epoch", 0)), int(progress.get("global_step", 0))
    rows = _rows(saved)
    evaluated = [row for row in rows if "map" in row]
    at_its_end = epochs >= run.config.epochs or (run.config.max_steps is not None and step >= run.config.max_steps)
    # As Trainer.finished and Trainer.evaluated have it.
    if at_its_end and rows and "map" in rows[-1] and rows[-1]["step"] == step and not _left_to_write(run.folder):
        return State("finished", epochs, rows[-1])
    return State("broken" if reason else "begun", epochs, evaluated[-1] if evaluated else {}, reason)


def _rows(saved: Mapping[str, Any]) -> Sequence[Mapping[str, float]]:
    """Those of metrics.csv, as the checkpoint has them: a file of its own, it may be one epoch ahead."""
    cut_short = saved.get("cut_short")
    return [*saved.get("rows", ()), *((cut_short,) if cut_short else ())]


def _left_to_write(folder: Path) -> bool:
    """Whether the trainer was stopped between its last checkpoint and what it writes after that."""
    missing = left_out()
    last = {WEIGHTS: folder / "pretrained", PICTURES: folder / "figures" / "training.png"}
    return any(not path.exists() for what, path in last.items() if what not in missing)


def _check_same(run: Run, saved: Mapping[str, Any]) -> None:
    if different := run.differences(saved):
        raise ValueError(
            f"{run.folder} holds a run that was trained with other options: {'; '.join(different)}. Ask for what is "
            "there, or choose another --out"
        )


def note_failure(folder: Path, reason: str) -> None:
    """Keep in the run's folder why its attempt ended."""
    write_text_atomic(folder / FAILURE_NAME, reason + "\n")


def forget_failure(folder: Path) -> None:
    """Before the next attempt."""
    (folder / FAILURE_NAME).unlink(missing_ok=True)


def read_states(runs: Sequence[Run], out: Path) -> list[State]:
    """The states of all runs of a sweep, before any is trained.

    Raises:
        ValueError: as `read_state`; or `out` holds runs that are not among `runs`: those of another grid.
    """
    known = {run.folder for run in runs}
    others = sorted({path.parent for path in out.glob(f"*/seed-*/{CHECKPOINT_NAME}")} - known)
    if others:
        raise ValueError(
            f"--out {out} holds runs that this grid and these seeds do not have ({len(others)}, like "
            f"{others[0].relative_to(out)}): a sweep can be given more values and seeds, not fewer or others; choose "
            "another --out"
        )
    return [read_state(run) for run in runs]
