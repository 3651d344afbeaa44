"""Result rows: one schema, written as JSON lines and CSV, and read back only if every field is what it should be."""

from __future__ import annotations

import csv
import io
import json
import math
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastjepa.files.safe_files import write_text_atomic

# exact: within the policy. inexact: the error breaks it, so no speed-up is stated. unjudged: nothing to judge it by.
# counted: on shapes alone, without a time.
STATUSES = ("exact", "inexact", "unjudged", "counted", "unavailable", "out of memory", "failed")
_TIMED = ("exact", "inexact", "unjudged")


@dataclass(frozen=True)
class Row:
    """One variant of one case in one phase, measured once, with what is needed to trace and repeat it.

    Times are milliseconds; `low_ms` and `high_ms` are the quantiles in `quantiles`, e.g. (0.2, 0.8). `peak_extra_bytes`
    is the highest memory in use during the phase above that of the inputs, what forward saved for backward included.
    `error` is |result − truth| / |truth| of the tensor named `error_of`, the one closest to (or furthest beyond) its
    bound; `error_measure` says whether |·| is the largest entry or the norm. `baseline_ms` is the baseline's median in
    the rounds that alternated with this variant's, and `speedup` their ratio. `percent_of_roofline` is the roofline
    time over the median. Fields that do not apply are None.
    """

    suite: str
    case: str
    variant: str
    phase: str
    status: str
    reason: str = ""  # why it is not "exact"
    precision: str = ""
    rounds: int = 0
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    quantiles: tuple[float, float] | None = None
    timing: str = ""  # "device, cold L2", "host" or "latency"
    bytes_moved: int | None = None
    flops: int | None = None
    gigabytes_per_second: float | None = None
    teraflops_per_second: float | None = None
    percent_of_roofline: float | None = None
    peak_extra_bytes: int | None = None
    error: float | None = None
    error_bound: float | None = None
    error_of: str = ""
    error_measure: str = ""
    speedup: float | None = None
    baseline: str = ""
    baseline_ms: float | None = None
    given: str = ""  # what a peer was given that it does not do by itself
    quality: dict[str, float] = field(default_factory=dict)  # e.g. {"frames_per_second": 1.2e5}, {"mAP": 0.61}
    command: str = ""
    commit: str = ""
    dirty: bool | None = None
    date: str = ""
    device: str = ""
    driver: str = ""
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    threads: int | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, accepted in _TYPES.items():
            _check(name, getattr(self, name), accepted)
        if self.status not in STATUSES:
            raise ValueError(f"row: status is {self.status!r}; accepted: {', '.join(STATUSES)}")
        if self.status in _TIMED and (self.median_ms is None or self.median_ms <= 0 or self.rounds < 1):
            raise ValueError(
                f"row: status is {self.status!r} but median_ms is {self.median_ms}, rounds is {self.rounds}"
            )
        if self.status not in _TIMED and self.median_ms is not None:
            raise ValueError(f"row: status is {self.status!r} but median_ms is {self.median_ms}")
        if self.status != "exact" and self.speedup is not None:
            raise ValueError(f"row: status is {self.status!r}, so there can be no speed-up, got {self.speedup}")
        if self.status != "exact" and not self.reason:
            raise ValueError(f"row: status is {self.status!r} without a reason")


def _check(name: str, value: Any, accepted: Any) -> None:
    """Raise unless `value` is of the annotated type; floats must be finite, except errors, which may be infinite."""
    options = typing.get_args(accepted) if isinstance(accepted, types.UnionType) else (accepted,)
    for option in options:
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if origin is dict and isinstance(value, dict):
            for key, item in value.items():
                _check(f"{name} key", key, arguments[0])
                _check(f"{name}[{key!r}]", item, arguments[1])
            return
        if origin is tuple and isinstance(value, tuple) and len(value) == len(arguments):
            for index, (item, argument) in enumerate(zip(value, arguments, strict=True)):
                _check(f"{name}[{index}]", item, argument)
            return
        if option is float and isinstance(value, float):
            if not math.isfinite(value) and not (name.startswith("error") and value == math.inf):
                raise ValueError(f"row: {name} is {value}; it must be finite")
            return
        if origin is None and type(value) is option:
            return
    raise TypeError(f"row: {name} is {value!r} ({type(value).__name__}); accepted: {accepted}")


_TYPES = typing.get_type_hints(Row)
_COLUMNS = tuple(f.name for f in fields(Row))


def write_rows(rows: Sequence[Row], stem: Path) -> tuple[Path, Path]:
    """Write `rows` to `stem`.jsonl and `stem`.csv, replacing both; returns the two paths."""
    lines = io.StringIO()
    for row in rows:
        lines.write(json.dumps(asdict(row)) + "\n")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        values = (getattr(row, name) for name in _COLUMNS)
        writer.writerow([json.dumps(v) if isinstance(v, dict | tuple) else "" if v is None else v for v in values])
    paths = stem.with_name(stem.name + ".jsonl"), stem.with_name(stem.name + ".csv")
    for path, text in zip(paths, (lines.getvalue(), table.getvalue()), strict=True):
        write_text(path, text)
    return paths


def read_rows(path: Path) -> list[Row]:
    """Read a .jsonl file of rows. Raises ValueError naming file and line if anything in it is not a valid row."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(row_from_json(json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return rows


def read_rows_below(folder: Path) -> list[Row]:
    """All rows of the .jsonl files below `folder`, file by file in the order of their paths.

    Raises ValueError naming file and line if a row is not valid.
    """
    return [row for path in sorted(folder.rglob("*.jsonl")) for row in read_rows(path)]


def row_from_json(values: Any) -> Row:
    """A row from parsed JSON. Raises TypeError or ValueError if it is none."""
    if not isinstance(values, dict):
        raise TypeError(f"a row is an object, got {type(values).__name__}")
    if isinstance(values.get("quantiles"), list):
        values = {**values, "quantiles": tuple(values["quantiles"])}
    return Row(**values)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, text)


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain-text table; columns whose cells all start with a digit or are empty are aligned right."""
    body = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in [list(header), *body]) for column in range(len(header))]
    numeric = [all(not row[column] or row[column][0].isdigit() for row in body) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(cells, widths, numeric, strict=True))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, body)])
