"""Running the parts of a proof: each in child processes, for a bounded time, with all that they print in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.harness.row_file import RowFile
from bench.harness.suite import DEVICE_LOST, VARIANT_FAILED
from bench.prove.parts import Part
from bench.prove.proof import FAILED, OUT_OF_TIME, PASSED, PENDING, SKIPPED, Outcome, Proof
from fastjepa.environment import ROOT
from fastjepa.sweeping.child_process import Ended, run_child

_LEAST_SECONDS = 5.0  # with less left nothing is begun
_MOST_RESTARTS = 200  # of one part; more than any suite has variants


def prove(proof: Proof, every: Sequence[Part], seconds: float, say: Callable[[str], None] = print) -> None:
    """Run the parts that have not passed, within `seconds` in all; `proof` has what each came to."""
    until = time.monotonic() + seconds
    for part in every:
        if proof.passed(part.name) and not part.again:
            say(f"{part.name}: passed before")
            continue
        if part.unavailable is not None:
            outcome = Outcome(SKIPPED, note=part.unavailable)
        elif until - time.monotonic() < _LEAST_SECONDS and not part.again:
            outcome = Outcome(PENDING, note="the time is over; the same command goes on")
        else:
            # What sums up the others comes last and is short: the time that they have used does not count for it.
            limit = part.seconds if part.again else min(part.seconds, until - time.monotonic())
            outcome = run_part(part, limit, proof.folder)
        proof.note(part.name, outcome)
        say(f"{part.name}: {outcome.status} ({outcome.seconds:.0f} s) {outcome.note}".rstrip())


def run_part(part: Part, seconds: float, folder: Path) -> Outcome:
    """Run one part for at most `seconds`; its log is in `folder`/logs, the rows of a suite are in `folder`."""
    log = folder / "logs" / f"{_slug(part.name)}.log"
    started = time.monotonic()
    try:
        outcome = _run_command(part, seconds, log) if part.suite is None else _run_suite(part, seconds, folder, log)
    except OSError as error:
        outcome = Outcome(FAILED, note=str(error))
    note = f"{outcome.note}; see logs/{log.name}" if outcome.status in (FAILED, OUT_OF_TIME) else outcome.note
    return Outcome(outcome.status, time.monotonic() - started, note)


def _run_command(part: Part, seconds: float, log: Path) -> Outcome:
    ended = run_child(part.command, log, seconds, variables=part.variables, cwd=ROOT)
    if ended.status == 0:
        return Outcome(PASSED)
    return Outcome(OUT_OF_TIME if ended.status is None else FAILED, note=ended.reason)


def _run_suite(part: Part, seconds: float, folder: Path, log: Path) -> Outcome:
    """The suite's command, again and again: each process goes on with what has no rows, until nothing is missing."""
    assert part.suite is not None
    file = RowFile(folder, part.suite)
    file.clear()  # a variant that a killed call was measuring is not to blame for that
    until = time.monotonic() + seconds
    for _ in range(_MOST_RESTARTS):
        before, left = len(file.rows()), until - time.monotonic()
        if left <= 0:
            return _over(file)
        watch = _Watch(file, part.variant_seconds)
        ended = run_child(part.command, log, left, variables=part.variables, cwd=ROOT, overdue=watch.overdue)
        if ended.status is None and watch.hung is None:
            return _over(file)
        if ended.status in (0, VARIANT_FAILED) and file.running() is None:
            return _finished(file, ended.status == 0)
        if watch.hung is not None and watch.hung != file.running():
            # It came to an end while it was being asked to; what its process went on with is not to blame.
            file.clear()
            continue
        if file.blame(ended.reason or "its process ended without a word") is not None:
            continue
        if ended.status == DEVICE_LOST or len(file.rows()) > before:
            continue
        return Outcome(FAILED, note=_outside(ended))
    return Outcome(FAILED, note=f"its process ended {_MOST_RESTARTS} times before it was done")


class _Watch:
    """Which variant has taken too long, if one has."""

    def __init__(self, file: RowFile, seconds: float) -> None:
        self.file, self.seconds = file, seconds
        self.hung: str | None = None

    def overdue(self) -> bool:
        """Whether a variant is being measured for longer than it may."""
        if self.file.running_seconds() > self.seconds:
            self.hung = self.file.running()
        return self.hung is not None


def _over(file: RowFile) -> Outcome:
    """Its time is over; the variant that was being measured is not to blame for that."""
    file.clear()
    return Outcome(OUT_OF_TIME, note=f"its time was over; {len(file.rows())} rows so far, the same command goes on")


def _finished(file: RowFile, passed: bool) -> Outcome:
    rows = file.rows()
    failed = sorted({row.variant for row in rows if row.status == "failed"})
    inexact = sorted({row.variant for row in rows if row.status == "inexact"})
    notes = [f"{len(rows)} rows"]
    notes += [f"failed: {', '.join(failed)}"] if failed else []
    notes += [f"inexact: {', '.join(inexact)}"] if inexact else []
    return Outcome(PASSED if passed else FAILED, note="; ".join(notes))


def _outside(ended: Ended) -> str:
    return f"{ended.reason or 'it ended early'}; it was not measuring a variant"


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() or c == "_" else " " for c in name).split())
