"""Case × Variant: run every variant of a case on the same inputs, and put time, memory and error side by side.

All variants are built, checked and warmed up first, then timed in interleaved rounds, so that a clock or a neighbour
that changes during the run changes all of them. A variant that runs out of memory, fails, or cannot run on the device
is a row that says so. A speed-up is stated only for a variant whose error keeps the policy (`measuring.policy`), before
the timed rounds and after them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch

from bench.harness import memory
from bench.harness.case import Case, Runner, truth_of
from bench.harness.roofline import ceilings_of
from bench.harness.rows import Row, format_table
from bench.harness.variants import Tensors, Variant
from fastjepa.environment import Environment, clocks_mhz
from fastjepa.measuring.policy import judge
from fastjepa.measuring.timing import Timer, make_timer, quantile


@dataclass(frozen=True)
class Settings:
    """How much to measure: `rounds`, but after `seconds` of them no more than the first `least`."""

    warmup: int = 3
    rounds: int = 50
    least: int = 5
    seconds: float = 60.0
    memory: bool = True


QUICK = Settings(warmup=1, rounds=2, least=2, seconds=10.0)


def run_case(
    case: Case,
    variants: Sequence[Variant],
    device: torch.device,
    environment: Environment,
    settings: Settings,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Measure `variants` of `case` on `device`; returns one row for each variant and phase, in the order given."""
    if len({variant.name for variant in variants}) != len(variants):
        raise ValueError(f"variants of one case need different names, got {[variant.name for variant in variants]}")
    session = _Session(case, device, settings)
    for variant in variants:
        progress(f"{case.suite} {case.name}: preparing {variant.name}")
        session.prepare(variant)
    progress(f"{case.suite} {case.name}: timing {len(session.runners)} variants")
    timer = make_timer(device, case.latency)
    session.time(timer)
    clocks = clocks_mhz(device)  # before anything else lets them drop
    session.check_again()
    stamp = {**asdict(environment), "sm_clock_mhz": clocks[0], "memory_clock_mhz": clocks[1], "timing": timer.label}
    return [
        Row(**{**session.measurements(variant, phase, environment.device), **stamp})
        for variant in variants
        for phase in case.phases
    ]


class _Session:
    """The variants of one case that are still in the race, and why the others are not."""

    def __init__(self, case: Case, device: torch.device, settings: Settings) -> None:
        self.case, self.device, self.settings = case, device, settings
        self.runners: dict[str, Runner] = {}
        self.refused: dict[str, tuple[str, str]] = {}  # variant: (status, reason)
        self._inputs: dict[torch.dtype, Tensors] = {}
        self._truths: dict[torch.dtype, Tensors | None] = {}  # None: there was no memory for it

    def prepare(self, variant: Variant) -> None:
        """Build, check against the truth, warm up and measure the memory of one variant."""
        reason = variant.available(self.device)
        if reason is None:
            self._make_inputs(variant.dtype)
            self._attempt(variant, lambda: self._prepare(variant))
        else:
            self.refused[variant.name] = ("unavailable", reason)

    def time(self, timer: Timer) -> None:
        """The interleaved rounds."""
        gc.collect()
        gc.disable()  # a collection in the middle of a phase would be charged to it
        start = time.monotonic()
        try:
            for number in range(self.settings.rounds):
                if number >= self.settings.least and time.monotonic() - start > self.settings.seconds:
                    break
                order = list(self.runners.values())
                shift = number % max(len(order), 1)
                for runner in order[shift:] + order[:shift]:  # nobody always runs first
                    self._attempt(runner.variant, lambda runner=runner: runner.time_once(timer))  # type: ignore[misc]
        finally:
            gc.enable()

    def check_again(self) -> None:
        """What was timed must still be right: a race, or an output that aliases another, may show only now."""
        for runner in list(self.runners.values()) if self.case.repeatable else []:
            truth = self._truths[runner.variant.dtype]
            if truth is not None:
                self._attempt(runner.variant, lambda runner=runner, truth=truth: runner.check(truth))  # type: ignore[misc]

    def measurements(self, variant: Variant, phase: str, device_name: str) -> dict[str, object]:
        """The fields of the row of one variant and phase that do not come from the environment."""
        case = self.case
        common: dict[str, object] = {"suite": case.suite, "case": case.name, "variant": variant.name, "phase": phase}
        common |= {"precision": variant.precision, "baseline": case.baseline}
        if variant.name in self.refused:
            status, reason = self.refused[variant.name]
            return {**common, "status": status, "reason": reason}
        runner = self.runners[variant.name]
        times = runner.times[phase]
        quantiles = (0.5, 0.99) if case.latency else (0.2, 0.8)
        median = quantile(times, 0.5)
        status, reason, error = self._judge(variant, phase)
        baseline = self._exact_median(case.baseline, phase) if status == "exact" else None
        seconds = median / 1e3
        row: dict[str, object] = {
            **common,
            **{"status": status, "reason": reason, **error},
            "rounds": len(times),
            "median_ms": median,
            "low_ms": quantile(times, quantiles[0]),
            "high_ms": quantile(times, quantiles[1]),
            "quantiles": quantiles,
            "peak_extra_bytes": runner.peak(phase),
            "speedup": None if baseline is None else baseline / median,
            "quality": {name: units / seconds for name, units in case.rates.items()},
        }
        work, ceilings = case.work(phase, variant.dtype), ceilings_of(device_name)
        if work is not None:
            row |= {"bytes_moved": work.bytes_moved, "flops": work.flops}
            row["gigabytes_per_second"] = work.bytes_moved / seconds / 1e9
            row["teraflops_per_second"] = work.flops / seconds / 1e12
            if ceilings is not None:
                shortest = ceilings.seconds(work.bytes_moved, work.flops, variant.precision)
                row["percent_of_roofline"] = 100 * shortest / seconds
        return row

    def _make_inputs(self, dtype: torch.dtype) -> None:
        if dtype in self._inputs:
            return
        self._inputs[dtype] = self.case.make_inputs(self.device, dtype)
        try:
            self._truths[dtype] = truth_of(self.case, self._inputs[dtype])
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            self._truths[dtype] = None
        self._release()

    def _prepare(self, variant: Variant) -> None:
        # On a CPU first: the process in which memory is measured is the one that dies if there is not enough.
        measured = self.settings.memory and self.device.type == "cpu"
        peaks = memory.measure_on_cpu(_runner_in_child, self.case, variant) if measured else None
        runner = Runner(self.case, variant, self.device, self._inputs[variant.dtype])
        truth = self._truths[variant.dtype]
        if truth is not None:
            runner.check(truth)
        for _ in range(self.settings.warmup):
            runner.run()
        if self.settings.memory and self.device.type == "cuda":
            peaks = memory.measure_on_gpu(runner.run, self.device)
        runner.peaks = peaks or {}
        self.runners[variant.name] = runner

    def _attempt(self, variant: Variant, action: Callable[[], None]) -> None:
        """Do it; whatever goes wrong becomes the variant's row, and the others are still measured."""
        try:
            action()
            return
        except Exception as error:
            status = "out of memory" if memory.is_out_of_memory(error) else "failed"
            message = (str(error).strip().splitlines() or [""])[0]
            self.refused[variant.name] = (status, f"{type(error).__name__}: {message}")
            self.runners.pop(variant.name, None)
        self._release()  # out here, where the exception no longer holds on to the failed call's tensors

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _judge(self, variant: Variant, phase: str) -> tuple[str, str, dict[str, object]]:
        """(status, reason, the row's error fields)."""
        errors = self.runners[variant.name].errors.get(phase)
        if not errors:
            return "unjudged", "no memory for the float64 reference", {}
        eager_name = self.case.eager.get(variant.precision, "")
        eager = self.runners[eager_name].errors[phase] if eager_name in self.runners else None
        verdict = judge(errors, eager, variant.precision)
        fields: dict[str, object] = {"error": verdict.error, "error_bound": verdict.bound, "error_of": verdict.name}
        if verdict.bound is None:
            return (
                "unjudged",
                f"{eager_name or f'eager {variant.precision}'} did not run, whose error is the measure",
                fields,
            )
        if not verdict.exact:
            return "inexact", f"{verdict.name}: error {verdict.error:.2e} exceeds {verdict.bound:.2e}", fields
        return "exact", "", fields

    def _exact_median(self, name: str, phase: str) -> float | None:
        runner = self.runners.get(name)
        if runner is None or self._judge(runner.variant, phase)[0] != "exact":
            return None
        return quantile(runner.times[phase], 0.5)


def _runner_in_child(case: Case, variant: Variant) -> memory.Run:
    """Called in the process that measures CPU memory."""
    device = torch.device("cpu")
    return Runner(case, variant, device, case.make_inputs(device, variant.dtype)).run


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
