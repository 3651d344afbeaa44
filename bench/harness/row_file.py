"""The rows of one suite on disk while they are being measured: each is there as soon as its variant has been measured.

Beside `suite.jsonl` and `suite.csv` lies `suite.now.json` while a variant is being measured: its rows, saying that it
failed. Whoever watches the process that measures (`bench.prove`) makes them true if it dies or never ends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from bench.harness.rows import Row, read_rows, row_from_json, write_rows, write_text

REPEATABLE = ("failed", "out of memory", "unavailable", "inexact", "unjudged")


class RowFile:
    """The rows of `suite` in `folder`. Writing is atomic: a process killed at any moment leaves whole rows."""

    def __init__(self, folder: Path, suite: str) -> None:
        self.stem = folder / suite
        self._now = folder / f"{suite}.now.json"

    @property
    def path(self) -> Path:
        """The file of rows."""
        return self.stem.with_name(f"{self.stem.name}.jsonl")

    def rows(self) -> list[Row]:
        """All rows so far. Raises ValueError if the file holds something else."""
        return read_rows(self.path) if self.path.exists() else []

    def measured(self, case: str) -> dict[str, bool]:
        """The variants of a case that have rows, and whether these have times."""
        return {row.variant: row.median_ms is not None for row in self.rows() if row.case == case}

    def begin(self, rows: Sequence[Row]) -> None:
        """A variant is about to be measured; `rows` say that it failed."""
        write_text(self._now, json.dumps([asdict(row) for row in rows]) + "\n")

    def add(self, rows: Sequence[Row]) -> None:
        """The variant that was begun has these rows; earlier ones of the same variant and phase are replaced."""
        write_rows(merge(self.rows(), rows), self.stem)
        self.clear()

    def clear(self) -> None:
        """Nothing is being measured."""
        self._now.unlink(missing_ok=True)

    def running(self) -> str | None:
        """What is being measured now, or was when its process ended; None if nothing is."""
        rows = self._rows_now()
        return f"{rows[0].case}: {rows[0].variant}" if rows else None

    def running_seconds(self) -> float:
        """For how long; 0 if nothing is being measured."""
        try:
            return max(0.0, time.time() - self._now.stat().st_mtime)
        except OSError:
            return 0.0

    def blame(self, reason: str) -> str | None:
        """What was being measured has failed, for that reason: its rows are written. Returns what it was, or None."""
        rows, name = self._rows_now(), self.running()
        # A process that ended between writing the rows and saying so has measured what it says it is measuring.
        written = {(row.case, row.variant, row.date, row.command) for row in self.rows() if row.status != "failed"}
        rows = [row for row in rows if (row.case, row.variant, row.date, row.command) not in written]
        if rows:
            self.add([replace(row, reason=reason) for row in rows])
        self.clear()
        return name

    def forget(self, statuses: Sequence[str] = REPEATABLE, keep: Callable[[Row], bool] = lambda row: False) -> int:
        """Drop rows of these statuses, unless `keep(row)`, so that they are measured again; returns how many."""
        rows = self.rows()
        left = [row for row in rows if row.status not in statuses or keep(row)]
        if len(left) < len(rows):
            write_rows(left, self.stem)
        return len(rows) - len(left)

    def _rows_now(self) -> list[Row]:
        try:
            values = json.loads(self._now.read_text(encoding="utf-8"))
            return [row_from_json(value) for value in values]
        except (OSError, ValueError, TypeError):  # not there, or not ours
            return []


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """`old` with `new` in the place of those of the same variant and phase, or after them."""
    rows = {(row.case, row.variant, row.phase): row for row in (*old, *new)}
    return list(rows.values())
