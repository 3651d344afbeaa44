"""One candidate against eager: exact first, then timed, both in one process and taking turns."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch

from bench.harness.timing import HostTimer, quantile
from fastjepa import policy as norms
from fastjepa.calibration.choice import EAGER, Choice
from fastjepa.calibration.setting import Setting
from fastjepa.calibration.trial import Trial
from fastjepa.kernels.checks import unavailable_reason
from fastjepa.policy import DRAWS, GRADIENT, JUMP, Error, Judgement, is_out_of_memory
from fastjepa.trials.work import LayeredWork, Maker, Tensors, Work, arithmetic

T = TypeVar("T")
LEAST_ROUNDS, MOST_ROUNDS, ROUND_SECONDS = 3, 30, 1.0
# A turn of training: so many steps back to back. One alone would hide nothing of what the host does before the GPU has
# work, as a loop of training does from the second step on; and a queue of many turns, without waiting for the GPU in
# between, would hide a candidate's launches behind the work of eager before it.
TURN_STEPS = 3
LONG_STEP_MS = 250.0  # the host is never behind in a step so long, and one a turn must do
SLOW_SECONDS = 6.0  # of rounds: on a machine so slow, fewer must do
HOPELESS = 5.0  # times as slow as eager in the first round: the others would tell nothing new
CHECKED_BATCH = 16  # more clips would take longer and hardly change an error
TRUTH_SECONDS = 5.0  # many GPUs multiply float64 at a 64th of fp32's speed: as many clips as take no longer than this
# At the full size, where there may be no memory for float64, a candidate is held against eager at the same precision:
# this many times the sum of both bounds, because what breaks only at large sizes (an index beyond 2³¹, a tile left out)
# is mostly off by orders of magnitude more; the policy itself is kept at the checked size. And never as much as the
# limit, which half a gradient reaches, zeros exceed, and honest candidates in bf16 stay below: they are nearer to each
# other than eager is to float64, whose error shrinks as clips are added.
_FULL_SIZE_SLACK = 10.0
_FULL_SIZE_LIMIT = 0.49


class Contest:
    """The candidates of one setting, each against eager. What eager and float64 gave is computed once.

    The policy is checked at the user's batch, or at `CHECKED_BATCH` clips, halved until there are time and memory for
    float64; time is taken at the user's.
    """

    def __init__(self, setting: Setting, device: torch.device, make: Maker) -> None:
        self.setting, self.device, self.make = setting, device, make
        self.batch = min(setting.batch, CHECKED_BATCH)  # at which the policy is checked
        self._truths: dict[int, Tensors] = {}  # draw → float64
        in_fp32 = dataclasses.replace(setting, precision="fp32", matmul_tf32=False, cudnn_tf32=False)
        self.checked = (setting,) if setting == in_fp32 else (in_fp32, setting)  # in the arithmetic of each
        self._eager_errors: list[dict[str, Error]] = [{} for _ in self.checked]  # the largest of the draws so far
        self._reference: Work | None = None  # at full size
        self._reference_fits = True
        self._reference_first: Tensors = {}
        self._faster_layers: tuple[str, ...] | None = None

    def prepare(self) -> None:
        """Compute the truth, and what eager makes of it; without these nothing can be judged.

        Raises:
            torch.OutOfMemoryError: there is no memory for one clip. Whatever else eager raises here is raised.
        """
        with arithmetic(self.setting):
            self._if_it_fits(self._fit_into_time)
            self._find_truth()
        self._release()

    def try_out(self, choice: Choice) -> Trial:
        """What comes of one candidate; whatever it raises becomes its trial."""
        if choice.needs_kernels and (missing := unavailable_reason(self.device)) is not None:
            return Trial(choice, "unavailable", missing)
        try:
            with arithmetic(self.setting):
                trial = self._try(choice)
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            status = "out of memory" if is_out_of_memory(error) else "failed"
            reason = "does not fit in memory" if status == "out of memory" else f"{type(error).__name__}: {line}"[:300]
            trial = Trial(choice, status, reason)  # type: ignore[arg-type]
        self._release()  # out here, where no exception holds on to tensors of the failed call
        return trial

    def _try(self, choice: Choice) -> Trial:
        for setting, eager in zip(self.checked, self._eager_errors, strict=True):
            verdict = self._check(choice, setting, eager)
            if isinstance(verdict, str):
                return Trial(choice, "wrong", verdict, checked_batch=self.batch)
            judged = {"error": verdict.error, "bound": verdict.bound, "checked_batch": self.batch}
            if not verdict.exact:
                how = "" if setting == self.setting else f" in {setting.rule}"
                allowed = (
                    f"allowed are {verdict.bound:.1e}" if verdict.bound is not None else "eager is no measure of it"
                )
                reason = f"{verdict.name} is off by {verdict.error:.1e} of its norm{how}, {allowed}"
                return Trial(choice, "wrong", reason, **judged)  # type: ignore[arg-type]
        work = self._make(choice)
        work.run()
        if self.batch < self.setting.batch and (problem := self._full_size_problem(work.results())):
            return Trial(choice, "wrong", problem, **judged)  # type: ignore[arg-type]
        times, reference_times = self._time(work)
        faster, reason = None, ""
        if choice.convolutions == "all" and isinstance(work, LayeredWork):
            faster, reason = self._find_faster_layers(work)
        return Trial(
            choice, "exact", reason, milliseconds=quantile(times, 0.5),
            reference_milliseconds=quantile(reference_times, 0.5) if reference_times else None,
            rounds=len(times), faster_layers=faster, **judged,  # type: ignore[arg-type]
        )  # fmt: skip

    def _check(self, choice: Choice, setting: Setting, eager: Mapping[str, Error]) -> Judgement | str:
        """The policy at the checked batch, in the arithmetic of `setting`; or why nothing can be compared."""
        for draw in range(DRAWS):
            truth = self._find_truth(draw)
            results = self._first_results(setting, choice, draw=draw)
            try:
                errors = norms.norm_errors(results, truth)
            except ValueError as error:
                return str(error)
            verdict = norms.judge_norms(errors, eager, setting.rule)
            if verdict.exact or not norms.may_have_jumped(errors, eager, setting.rule):
                break
        return verdict

    def _make(self, choice: Choice) -> Work:
        return self.make(self.setting, choice, self.setting.batch, self.device, torch.float32, 0)

    def _first_results(
        self, setting: Setting, choice: Choice, dtype: torch.dtype = torch.float32, *, draw: int
    ) -> Tensors:
        with arithmetic(setting):
            work = self.make(setting, choice, self.batch, self.device, dtype, draw)
            work.run()
            return work.results()

    def _fit_into_time(self) -> None:
        """Halve the checked batch until its truth should take `TRUTH_SECONDS` at most, by the time of one clip's."""
        if self.batch == 1:
            return
        work = self.make(self.setting, EAGER, 1, self.device, torch.float64, 0)
        timer = HostTimer(self.device, "truth")
        timer.time(work.run)
        seconds = 1e-3 * timer.milliseconds()[0]
        if TRUTH_SECONDS / self.batch < seconds < TRUTH_SECONDS:  # libraries were loaded in it
            timer.time(work.run)
            seconds = 1e-3 * timer.milliseconds()[0]
        while self.batch > 1 and seconds * self.batch > TRUTH_SECONDS:
            self.batch = (self.batch + 1) // 2

    def _find_truth(self, draw: int = 0) -> Tensors:
        """Float64 on the same numbers, at the largest batch for which it, and eager, fit in memory."""
        while draw not in self._truths:
            found = self._if_it_fits(partial(self._truth_and_eager, draw))
            if found is not None:
                self._truths[draw], results = found
                for largest, eager in zip(self._eager_errors, results, strict=True):
                    largest |= norms.largest_errors(largest, norms.norm_errors(eager, self._truths[draw]))
            elif self.batch == 1 or draw > 0:
                raise torch.OutOfMemoryError("there is no memory for one clip in float64")
            else:
                self.batch = (self.batch + 1) // 2
        return self._truths[draw]

    def _truth_and_eager(self, draw: int) -> tuple[Tensors, list[Tensors]]:
        exact = self._first_results(self.setting, EAGER, torch.float64, draw=draw)
        return exact, [self._first_results(setting, EAGER, draw=draw) for setting in self.checked]

    def _full_size_problem(self, results: Tensors) -> str | None:
        reference = self._reference_at_full_size()
        if reference is None:  # no memory for eager: what can be seen without it
            bad = [name for name, value in results.items() if not bool(torch.isfinite(value).all())]
            return f"{bad[0]} is not finite at {self.setting.batch} clips" if bad else None
        for name, found in norms.norm_errors(results, self._reference_first).items():
            eager = self._eager_errors[-1][name]
            bound = norms.norm_bound(eager, found.dtype, self.setting.rule)
            if bound is None:
                return f"{name} of eager is so far off that nothing can be judged by it"
            allowed = min(_FULL_SIZE_SLACK * (eager.relative + bound), _FULL_SIZE_LIMIT)
            if name.startswith(GRADIENT):  # of more clips, one ReLU is a smaller part
                allowed = max(allowed, JUMP * self.batch / self.setting.batch)
            if not found.relative <= allowed:
                return (
                    f"at {self.setting.batch} clips {name} differs from eager by {found.relative:.1e} of its norm, "
                    f"allowed are {allowed:.1e}"
                )
        return None

    def _reference_at_full_size(self) -> Work | None:
        if self._reference is None and self._reference_fits:
            found = self._if_it_fits(self._run_reference)
            self._reference_fits = found is not None
            if found is not None:
                self._reference, self._reference_first = found
        return self._reference

    def _run_reference(self) -> tuple[Work, Tensors]:
        work = self._make(EAGER)
        work.run()
        return work, work.results()

    def _time(self, work: Work) -> tuple[list[float], list[float]]:
        """Milliseconds of the candidate and of eager; the latter empty if there is no memory for it.

        By the host's clock, from an idle device to an idle device: what is bound by launches is as slow as it is.
        """
        reference = self._reference_at_full_size()
        contestants = [work] if reference is None else [work, reference]
        timers = [HostTimer(self.device, "turn") for _ in contestants]
        for timer, contestant in zip(timers, contestants, strict=True):
            timer.time(contestant.run)  # to warm up
        warm = [timer.milliseconds()[0] for timer in timers]
        # Who rolls out waits for each result; who trains does not.
        steps = TURN_STEPS if self.setting.purpose == "train" and max(warm) < LONG_STEP_MS else 1
        gc.collect()
        gc.disable()  # a collection in the middle of a run would be charged to it
        times: list[list[float]] = [[] for _ in contestants]
        try:
            begun, rounds = time.monotonic(), 0
            while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and time.monotonic() - begun < ROUND_SECONDS):
                order = list(zip(timers, contestants, times, strict=True))
                for timer, contestant, found in order if rounds % 2 else reversed(order):
                    timer.time(partial(_repeat, contestant, steps))
                    found += [turn / steps for turn in timer.milliseconds()]
                rounds += 1
                if reference is not None and times[0][0] > HOPELESS * times[1][0]:
                    break
                if time.monotonic() - begun > SLOW_SECONDS:
                    break
        finally:
            gc.enable()
        return times[0], times[1] if reference is not None else []

    def _find_faster_layers(self, work: LayeredWork) -> tuple[tuple[str, ...] | None, str]:
        """The layers that own convolutions make faster, found once, with a graph or without; or None and why not."""
        if self._faster_layers is None:
            self._faster_layers = self._if_it_fits(work.faster_layers)
        return self._faster_layers, "" if self._faster_layers is not None else "no memory to time its layers"

    def _if_it_fits(self, call: Callable[[], T]) -> T | None:
        """What the call gives, None if there is no memory for it."""
        try:
            return call()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._release()
        return None

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _repeat(work: Work, steps: int) -> None:
    for _ in range(steps):
        work.run()
