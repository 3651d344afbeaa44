"""One case being measured: its inputs and truth, the baseline, and the variant whose turn it is."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.harness import memory
from bench.harness.case import Case, Runner, truth_of
from bench.harness.kept import Kept, PhaseErrors
from bench.harness.roofline import ceilings_of
from bench.harness.timing import Timer, quantile
from bench.harness.variants import Tensors, Variant
from fastjepa.environment import clocks_mhz
from fastjepa.policy import is_out_of_memory, judge


@dataclass(frozen=True)
class Settings:
    """How much to measure of each variant: `rounds`, but after `seconds` of them no more than the first `least`."""

    warmup: int = 3
    rounds: int = 50
    least: int = 5
    seconds: float = 15.0
    memory: bool = True


QUICK = Settings(warmup=1, rounds=2, least=2, seconds=10.0)


class Session:
    """The variants of one case: the baseline, which stays, and the one that is being measured."""

    def __init__(
        self,
        case: Case,
        known: dict[str, Variant],
        device: torch.device,
        settings: Settings,
        kept: Kept,
        progress: Callable[[str], None],
    ) -> None:
        self.case, self.known, self.device, self.settings, self.kept = case, known, device, settings, kept
        self.progress = progress
        self.may_use_baseline = False
        self.unusable: set[str] = set()  # have failed in an earlier process: a crash would be blamed on another variant
        self.runners: dict[str, Runner] = {}
        self.refused: dict[str, tuple[str, str]] = {}  # variant: (status, reason)
        self.clocks: tuple[int | None, int | None] = (None, None)
        self._inputs: dict[torch.dtype, Tensors] = {}
        self._truths: dict[torch.dtype, Tensors | None] = {}  # None: it could not be had
        self._without_truth = "there is nothing that it must equal" if case.truth is None else ""
        self._eager: dict[str, PhaseErrors | None] = {}  # by precision

    def measure(self, variant: Variant, timer: Timer) -> str:
        """Everything about one variant; why the device cannot be used any more, or ""."""
        reason = variant.available(self.device)
        if reason is not None:
            self.refused[variant.name] = ("unavailable", reason)
            return ""
        # Before the variant: what fails here is not its fault, and on a CPU or GPU it needs the most memory.
        self._attempt(variant, lambda: self._make_inputs(variant.dtype))
        self._attempt(variant, lambda: self._find_eager_errors(variant))
        if variant.name != self.case.baseline and self.may_use_baseline:
            self._prepare_baseline()
        self._attempt(variant, lambda: self._prepare(variant))
        self._time(variant, timer)
        # Before anything else lets them drop; and a device that is lost is not asked.
        self.clocks = (None, None) if variant.name in self.refused else clocks_mhz(self.device)
        self._attempt(variant, lambda: self._check_again(variant))
        return self._device_problem() if self.refused else ""

    def forget(self, variant: Variant) -> None:
        """Let go of a variant that has been measured, with the code that torch.compile has made for it."""
        baseline = self.case.baseline
        if variant.name != baseline:
            self.runners.pop(variant.name, None)
            if self.refused.get(baseline, ("", ""))[0] == "out of memory":
                del self.refused[baseline]  # there may be room beside the next variant
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # graphs and recompilation counts of one variant are not another's
        self._release()

    def names(self, variant: Variant, phase: str) -> dict[str, object]:
        """What a row is called."""
        case = self.case
        names: dict[str, object] = {"suite": case.suite, "case": case.name, "variant": variant.name, "phase": phase}
        return names | {"precision": variant.precision, "baseline": case.baseline, "given": variant.given}

    def measurements(self, variant: Variant, phase: str, device_name: str) -> dict[str, object]:
        """The fields of the row of one variant and phase that do not come from the environment."""
        case, common = self.case, self.names(variant, phase)
        if variant.name in self.refused:
            status, reason = self.refused[variant.name]
            return {**common, "status": status, "reason": reason}
        runner = self.runners[variant.name]
        times = runner.times[phase]
        quantiles = (0.5, 0.99) if case.latency else (0.2, 0.8)
        median = quantile(times, 0.5)
        status, reason, error = self._judge(variant, phase)
        baseline, exact_baseline = self._baseline(variant, phase, median)
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
            "baseline_ms": baseline,
            "speedup": baseline / median if baseline is not None and status == "exact" and exact_baseline else None,
            "quality": {name: units / seconds for name, units in case.rates.items()} | self._facts(variant),
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

    def _facts(self, variant: Variant) -> dict[str, float]:
        """What is known of a variant without measuring; nothing that goes wrong here costs what was measured."""
        try:
            return {} if variant.facts is None else dict(variant.facts())
        except Exception as error:
            self._say(f"{variant.name}: its facts are not known: {type(error).__name__}: {error}")
            return {}

    def _say(self, what: str) -> None:
        self.progress(f"{self.case.suite} {self.case.name}: {what}")

    def _make_inputs(self, dtype: torch.dtype) -> None:
        if dtype in self._inputs:
            return
        inputs = self.case.make_inputs(self.device, dtype)
        # In mixed precision the inputs are fp32 at every precision, and so is what they must give.
        same = next((d for d, x in self._inputs.items() if _dtypes(x) == _dtypes(inputs)), None)
        self._truths[dtype] = self._find_truth(inputs) if same is None else self._truths[same]
        self._inputs[dtype] = inputs
        self._release()

    def _find_truth(self, inputs: Tensors) -> Tensors | None:
        """The truth, kept or computed; None if it cannot be had, which is no fault of any variant."""
        if self.case.truth is None:
            return None
        name = f"truth {self.case.suite} {self.case.name} {_dtypes(inputs)} {self.device.type}"
        truth = self.kept.tensors(name, self.device)
        if truth is not None:
            return truth
        self._say("computing the float64 truth")
        try:
            truth = truth_of(self.case, inputs)
        except Exception as error:
            message = (str(error).strip().splitlines() or [""])[0]
            lack = "no memory for the float64 reference" if is_out_of_memory(error) else "no float64 reference"
            self._without_truth = f"{lack} ({type(error).__name__}: {message[:200]})"
            return None
        self.kept.keep_tensors(name, truth)
        return truth

    def _find_eager_errors(self, variant: Variant) -> None:
        """The errors of the eager variant that is the measure of `variant`: kept ones, or from a run of it."""
        name = self.case.eager.get(variant.precision, "")
        if variant.precision in self._eager or name == variant.name:
            return
        eager = None if name in self.unusable else self.known.get(name)
        if eager is None or eager.available(self.device) is not None or self._truths[variant.dtype] is None:
            self._eager[variant.precision] = None
            return
        kept = self.kept.errors(self._errors_name(eager))
        if kept is None:
            self._say(f"finding the errors of {name}, the measure of {variant.precision}")
            self._make_inputs(eager.dtype)
            try:
                kept = self._checked(eager).errors
            except Exception:  # it becomes no row: that of the eager variant says what is wrong with it
                kept = None
            self._release()
        self._eager[variant.precision] = kept

    def _errors_name(self, variant: Variant) -> str:
        return f"errors {self.case.suite} {self.case.name} {variant.name} {self.device.type}"

    def _checked(self, variant: Variant) -> Runner:
        runner = Runner(self.case, variant, self.device, self._inputs[variant.dtype])
        truth = self._truths[variant.dtype]
        if truth is not None:
            runner.check(truth)
        if variant.name == self.case.eager.get(variant.precision) and runner.errors:
            self._eager[variant.precision] = runner.errors
            self.kept.keep_errors(self._errors_name(variant), runner.errors)
        return runner

    def _prepare_baseline(self) -> None:
        """Have the baseline ready, checked and warm; where it cannot run, variants are timed without it."""
        baseline = self.known[self.case.baseline]
        if baseline.name in self.runners or baseline.name in self.refused:
            return
        if baseline.available(self.device) is not None:
            self.may_use_baseline = False
            return
        self._say(f"preparing {baseline.name}, the baseline")
        self._attempt(baseline, lambda: self._make_inputs(baseline.dtype))
        self._attempt(baseline, lambda: self._warm(self._checked(baseline)))

    def _prepare(self, variant: Variant) -> None:
        self._say(f"preparing {variant.name}")
        # On a CPU first: the process in which memory is measured is the one that dies if there is not enough.
        measured = self.settings.memory and self.device.type == "cpu"
        peaks = memory.measure_on_cpu(_runner_in_child, self.case, variant) if measured else None
        runner = self._warm(self._checked(variant))
        if self.settings.memory and self.device.type == "cuda":
            peaks = memory.measure_on_gpu(runner.run, self.device)
        runner.peaks = peaks or {}

    def _warm(self, runner: Runner) -> Runner:
        for _ in range(self.settings.warmup):
            runner.run()
        self.runners[runner.variant.name] = runner
        return runner

    def _time(self, variant: Variant, timer: Timer) -> None:
        """The rounds, in each of which the variant and the baseline take turns to be first."""
        pair = [self.runners[n] for n in dict.fromkeys((self.case.baseline, variant.name)) if n in self.runners]
        if variant.name not in self.runners:
            return
        self._say(f"timing {' and '.join(runner.variant.name for runner in pair)}")
        for runner in pair:
            runner.times = {phase: [] for phase in self.case.phases}
        gc.collect()
        gc.disable()  # a collection in the middle of a phase would be charged to it
        start = time.monotonic()
        try:
            for number in range(self.settings.rounds):
                if number >= self.settings.least and time.monotonic() - start > self.settings.seconds:
                    break
                for runner in pair if number % 2 == 0 else pair[::-1]:
                    if runner.variant.name in self.runners:
                        self._attempt(runner.variant, lambda runner=runner: runner.time_once(timer))  # type: ignore[misc]
                if variant.name not in self.runners:
                    break
        finally:
            gc.enable()

    def _check_again(self, variant: Variant) -> None:
        """What was timed must still be right: a race, or an output that aliases another, may show only now."""
        truth = self._truths.get(variant.dtype)
        if self.case.repeatable and truth is not None:
            self.runners[variant.name].check(truth)

    def _attempt(self, variant: Variant, action: Callable[[], object]) -> None:
        """Do it, unless the variant has failed already; whatever goes wrong becomes its row."""
        if variant.name in self.refused:
            return
        try:
            action()
            return
        except Exception as error:
            status = "out of memory" if is_out_of_memory(error) else "failed"
            message = (str(error).strip().splitlines() or [""])[0]
            self.refused[variant.name] = (status, f"{type(error).__name__}: {message}")
            self.runners.pop(variant.name, None)
        self._release()  # out here, where the exception no longer holds on to the failed call's tensors

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda" and not self._device_problem():
            torch.cuda.empty_cache()

    def _device_problem(self) -> str:
        """What the GPU says about the work it was given; "" if it can go on. An illegal access is never forgiven."""
        if self.device.type != "cuda":
            return ""
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            return (str(error).strip().splitlines() or [""])[0]
        return ""

    def _judge(self, variant: Variant, phase: str) -> tuple[str, str, dict[str, object]]:
        """(status, reason, the row's error fields)."""
        errors = self.runners[variant.name].errors.get(phase)
        if not errors:
            return "unjudged", self._without_truth, {}
        eager_errors = self._eager.get(variant.precision)
        verdict = judge(errors, eager_errors[phase] if eager_errors else None, variant.precision)
        fields: dict[str, object] = {"error": verdict.ours, "error_bound": verdict.bound, "error_of": verdict.result}
        fields["error_measure"] = self.case.measure
        if verdict.bound is None:
            eager_name = self.case.eager.get(variant.precision, "") or f"eager {variant.precision}"
            why = (
                "is so far from float64 that zeros would pass"
                if eager_errors
                else "did not run, whose error is the measure"
            )
            return "unjudged", f"{eager_name} {why}", fields
        if not verdict.exact:
            return "inexact", f"{verdict.result}: error {verdict.ours:.2e} exceeds {verdict.bound:.2e}", fields
        return "exact", "", fields

    def _baseline(self, variant: Variant, phase: str, median: float) -> tuple[float | None, bool]:
        """The baseline's median in the rounds of this variant, and whether it is exact; (None, False) without one."""
        if variant.name == self.case.baseline:
            return median, True
        runner = self.runners.get(self.case.baseline)
        if runner is None or not runner.times[phase]:
            return None, False
        return quantile(runner.times[phase], 0.5), self._judge(runner.variant, phase)[0] == "exact"


def _dtypes(inputs: Tensors) -> str:
    return ", ".join(sorted({str(x.dtype) for x in inputs.values()}))


def _runner_in_child(case: Case, variant: Variant) -> memory.Run:
    """Called in the process that measures CPU memory."""
    device = torch.device("cpu")
    return Runner(case, variant, device, case.make_inputs(device, variant.dtype)).run
