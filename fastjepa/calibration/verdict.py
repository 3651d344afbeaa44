"""The answer to "what is fastest here, and exact": looked up, or measured once."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from fastjepa.calibration.children import Limits, measure
from fastjepa.calibration.choice import EAGER, Choice
from fastjepa.calibration.layers import LAYERS
from fastjepa.calibration.search import BROKEN, among, next_choice
from fastjepa.calibration.setting import Setting
from fastjepa.calibration.store import (
    MEASURED,
    LockTimeoutError,
    Rows,
    find_rows,
    only_one_process,
    rows_folder,
    write_rows,
)
from fastjepa.calibration.trial import Trial, scores, settled, typical_reference
from fastjepa.files.safe_files import CheckpointError

VARIABLE = "FASTJEPA_CALIBRATE"
_MARGIN = 1.02  # how much faster than eager is more than noise
_LOCK_SECONDS = 300.0  # for some processes that wait for each other

Allowed = Callable[[Choice], bool]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The rows for a setting, and where they came from; without rows, `origin` says why there are none."""

    setting: Setting
    rows: Rows
    origin: str

    def best(self, allowed: Allowed = lambda choice: True, fallback: Choice = EAGER) -> Choice:
        """The fastest exact choice among the allowed ones; `fallback`, or eager, where nothing is clearly faster.

        Where none of them was measured it is `fallback`, unless that is known not to work and eager is allowed.
        """
        times = {choice: time for choice, time in scores(self.rows).items() if allowed(choice)}
        if not times.keys() - {EAGER}:
            broken = any(row.choice == fallback and row.status in BROKEN for row in self.rows)
            return EAGER if broken and allowed(EAGER) else fallback
        eager = typical_reference(row for row in self.rows if row.status == "exact")
        if eager is not None and allowed(EAGER):
            times[EAGER] = eager
        best = min(times, key=lambda choice: times[choice])
        steady = next((choice for choice in (fallback, EAGER) if choice in times), best)
        return best if times[best] * _MARGIN < times[steady] else steady

    def broken(self, allowed: Allowed) -> str | None:
        """Why nothing that is allowed works, by one candidate; None if something does, or may at the next attempt."""
        rows = [row for row in self.rows if allowed(row.choice)]
        if any(row.status == "exact" or not row.settled for row in rows):
            return None
        return next((str(row) for row in rows if row.status in BROKEN), None)

    def gain(self, choice: Choice) -> str:
        """By how much `choice` wins, in words; "" for eager, and where nothing was measured."""
        row = next((row for row in self.rows if row.choice == choice), None)
        if row is None or row.milliseconds is None:
            return ""
        if row.speedup is None:
            return f"{row.milliseconds:.2f} ms; eager does not fit in memory beside it"
        return f"{row.speedup:.2f}× eager, {row.milliseconds:.2f} ms instead of {row.reference_milliseconds:.2f}"

    def why_not(self, has_part: Callable[[Choice], bool], allowed: Allowed = lambda _: True) -> str:
        """Why a part is in no choice that won: what came of the candidate with it that came closest."""
        if not self.rows:
            return self.origin
        rows = [row for row in self.rows if has_part(row.choice) and allowed(row.choice)]
        times = scores(rows)
        if times:
            best = min(times, key=lambda choice: times[choice])
            return f"measured here: {next(str(row) for row in rows if row.choice == best)}"
        return f"measured here: {rows[0]}" if rows else "not measured: the time was over, or a part of it does not work"

    def report(self, chosen: Choice) -> str:
        """What won and by how much, and what came of each other candidate, a line each."""
        lines = [f"calibration for {self.setting}", f"  {self.origin}"]
        gain = self.gain(chosen)
        lines.append(f"  → {chosen}" + (f": {gain}" if gain else ""))
        if chosen.convolutions not in ("", "all"):
            left = [layer for layer in LAYERS if layer not in chosen.own_layers]
            lines.append(f"    torch's convolutions run {', '.join(left)}")
        times = scores(self.rows)
        for row in sorted(self.rows, key=lambda row: times.get(row.choice, float("inf"))):
            if row.choice != chosen:
                lines.append(f"    {row}")
        return "\n".join(lines)


def say_on_stderr(line: str) -> None:
    """Where progress goes, unless told otherwise."""
    print(f"fastjepa: {line}", file=sys.stderr, flush=True)


def switched_off() -> bool:
    """Whether FASTJEPA_CALIBRATE=0 is set. Raises ValueError for a value other than 0 and 1."""
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 (eager, nothing is measured) or 1; got {value!r}")
    return value == "0"


def resolve(
    setting: Setting,
    device: torch.device,
    *,
    allowed: Allowed = lambda _: True,
    recompute: bool = True,
    cache_dir: Path | None = None,
    measuring: bool = True,
    redo: bool = False,
    limits: Limits | None = None,
    makers: str | None = None,
    say: Callable[[str], None] = say_on_stderr,
) -> Verdict:
    """The verdict for a setting: from the cache or the rows of the package, else measured now and kept.

    Each candidate is kept as soon as it is known. A search that came to no end, because its time was over or the
    process was killed, is gone on with, for as long again; what may have been the moment's fault ("hung", "out of
    memory", "unavailable") is tried once more. Then rows are final.

    Args:
        setting: the question.
        device: where candidates run.
        allowed: which choices can be taken: no other is measured.
        recompute: whether fused networks are first tried with recomputation (`search.next_choice`).
        cache_dir: default: the user's, `storage.cache_folder.default_cache_dir()`.
        measuring: False only looks up.
        redo: measure even if there are rows.
        limits: of time; default: `Limits.of` the purpose.
        makers: see `children.measure`.
        say: gets progress, a line at a time.

    Raises:
        ValueError: FASTJEPA_CALIBRATE is neither 0 nor 1.
    """
    if switched_off():
        return Verdict(setting, (), f"{VARIABLE}=0 is set: eager, and nothing was measured")
    folder, scope = rows_folder(cache_dir), _Scope(allowed, recompute)
    found = None if redo else find_rows(setting, folder, say)
    if found is not None and (not measuring or _complete(setting, *found, scope)):
        return _looked_up(setting, *found, scope)
    if not measuring:
        return Verdict(setting, (), "it was not measured on this GPU at these sizes")
    try:
        with only_one_process(folder, _LOCK_SECONDS, say):
            found = None if redo else find_rows(setting, folder, lambda _: None)
            if found is not None and _complete(setting, *found, scope):
                return _looked_up(setting, *found, scope)
            kept, known = _Kept(setting, folder, redo), found[0] if found else ()
            return _measure(setting, device, known, scope, kept, limits or Limits.of(setting.purpose), makers, say)
    except LockTimeoutError as error:
        return Verdict(
            setting, found[0] if found else (), f"{error}; {'as far as known' if found else 'eager for now'}"
        )


@dataclasses.dataclass(frozen=True)
class _Scope:
    """What a search may try, and with what it begins."""

    allowed: Allowed
    recompute: bool

    def ends(self, setting: Setting, known: Iterable[Trial]) -> bool:
        """Whether nothing is left to try."""
        return next_choice(setting.purpose, among(self.allowed, list(known)), self.recompute) is None


def _complete(setting: Setting, rows: Rows, path: Path, scope: _Scope) -> bool:
    """Whether the search has come to its end, so that no start goes on with it.

    What is shipped is not tried again: who made it has seen to that.
    """
    return scope.ends(setting, rows if path.parent == MEASURED else settled(rows))


def _looked_up(setting: Setting, rows: Rows, path: Path, scope: _Scope) -> Verdict:
    unfinished = "" if _complete(setting, rows, path, scope) else ", not all of it yet"
    return Verdict(setting, rows, f"measured before{unfinished}: {path}")


class _Kept:
    """The file of one setting while candidates are added."""

    def __init__(self, setting: Setting, folder: Path, redo: bool) -> None:
        self.setting, self.folder, self.redo = setting, folder, redo
        self.path: Path | None = None
        self.error = ""
        self._rows: Rows = ()

    def write(self, rows: Rows) -> None:
        """Replace the file; what goes wrong is in `error`."""
        rows = tuple(row for row in rows if row.status != "not measured")
        if not rows or rows == self._rows or (self.redo and not any(row.measured for row in rows)):
            return  # what was there before is better
        self._rows = rows
        try:
            self.path, self.error = write_rows(self.setting, rows, self.folder), ""
        except (OSError, CheckpointError) as error:
            self.error = str(error)


def _measure(
    setting: Setting,
    device: torch.device,
    known: Rows,
    scope: _Scope,
    kept: _Kept,
    limits: Limits,
    makers: str | None,
    say: Callable[[str], None],
) -> Verdict:
    what = f"going on after {len(settled(known))} candidates with" if known else "measuring once"
    say(
        f"{what} what is fastest on {setting.gpu}, in child processes, for at most {limits.total:.0f} s "
        f"({VARIABLE}=0 leaves it out)"
    )
    if device.type == "cuda" and device.index is None:  # a child's current device is another matter
        device = torch.device("cuda", torch.cuda.current_device())
    rows = measure(
        setting, str(device), say, known=known, allowed=scope.allowed, recompute=scope.recompute, keep=kept.write,
        limits=limits, makers=makers,
    )  # fmt: skip
    kept.write(rows)
    if not any(row.measured for row in rows):
        # Perhaps another program has the GPU, or its memory: the next start may do better.
        why = rows[0].reason if rows else "there was no time"
        return Verdict(setting, rows, f"nothing could be measured, and the next start tries again ({why})")
    if kept.error:
        return Verdict(
            setting, rows,
            f"measured now, but not kept: {kept.error}; so every start will measure again, unless --cache_dir (of "
            f"commands) or XDG_CACHE_HOME names a folder that can be written, or {VARIABLE}=0 is set",
        )  # fmt: skip
    then = "" if scope.ends(setting, settled(rows)) else "; the next start goes on with the rest"
    return Verdict(
        setting, rows, f"measured now, kept in {kept.path}{then}; python -m fastjepa.calibrate --redo measures again"
    )
