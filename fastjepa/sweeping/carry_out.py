"""What the command does once its words are read: train what is not finished, and report what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fastjepa.sweeping.cluster import JOBS_FOLDER, submit
from fastjepa.sweeping.one_by_one import Stopped, train_all
from fastjepa.sweeping.plan import Run, count_of
from fastjepa.sweeping.record import Record
from fastjepa.sweeping.report import summary, write_report
from fastjepa.sweeping.state import State, read_states
from fastjepa.sweeping.table import write_table
from fastjepa.sweeping.words import with_preset

SOME_BROKE = 1


def train(runs: Sequence[Run], out: Path, record: Record, *, again: str, slurm: Mapping[str, str] | None) -> int:
    """Train here, or hand over to `slurm`; the exit status. `again` is the command that goes on.

    Raises:
        ValueError: `out` holds other runs than `runs`, or one that was trained otherwise; nothing has begun.
    """
    states = read_states(runs, out)
    # With what auto took here, so that the sweep goes on and is reported on any machine.
    record = replace(record, flags=tuple(with_preset(record.flags, runs[0].config.preset)))
    if slurm is not None:
        return _hand_over(runs, states, slurm, out, record)
    record.write(out)
    try:
        train_all(runs, states, lambda: write_table(runs, states, out))
    except Stopped as stopped:
        print(f"stopped by {stopped}; continue with: {again}")
        return 128 + stopped.signal_number
    return _report(runs, states, out)


def report(runs: Sequence[Run], out: Path) -> int:
    """The table and the pictures of what there is; the exit status."""
    return _report(runs, read_states(runs, out), out)


def _report(runs: Sequence[Run], states: Sequence[State], out: Path) -> int:
    print(f"\n{summary(runs, states)}\nwrote:")
    for path in write_report(runs, states, out):
        print(f"  {path}")
    return SOME_BROKE if any(state.status == "broken" for state in states) else 0


def _hand_over(
    runs: Sequence[Run], states: Sequence[State], slurm: Mapping[str, str], out: Path, record: Record
) -> int:
    todo = [run for run, state in zip(runs, states, strict=True) if state.status != "finished"]
    print(f"{count_of(len(runs))}: {len(runs) - len(todo)} finished, {len(todo)} to train")
    if not todo:
        return _report(runs, states, out)
    jobs = submit(todo, slurm, out)
    record.write(out)  # only now: what cannot be submitted is no sweep yet
    for run, job in zip(todo, jobs, strict=True):
        print(f"  job {job.job_id}: {run.cell}, seed {run.seed}")
    print(f"submitted; their logs are in {out / JOBS_FOLDER}, and --out {out} --report_only tells how far they are")
    return 0
