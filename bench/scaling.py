"""`python -m bench scaling`: what a training step is expected to take on several GPUs. An estimate: nothing is timed.

    step = compute + Σ collectives of statistics + gradients + numbers exchanged by the hosts
    compute(b) = fixed + (t − fixed)·b/64,  t: the measured step of one GPU at 64 clips,  fixed: kernels × kernel_us

Collectives are counted from the networks (`bench.collectives`). One of S bytes a GPU, among N GPUs in M hosts, takes

    all-gather  ring   around + base + (N−M)·local + (M−1)·network              + (N−1)·S / bandwidth
    all-reduce  ring   around + base + 2(N−M)·local + 2(M−1)·network            + 2(N−1)/N·S / bandwidth
                tree   around + base + 2(N/M−1)·local + 2·log2(M)·network       + 2·S / bandwidth

These are the formulas by which NCCL chooses algorithms (src/graph/tuning.cc), with its latencies in `PROTOCOLS`; the
shortest is taken, as there. Statistics are waited for where they are needed, so nothing hides them. Gradients that are
overlapped are hidden as far as the backward pass is long: no implementation does better. Bandwidths, latencies and what
surrounds a collective are declared and not measured; each has a flag.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from bench.collectives import CONTROL, GRADIENTS, STATISTICS, Collective, step_collectives
from bench.harness.row_file import RowFile
from bench.harness.rows import Row, format_table, read_rows
from bench.recipe import GRAPH, Recipe
from fastjepa.environment import ROOT, Environment, collect

RESULTS = ROOT / "bench" / "results"
STEP_ROWS = RESULTS / "nvidia-h100-80gb-hbm3-2026-11-26" / "step.jsonl"
COUNTED_ROWS = RESULTS / "counted" / "traffic.jsonl"


@dataclass(frozen=True)
class Protocol:
    """Latencies in µs: once, for each hop within a host, for each between hosts; and the part of the bandwidth."""

    algorithm: str
    base_us: float
    local_us: float
    network_us: float
    share: float
    local_across_hosts: float = 1.0  # a factor of local_us where there are several hosts


# NCCL's src/graph/tuning.cc (releases differ in some of these): baseLat, hwLat of NVLink and of the network, and how
# bandwidth and latency of LL are changed. LL128 lies between the two; NVLS and PAT, of newer switches and releases, are
# left out.
PROTOCOLS = (
    Protocol("ring", 6.6, 0.6, 2.7, 1 / 4, 1.8),  # LL: 8 bytes with a flag each, for small messages
    Protocol("ring", 8.4, 3.4, 14.0, 1.0),  # Simple
    Protocol("tree", 6.8, 0.6, 5.0, 1 / 4, 1.8),
    Protocol("tree", 8.4, 4.0, 14.0, 0.9),
)


@dataclass(frozen=True)
class Machine:
    """What is declared of the GPUs and of what is between them; none of it was measured here.

    The defaults are a DGX H100's: 18 links of NVLink 4, 900 GB/s both ways together, and eight adapters of 400 Gb/s.
    """

    gpus_per_host: int = 8
    nvlink_gb_per_s: float = 450.0  # of a GPU, one way
    network_gb_per_s: float = 400.0  # of a host, one way: NCCL's rings use all adapters
    bandwidth_share: float = 0.8  # of the data sheet's that is reached: an allowance
    latency_scale: float = 1.0  # of all latencies of PROTOCOLS
    around_us: float = 5.0  # packing before a collective, merging behind it: two small kernels
    host_us: float = 50.0  # of a small message between hosts' processes, over TCP
    kernel_us: float = 2.0  # of a kernel that has next to nothing to do, in a CUDA graph
    backward_share: float = 2 / 3  # of the compute: each product of the forward pass is two in the backward pass

    def hosts(self, gpus: int) -> int:
        """M, as few as can be."""
        return -(-gpus // self.gpus_per_host)

    def milliseconds(self, collective: Collective, gpus: int) -> float:
        """All calls of a collective among `gpus` GPUs."""
        if gpus == 1:
            return 0.0
        if collective.kind == "host":
            return collective.calls * self.host_us * math.ceil(math.log2(gpus)) / 1e3
        reduce = collective.kind == "all-reduce"
        usable = [p for p in PROTOCOLS if reduce or p.algorithm == "ring"]
        least = min(self._one_call_us(p, collective.bytes, gpus, 2 if reduce else 1) for p in usable)
        return collective.calls * (self.around_us + least) / 1e3

    def _one_call_us(self, protocol: Protocol, size: int, gpus: int, ways: int) -> float:
        hosts = self.hosts(gpus)
        local = protocol.local_us * (protocol.local_across_hosts if hosts > 1 else 1.0)
        if protocol.algorithm == "ring":
            hops = ways * ((gpus - hosts) * local + (hosts - 1) * protocol.network_us)
            moved = size * (gpus - 1) * (2 / gpus if ways == 2 else 1)
        else:
            hops = 2 * ((gpus / hosts - 1) * local + math.log2(hosts) * protocol.network_us)
            moved = 2.0 * size
        slowest = self.nvlink_gb_per_s if hosts == 1 else min(self.nvlink_gb_per_s, self.network_gb_per_s)
        bandwidth = protocol.share * self.bandwidth_share * slowest * 1e3  # bytes in a µs
        return self.latency_scale * (protocol.base_us + hops) + moved / bandwidth


@dataclass(frozen=True)
class Compute:
    """A step of one GPU: `step_ms` with `clips` clips, of which `fixed_ms` do not depend on them."""

    step_ms: float
    clips: int
    fixed_ms: float
    source: str

    def milliseconds(self, clips: float) -> float:
        """With another number of clips."""
        return self.fixed_ms + (self.step_ms - self.fixed_ms) * clips / self.clips


@dataclass(frozen=True)
class Estimate:
    """One step on `gpus` GPUs; times in milliseconds."""

    scaling: str  # "weak" or "strong"
    sync_stats: bool
    overlap: bool
    gpus: int
    hosts: int
    clips: float  # of a GPU
    compute_ms: float
    statistics_ms: float
    gradients_ms: float  # of the all-reduce
    exposed_ms: float  # of it, what is waited for
    other_ms: float  # the probes' losses, and what hosts exchange
    collectives: int
    sent_bytes: float  # of a GPU
    single_ms: float  # one GPU with the whole batch, divided by the number of GPUs

    @property
    def step_ms(self) -> float:
        """The step."""
        return self.compute_ms + self.statistics_ms + self.exposed_ms + self.other_ms

    @property
    def efficiency(self) -> float:
        """Clips a second of a GPU, as a part of what one GPU alone does with the same batch."""
        return self.single_ms / self.step_ms


def estimate(
    collectives: Sequence[Collective], compute: Compute, machine: Machine, gpus: int, clips: float, *, overlap: bool,
    scaling: str = "weak",
) -> Estimate:  # fmt: skip
    """A step of `clips` clips on each of `gpus` GPUs. Weak scaling is held against one GPU with `clips` clips, strong
    scaling against one with all of them.
    """
    taken = [(c, machine.milliseconds(c, gpus)) for c in collectives]
    own = compute.milliseconds(clips)
    gradients = math.fsum(ms for c, ms in taken if c.what == GRADIENTS)
    statistics = math.fsum(ms for c, ms in taken if c.what in STATISTICS)
    exposed = max(0.0, gradients - machine.backward_share * own) if overlap else gradients
    device = [c for c in collectives if c.what != CONTROL] if gpus > 1 else []
    return Estimate(
        scaling=scaling, sync_stats=any(c.what in STATISTICS for c in collectives), overlap=overlap, gpus=gpus,
        hosts=machine.hosts(gpus), clips=clips, compute_ms=own, statistics_ms=statistics, gradients_ms=gradients,
        exposed_ms=exposed, other_ms=math.fsum(ms for _, ms in taken) - gradients - statistics,
        collectives=sum(c.calls for c in device), sent_bytes=math.fsum(c.sent(gpus) for c in device),
        single_ms=own if scaling == "weak" else compute.milliseconds(clips * gpus) / gpus,
    )  # fmt: skip


def measured_step(rows: Path, variant: str, recipe: Recipe, kernel_us: float) -> Compute:
    """The step of one GPU as a row of `rows` has it, and the kernels that are counted in it.

    Raises ValueError if there is no such row.
    """
    found = [r for r in read_rows(rows) if (r.case, r.variant) == (str(recipe), variant) and r.median_ms is not None]
    if not found:
        raise ValueError(f"{rows} has no measured row of {variant!r} at {recipe}; --step_ms declares a time instead")
    (row, *_) = found
    assert row.median_ms is not None
    source = f"measured: {row.device}, {row.variant}, {row.precision}, {row.date[:10]}, commit {row.commit[:10]}"
    return Compute(row.median_ms, recipe.batch, counted_kernels(recipe) * kernel_us / 1e3, source)


def counted_kernels(recipe: Recipe) -> float:
    """Kernels of a fused step, by its counted row. Raises ValueError if there is none."""
    for row in read_rows(COUNTED_ROWS):
        if (row.case, row.variant, row.phase) == (f"training step, {recipe}", "fused", "all"):
            return row.quality["kernels"]
    raise ValueError(f"{COUNTED_ROWS} has no row of a fused training step at {recipe}")


def numbers_of_gpus(hosts: Iterable[int], gpus_per_host: int) -> list[int]:
    """Powers of two within one host, if that is asked for, then whole hosts."""
    within = [1 << i for i in range(gpus_per_host.bit_length()) if 1 << i < gpus_per_host] + [gpus_per_host]
    several = (host * gpus_per_host for host in hosts if host > 1)
    return sorted({*(within if 1 in hosts else [1]), *several})


def render(estimates: Sequence[Estimate]) -> str:
    """The table of one way of scaling."""
    header = ["GPUs", "hosts", "clips", "compute ms", "statistics ms", "gradients ms", "waited ms", "other ms",
              "step ms", "efficiency", "collectives", "MB sent"]  # fmt: skip
    body = [
        [
            str(e.gpus), str(e.hosts), f"{e.clips:g}",
            *(f"{ms:.2f}" for ms in (e.compute_ms, e.statistics_ms, e.gradients_ms, e.exposed_ms, e.other_ms)),
            f"{e.step_ms:.2f}", f"{100 * e.efficiency:.1f} %", str(e.collectives), f"{e.sent_bytes / 1e6:.2f}",
        ]
        for e in estimates
    ]  # fmt: skip
    return format_table(header, body)


def render_collectives(collectives: Sequence[Collective], gpus: Sequence[int]) -> str:
    """What a step exchanges, kind by kind."""
    kinds: dict[tuple[str, str], list[Collective]] = {}
    for c in collectives:
        kinds.setdefault((c.what, c.kind), []).append(c)
    header = ["exchange", "kind", "calls", "bytes of a GPU", *(f"MB sent, {n} GPUs" for n in gpus)]
    body = [
        [
            what, kind, str(sum(c.calls for c in each)), str(sum(c.bytes * c.calls for c in each)),
            *("" if kind == "host" else f"{sum(c.sent(n) for c in each) / 1e6:.3f}" for n in gpus),
        ]
        for (what, kind), each in kinds.items()
    ]  # fmt: skip
    return format_table(header, body)


def to_rows(case: str, estimates: Sequence[Estimate], environment: Environment) -> list[Row]:
    """One row for each number of GPUs, which is its `phase`."""
    stamp = {**asdict(environment), "device": "NVIDIA H100, several, estimated", "driver": "", "threads": None}
    return [
        Row(
            suite="scaling", case=case, variant=_way(e.sync_stats, e.overlap), phase=f"{e.gpus} GPUs",
            status="counted", reason="estimated, not timed", bytes_moved=round(e.sent_bytes),
            quality={
                "gpus": float(e.gpus), "hosts": float(e.hosts), "clips": float(e.clips),
                "collectives": float(e.collectives), "step_ms": e.step_ms, "statistics_ms": e.statistics_ms,
                "gradients_ms": e.gradients_ms, "waited_ms": e.exposed_ms, "efficiency": e.efficiency,
            },
            **stamp,
        )
        for e in estimates
    ]  # fmt: skip


def _way(sync_stats: bool, overlap: bool) -> str:
    statistics = "sync_stats" if sync_stats else "no sync_stats"
    return f"{statistics}, gradients {'overlapped' if overlap else 'after the backward pass'}"


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser, args = _parsed(argv)
    machine = Machine(**{name: getattr(args, name) for name in asdict(Machine())})
    recipe = Recipe()
    try:
        if args.step_ms is None:
            compute = measured_step(args.rows, args.variant, recipe, machine.kernel_us)
        else:
            fixed = counted_kernels(recipe) * machine.kernel_us / 1e3
            compute = Compute(args.step_ms, recipe.batch, fixed, "declared with --step_ms")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if compute.fixed_ms >= compute.step_ms:
        parser.error(f"--kernel_us {machine.kernel_us:g}: launches alone would take {compute.fixed_ms:.3g} ms, a step "
                     f"takes {compute.step_ms:.3g}")  # fmt: skip
    gpus = numbers_of_gpus(args.hosts, machine.gpus_per_host)
    ways = [(sync, overlap) for sync in (True, False) for overlap in (False, True)]
    clips_of = {"weak": lambda n: args.batch, "strong": lambda n: args.global_batch / n}
    synced = step_collectives(recipe, args.path)
    print(f"{recipe}, {args.path} networks; an estimate, nothing was timed\n")
    print(f"step of one GPU: {compute.step_ms:.2f} ms at {compute.clips} clips ({compute.source})")
    print(f"of which launches: {compute.fixed_ms:.2f} ms, counted kernels x --kernel_us")
    print("declared: " + ", ".join(f"{name} {value:g}" for name, value in asdict(machine).items()))
    print(f"\n{render_collectives(synced, [n for n in gpus if n > 1])}")
    environment = collect(["python", "-m", "bench", "scaling", *argv], torch.device("cpu"))
    everything = []
    for scaling, clips in clips_of.items():
        of = f"{args.batch} clips on each GPU" if scaling == "weak" else f"{args.global_batch} clips in all"
        for sync, overlap in ways:
            collectives = step_collectives(recipe, args.path, sync_stats=sync)
            made = [
                estimate(collectives, compute, machine, n, clips(n), overlap=overlap, scaling=scaling) for n in gpus
            ]
            everything += made
            print(f"\n{scaling} scaling, {of}; {_way(sync, overlap)}\n{render(made)}", flush=True)
            if args.out is not None:
                case = f"{scaling} scaling, {of}, {args.path}, {replace(recipe, batch=args.batch)}"
                RowFile(args.out, "scaling").add(to_rows(case, made, environment))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(e) | {"step_ms": e.step_ms, "efficiency": e.efficiency}
                                         for e in everything], indent=1) + "\n", encoding="utf-8")  # fmt: skip
    if args.out is None:
        print("\nno rows were written; --out DIR writes them")
    return 0


def _parsed(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m bench scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Machine()
    add = parser.add_argument
    add("--hosts", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of hosts (default: 1 2 4 8)")
    add("--batch", type=int, default=64, help="clips of each GPU in weak scaling (default: 64)")
    add("--global_batch", type=int, default=512, help="clips of all GPUs in strong scaling (default: 512)")
    add("--path", choices=("fused", "eager"), default="fused", help="how the networks run (default: fused)")
    add("--rows", type=Path, default=STEP_ROWS, help="rows with the step of one GPU (default: those of the H100)")
    add("--variant", default=GRAPH, help="which of them (default: %(default)s)")
    add("--step_ms", type=float, help="declare the step of one GPU at 64 clips instead")
    add("--gpus_per_host", type=int, default=defaults.gpus_per_host, help="declared (default: %(default)s)")
    for name, value in asdict(defaults).items():
        if name != "gpus_per_host":
            add(f"--{name}", type=float, default=value, help=f"declared (default: {value:g})")
    add("--json", type=Path, metavar="FILE", help="write all numbers there")
    add("--out", type=Path, metavar="DIR", help="write rows there")
    args = parser.parse_args(argv)
    for name in ("batch", "global_batch", "gpus_per_host"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if min(args.hosts) < 1:
        parser.error(f"--hosts must be at least 1, got {min(args.hosts)}")
    for name in ("nvlink_gb_per_s", "network_gb_per_s", "bandwidth_share"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} must be more than 0, got {getattr(args, name):g}")
    for name in ("latency_scale", "around_us", "host_us", "kernel_us", "backward_share"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name} must be 0 or more, got {getattr(args, name):g}")
    if args.step_ms is not None and not 0 < args.step_ms < math.inf:
        parser.error(f"--step_ms must be more than 0, got {args.step_ms:g}")
    return parser, args
