"""Case × Variant: measure the variants of a case one after another, each alternating with the case's baseline.

Each variant is built, checked against the float64 truth and warmed up; then it and the baseline are timed in turns, so
that a clock or a neighbour that changes during the run changes both, and their ratio stands. Its rows are handed on at
once: what comes later cannot take them back. A variant that runs out of memory, fails, or cannot run on the device is a
row that says so. A speed-up is stated only for a variant whose error keeps the policy (`fastjepa.policy`), before the
timed rounds and after them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

import torch

from bench.harness.case import Case
from bench.harness.kept import Kept
from bench.harness.rows import Row, format_table
from bench.harness.session import Session, Settings
from bench.harness.timing import make_timer
from bench.harness.variants import Variant
from fastjepa.environment import Environment


class DeviceLostError(RuntimeError):
    """A variant has left the GPU unusable for this process; what it did not reach needs another one."""


def run_case(
    case: Case,
    variants: Sequence[Variant],
    device: torch.device,
    environment: Environment,
    settings: Settings,
    progress: Callable[[str], None] = lambda _: None,
    *,
    known: Sequence[Variant] = (),
    measured: dict[str, bool] | None = None,
    kept: Kept | None = None,
    before: Callable[[list[Row]], None] = lambda rows: None,
    after: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Measure `variants` of `case` on `device`; returns one row for each variant and phase, in the order given.

    Args:
        case, variants, device, environment, settings: what, how, where, and how long.
        progress: told what is going on.
        known: all variants of the case, for the eager one that is the measure of a precision; default: `variants`.
        measured: variants that have rows already, and whether these have times; they are not measured again.
        kept: where the truth is looked for, and kept.
        before: called before a variant is measured, with rows that say that it failed, without a reason.
        after: called with a variant's rows as soon as they are there.

    Raises:
        ValueError: two variants of one name.
        DeviceLostError: a variant has left the GPU unusable; its own rows have been handed to `after`.
    """
    for every in (variants, known):
        if len({variant.name for variant in every}) != len(every):
            raise ValueError(f"variants of one case need different names, got {[variant.name for variant in every]}")
    measured = measured or {}
    session = Session(case, {v.name: v for v in (*known, *variants)}, device, settings, kept or Kept(None), progress)
    session.unusable = {name for name, timed in measured.items() if not timed}
    session.may_use_baseline = any(v.name == case.baseline for v in variants) and case.baseline not in session.unusable
    timer = make_timer(device, case.latency)
    rows: list[Row] = []
    for variant in variants:
        if variant.name in measured:
            continue
        stamp = {**asdict(environment), "timing": timer.label}
        no_result = {"status": "failed", "reason": "no reason was found"}
        before([Row(**{**session.names(variant, phase), **no_result, **stamp}) for phase in case.phases])
        lost = session.measure(variant, timer)
        stamp |= {"sm_clock_mhz": session.clocks[0], "memory_clock_mhz": session.clocks[1]}
        found = [Row(**{**session.measurements(variant, p, environment.device), **stamp}) for p in case.phases]
        rows += found
        after(found)
        if lost:
            raise DeviceLostError(f"{case.suite} {case.name}: {variant.name} has left the device unusable: {lost}")
        session.forget(variant)
    return rows


def render(rows: Iterable[Row]) -> str:
    """The rows as a table: one line per variant and phase."""
    body = []
    for row in rows:
        if row.median_ms is None:
            body.append([row.variant, row.phase, *[""] * 7, f"{row.status}: {row.reason}"])
            continue
        rates = (row.gigabytes_per_second, row.percent_of_roofline)
        peak = None if row.peak_extra_bytes is None else row.peak_extra_bytes / 1e6
        error = "" if row.error is None else f"{row.error:.1e}"
        speedup = "" if row.speedup is None else f"{row.speedup:.2f}x"
        body.append(
            [
                *(row.variant, row.phase, f"{row.median_ms:.3f}", f"{row.low_ms:.3f}..{row.high_ms:.3f}"),
                *("" if value is None else f"{value:.1f}" for value in (*rates, peak)),
                *(error, "" if row.error_bound is None else f"{row.error_bound:.1e}"),
                speedup if row.status == "exact" else f"{row.status}: {row.reason}",
            ]
        )
    header = ["variant", "phase", "median ms", "spread", "GB/s", "% roofline", "peak MB", "error", "bound", "speed-up"]
    return format_table(header, body)
