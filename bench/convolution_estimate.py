"""What a step of a rollout is expected to take in folded convolutions, from machine code, without a GPU.

For each launch of a step, the configuration that the table chooses is compiled for sm_90, and

    estimate = roofline + issue + 1 µs

where roofline is the layer's least time for bytes or products on an H200, issue the least time for issuing the launch's
instructions over the multiprocessors that its programs occupy (`bench.audit` says how both are found, and what they
leave out), and 1 µs the launch itself, in a CUDA graph. The first two overlap where a launch is large, so their sum
is on the safe side of either; that nothing waits is on the other. An estimate is no measurement.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.audit.command import judge, rerun_compiling
from bench.harness.row_file import RowFile
from bench.harness.rows import Row, format_table
from bench.launch_words import describe
from fastjepa.environment import Environment, collect
from fastjepa.kernels.convolution.audit import case_of
from fastjepa.kernels.convolution.layer import Layer, Precision
from fastjepa.kernels.convolution.recipe import predictor_layers
from fastjepa.kernels.convolution.table import choose

ARCHITECTURE = 90
LAUNCH_MICROSECONDS = 1.0
STEPS = 8  # of a rollout that is summed up
BATCHES = (1, 8, 64)
ALL = "all"


@dataclass(frozen=True)
class Estimate:
    """One launch: what it computes, how, and the parts of its time in microseconds."""

    layer: str
    launch: str
    programs: int
    bytes_moved: int
    flops: int
    roofline_us: float
    issue_us: float
    failures: tuple[str, ...] = ()  # of the audit

    @property
    def microseconds(self) -> float:
        """The sum of the parts, with the launch itself."""
        return self.roofline_us + self.issue_us + LAUNCH_MICROSECONDS


def estimate_layer(name: str, layer: Layer) -> Estimate:
    """The estimate of one layer as the table launches it.

    Raises ValueError, with the audit's reason, where there cannot be one.
    """
    launch = choose(layer, ARCHITECTURE)
    case = case_of(layer, launch, name)
    finding = judge(case, ARCHITECTURE)
    if finding.roofline_us is None or finding.issue_us is None:
        raise ValueError(f"{name} cannot be estimated: {'; '.join((*finding.failures, *finding.notes))}")
    return Estimate(
        name, describe(launch), case.programs, case.bytes_moved, case.flops, finding.roofline_us, finding.issue_us,
        finding.failures,
    )  # fmt: skip


def estimate_step(frames: int, precision: Precision = "bf16", jobs: int = 2) -> list[Estimate]:
    """The launches of one step of a rollout of `frames` clips, compiled in `jobs` processes.

    Raises ValueError as `estimate_layer` does, and if kernels were imported to be interpreted.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("kernels that were imported with TRITON_INTERPRET=1 cannot be compiled")
    layers = predictor_layers(frames, precision)
    if jobs == 1:
        return list(map(estimate_layer, layers, layers.values()))
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(estimate_layer, layers.keys(), layers.values()))


def total(estimates: Iterable[Estimate]) -> float:
    """Microseconds of one step, whose launches follow each other."""
    return sum(estimate.microseconds for estimate in estimates)


def render(estimates: Sequence[Estimate]) -> str:
    """The table of one step, and its sum in the last line."""
    header = ["layer", "launch", "programs", "roofline us", "issue us", "estimate us"]
    body = [
        [e.layer, e.launch, str(e.programs), *(f"{us:.2f}" for us in (e.roofline_us, e.issue_us, e.microseconds))]
        for e in estimates
    ]
    sums = (sum(e.roofline_us for e in estimates), sum(e.issue_us for e in estimates), total(estimates))
    return format_table(header, [*body, [ALL, f"{len(body)} launches", "", *(f"{us:.2f}" for us in sums)]])


def to_rows(frames: int, precision: Precision, estimates: Sequence[Estimate], environment: Environment) -> list[Row]:
    """One row for each launch, whose `phase` is the layer, and one for the step."""
    stamp = {**asdict(environment), "device": "NVIDIA H200, estimated from machine code", "driver": "", "threads": None}

    def row(phase: str, reason: str, of: Sequence[Estimate], quality: dict[str, float]) -> Row:
        parts = {
            "roofline_us": sum(e.roofline_us for e in of), "issue_us": sum(e.issue_us for e in of),
            "estimate_us": total(of), "launches": float(len(of)),
        }  # fmt: skip
        return Row(
            suite="convolution", case=f"estimate of a rollout step, B={frames}", variant=f"fused {precision}",
            phase=phase, status="counted", reason=reason, precision=precision,
            bytes_moved=sum(e.bytes_moved for e in of), flops=sum(e.flops for e in of),
            quality=parts | quality, **stamp,
        )  # fmt: skip

    found = [row(e.layer, f"estimated, not timed; {e.launch}", [e], {"programs": float(e.programs)}) for e in estimates]
    whole = {f"estimate_us_of_{STEPS}_steps": STEPS * total(estimates)}
    return [*found, row(ALL, "estimated, not timed", estimates, whole)]


def run(argv: Sequence[str], batches: Sequence[int], out: Path | None) -> int:
    """`python -m bench convolution --estimate`; returns 1 if the audit fails a launch, or cannot estimate it."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return rerun_compiling("convolution", argv)
    environment = collect(["python", "-m", "bench", "convolution", *argv], torch.device("cpu"))
    failures = []
    for frames in batches:
        try:
            estimates = estimate_step(frames)
        except ValueError as error:
            print(f"B={frames}: {error}")
            return 1
        print(f"\none step of a rollout, B={frames}, bf16\n{render(estimates)}")
        print(f"{STEPS} steps: {STEPS * total(estimates):.0f} us, estimated", flush=True)
        failures += [f"B={frames} {e.layer} {failure}" for e in estimates for failure in e.failures]
        if out is not None:
            RowFile(out, "convolution").add(to_rows(frames, "bf16", estimates, environment))
    print(f"\nestimate: roofline + issue + {LAUNCH_MICROSECONDS:g} us a launch, on an H200; nothing was measured")
    for failure in failures:
        print(f"FAIL: {failure}")
    if out is None:
        print("no rows were written; --out DIR writes them")
    return 1 if failures else 0
