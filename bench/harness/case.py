"""What is measured: a Case (one computation at one size), and a Runner (one variant bound to a case's inputs)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from bench.harness.timing import Timer
from bench.harness.variants import Tensors, Variant
from fastjepa.policy import Error, ErrorMeasure, relative_errors

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"


@dataclass(frozen=True)
class Work:
    """What one phase cannot do without: bytes through device memory, and floating-point operations."""

    bytes_moved: int
    flops: int


@dataclass(frozen=True)
class Case:
    """One computation at one size. To be measured on a CPU it must be picklable: module-level functions and `partial`.

    Args:
        suite, name: what the rows are called.
        make_inputs: (device, dtype) → named tensors; the same values every time, leaves with `requires_grad` set where
            a gradient is wanted.
        truth: the reference, called with float64 inputs; its outputs are those that every variant must give. None
            where there is nothing to be exact about, as for a ceiling of the device: rows are then "unjudged".
        work: (phase, dtype) → Work, or None where it is not known.
        baseline: the variant to which speed-ups are relative.
        eager: by precision, the variant whose error judges the others of that precision.
        cotangents: the gradient of each differentiated output, given all outputs; None: there is no backward phase.
        phase: what the one phase is called if there is no backward, e.g. "rollout" or "step".
        latency: time single calls on the host's clock, and state p50 and p99 in place of p20 and p80.
        scale_of: see `policy.relative_errors`; gradients are called "grad <input>".
        measure: what the size of an error is: "norm" for what goes through many layers (see `policy`).
        repeatable: calls change no state, so the last one must be as exact as the first.
        rates: units per call by the name of the rate, e.g. {"frames_per_second": 512}, for the rows' `quality`.
    """

    suite: str
    name: str
    make_inputs: Callable[[torch.device, torch.dtype], Tensors]
    truth: Callable[[Tensors], Tensors] | None
    work: Callable[[str, torch.dtype], Work | None]
    baseline: str
    eager: Mapping[str, str]
    cotangents: Callable[[Tensors], Tensors] | None = None
    phase: str = FORWARD
    latency: bool = False
    scale_of: Mapping[str, str] = field(default_factory=dict)
    measure: ErrorMeasure = "largest entry"
    repeatable: bool = True
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that get a row each."""
        return (self.phase,) if self.cotangents is None else (FORWARD, BACKWARD, BOTH)


class Runner:
    """One variant bound to one case's inputs, with the times, errors and peaks found so far, by phase."""

    def __init__(self, case: Case, variant: Variant, device: torch.device, inputs: Tensors) -> None:
        self.case, self.variant = case, variant
        self._inputs = variant.prepare(inputs)
        self._leaves = {name: x for name, x in self._inputs.items() if x.requires_grad}
        self._function = variant.build(device)
        self._cotangents: Tensors | None = None
        self.times: dict[str, list[float]] = {phase: [] for phase in case.phases}
        self.errors: dict[str, dict[str, Error]] = {}
        self.peaks: Mapping[str, int] = {}

    def forward(self) -> Tensors:
        """The outputs."""
        return self._function(self._inputs)

    def backward(self, outputs: Tensors) -> Tensors:
        """The gradients of the inputs that want one, as "grad <input>"; zeros where an output does not depend on it."""
        if self.case.cotangents is None:
            raise RuntimeError(f"case {self.case.name!r} has no backward phase")
        if self._cotangents is None:
            self._cotangents = self.case.cotangents({name: x.detach() for name, x in outputs.items()})
        grads = torch.autograd.grad(
            [outputs[name] for name in self._cotangents],
            list(self._leaves.values()),
            list(self._cotangents.values()),
            allow_unused=True,
        )
        named = zip(self._leaves.items(), grads, strict=True)
        return {f"grad {name}": torch.zeros_like(leaf) if g is None else g for (name, leaf), g in named}

    def run(self, end_of: Callable[[str], None] = lambda _: None) -> dict[str, Tensors]:
        """Run every phase once, saying when each ends; returns {phase: its results}."""
        results = {self.case.phases[0]: self.forward()}
        end_of(self.case.phases[0])
        if self.case.cotangents is not None:
            results[BACKWARD] = self.backward(results[FORWARD])
            end_of(BACKWARD)
        return results

    def check(self, truth: Tensors) -> None:
        """Run every phase once and keep, for each tensor, the largest error seen so far."""
        for phase, results in self.run().items():
            expected = {name: x for name, x in truth.items() if name.startswith("grad ") == (phase == BACKWARD)}
            errors = relative_errors(results, expected, self.case.scale_of, truth, self.case.measure)
            before = self.errors.get(phase, errors)
            self.errors[phase] = {n: max(e, before[n], key=lambda error: error.relative) for n, e in errors.items()}
        if self.case.cotangents is not None:
            self.errors[BOTH] = {**self.errors[FORWARD], **self.errors[BACKWARD]}

    def time_once(self, timer: Timer) -> None:
        """Time every phase once, each apart; the whole is the sum, so it too starts each part with a cold cache."""
        timer.milliseconds()  # forget what a variant that failed half-way may have left
        outputs = timer.time(self.forward)
        if self.case.cotangents is not None:
            timer.time(lambda: self.backward(outputs))
        parts = timer.milliseconds()
        for phase, milliseconds in zip(self.case.phases, (*parts, sum(parts)), strict=False):
            self.times[phase].append(milliseconds)

    def peak(self, phase: str) -> int | None:
        """Peak bytes above the inputs during a phase, or None if it was not measured."""
        peaks = list(self.peaks.values()) if phase == BOTH else [self.peaks[phase]] if phase in self.peaks else []
        return max(peaks, default=None)


def truth_of(case: Case, inputs: Tensors) -> Tensors:
    """Outputs and gradients of the case's reference in float64 on the same inputs."""
    function = case.truth
    if function is None:
        raise ValueError(f"case {case.name!r} has no truth")
    wide = {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    device = next(iter(inputs.values())).device
    reference = Variant("truth", lambda _: function, dtype=torch.float64)
    results = Runner(case, reference, device, wide).run()
    return {name: x.detach() for tensors in results.values() for name, x in tensors.items()}


def random_cotangents(outputs: Tensors) -> Tensors:
    """A random gradient of every output, in its layout; values that bf16 holds exactly, so that all dtypes agree."""
    found = {}
    for name, out in outputs.items():
        generator = torch.Generator(out.device).manual_seed(11)
        values = torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32).bfloat16()
        found[name] = torch.empty_like(out).copy_(values)
    return found
