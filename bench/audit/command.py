"""`python -m bench audit`: compile every kernel × config × dtype without a GPU, table the facts, and judge them.

A kernel fails if it spills more than its case allows, needs more shared memory than a block can have (Triton does not
check), lacks the tensor-core instructions its case expects or has another kind than its case declares, has its wgmmas
serialised by ptxas, overwrites a register of a wgmma in flight (`hazard`), or cannot move the bytes that its case
declares. The exit status is 1 if any does. A case that declares instructions is compiled for those architectures only.
Whether it is bound by memory, by arithmetic or by issuing its instructions (`issue`) is said, and judged by nobody.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import fastjepa.kernels
from bench.audit.disassembly import disassemble
from bench.audit.hazard import find_hazards
from bench.audit.issue import CLOCK_HZ, MULTIPROCESSORS, SCHEDULERS, estimate_issue
from bench.audit.sass import MATRIX_INSTRUCTIONS, Binary, Compiled, compile_case, inspect, kinds_of
from bench.harness.roofline import H200
from bench.harness.rows import format_table, write_text
from fastjepa.kernels.launch import AuditCase

# Shared memory one block can have, in bytes, by compute capability: 163, 227 and 227 KiB (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability": maximum amount of shared memory per thread block).
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY_COLUMNS = 512  # of a Blackwell SM
# Cases whose machine code is read together: enough that starting the disassembler is little work beside compiling
# them, and few enough that all processes end at about the same time.
_TOGETHER = 16

_RATES = ", ".join(f"{H200.flops_per_second[name] / 1e12:.0f} {name}" for name in ("bf16", "tf32", "tf32x3", "fma"))
LEGEND = f"""
matrix-instructions: RS takes operand A from registers, SS from shared memory. Where a case declares a kind for an
architecture, each must be of that kind (HMMA and its like: mma.sync; HGMMA: wgmma; UTCHMMA: tcgen05), and the case is
compiled for no other architecture. An A in registers is no failure: what could go wrong with it is what hazard says.
wide: accesses to global memory that are 128 bits or more per thread, or bulk copies, of all of them (static counts).
H200-roofline: the declared bytes at {H200.dram_bytes_per_second / 1e12:.1f} TB/s or the declared FLOPs at their rate
(TFLOP/s: {_RATES}; fma: no matrix instructions), whichever takes longer.
per-trip: the instructions that a warp issues in one trip of each loop, those of loops inside it included.
issue: the least time for issuing all instructions of the launch, one a cycle and scheduler, {SCHEDULERS} for each of
{MULTIPROCESSORS} SMs at {CLOCK_HZ / 1e9:.1f} GHz (of as many SMs as there are programs); no waiting of any kind.
bound: which of the three takes longest. Where the times are below some microseconds, the launch itself does."""


@dataclass(frozen=True)
class Finding:
    """What the audit says about one case on one architecture. `failures` empty: it passes."""

    case: str
    arch: int
    failures: tuple[str, ...]
    notes: tuple[str, ...] = ()
    facts: dict[str, object] = field(default_factory=dict)  # sass.Inspection as a dict; empty: did not compile
    hazards: tuple[str, ...] = ()
    bytes_moved: int = 0
    flops: int = 0
    roofline_us: float | None = None  # on an H200, for sm_90
    issue_us: float | None = None  # for sm_90; None: cannot be estimated, `notes` say why if the case has `programs`
    instructions_per_warp: float | None = None
    instructions_per_trip: tuple[float, ...] = ()
    bound: str = ""  # what takes longest: "memory", "arithmetic" or "issue-bound"


def collect_cases(module_names: Iterable[str]) -> dict[str, tuple[str, AuditCase]]:
    """{case name: (module, case)} from `audit_cases()` of each module that has it.

    Raises ValueError if two cases have one name, if there are none, or if one is made for an architecture or a kind of
    instruction that the audit does not know: it would pass unseen.
    """
    found: dict[str, tuple[str, AuditCase]] = {}
    names = list(module_names)
    for module_name in names:
        module = importlib.import_module(module_name)
        for case in module.audit_cases() if hasattr(module, "audit_cases") else ():
            if case.name in found:
                raise ValueError(
                    f"two audit cases are called {case.name!r}: in {found[case.name][0]} and {module_name}"
                )
            for arch, kind in case.instructions.items():
                if arch not in SHARED_MEMORY_LIMIT or kind not in MATRIX_INSTRUCTIONS:
                    raise ValueError(
                        f"audit case {case.name!r} is made for {kind!r} on {arch!r}; accepted: "
                        f"{', '.join(MATRIX_INSTRUCTIONS)} on {', '.join(map(str, SHARED_MEMORY_LIMIT))}"
                    )
            found[case.name] = (module_name, case)
    if not found:
        raise ValueError(f"no audit_cases() in {', '.join(names)}")
    return found


def kernel_modules() -> list[str]:
    """The modules of fastjepa.kernels and its packages, sorted."""
    found = pkgutil.walk_packages(fastjepa.kernels.__path__, "fastjepa.kernels.")
    return sorted(module.name for module in found if not module.ispkg)


def judge(case: AuditCase, arch: int) -> Finding:
    """Compile one case for one architecture and judge it. A kernel that does not compile is a failure, not an error."""
    return judge_together([case], arch)[0]


def judge_together(cases: Sequence[AuditCase], arch: int) -> list[Finding]:
    """The same for each of several cases, whose machine code is read together."""
    compiled = [_compile(case, arch) for case in cases]
    readable = [kernel for kernel in compiled if isinstance(kernel, Compiled)]
    try:
        binaries = iter([kernel.read(code) for kernel, code in zip(readable, disassemble(readable), strict=True)])
    except (RuntimeError, ValueError) as error:  # which of them it is shows when each is read alone
        if len(cases) > 1:
            return [judge(case, arch) for case in cases]
        return [_not_audited(cases[0], arch, error)]
    return [
        kernel if isinstance(kernel, Finding) else _judge(case, arch, next(binaries))
        for case, kernel in zip(cases, compiled, strict=True)
    ]


def _compile(case: AuditCase, arch: int) -> Compiled | Finding:
    try:
        return compile_case(case, arch)
    except Exception as error:  # Triton raises many types; one broken kernel must not hide the others' findings
        return _not_audited(case, arch, error)


def _not_audited(case: AuditCase, arch: int, error: Exception) -> Finding:
    lines = str(error).strip().splitlines() or [""]  # Triton: where, the source around it, and what, last
    message = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"
    return Finding(case.name, arch, failures=(f"cannot be audited: {type(error).__name__}: {message}",))


def _judge(case: AuditCase, arch: int, binary: Binary) -> Finding:
    try:
        facts = inspect(binary)
        hazards = find_hazards(binary.instructions)
    except Exception as error:
        return _not_audited(case, arch, error)
    failures, notes = [], []
    if facts.spill_bytes > case.allowed_spill_bytes:
        failures.append(f"spills {facts.spill_bytes} bytes; allowed: {case.allowed_spill_bytes}")
    elif facts.spill_bytes:
        notes.append(f"spills {facts.spill_bytes} bytes, allowed: {case.allowed_spill_reason or 'no reason given'}")
    if facts.shared_bytes > SHARED_MEMORY_LIMIT[arch]:
        failures.append(f"needs {facts.shared_bytes} bytes of shared memory; a block has {SHARED_MEMORY_LIMIT[arch]}")
    if facts.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
        failures.append(f"needs {facts.tensor_memory_columns} tensor memory columns; there are {TENSOR_MEMORY_COLUMNS}")
    if case.expects_tensor_cores and not (facts.tensor_cores or case.instructions):
        failures.append("has no tensor-core instruction, but should")
    failures.extend(_other_instructions(case, arch, facts.tensor_cores))
    failures.extend(f"ptxas warns {warning}" for warning in facts.warnings)
    if hazards:
        failures.append(f"may overwrite registers of a wgmma in flight, {len(hazards)} times; {hazards[0]}")
    finding = Finding(
        case=case.name,
        arch=arch,
        failures=tuple(failures),
        notes=tuple(notes),
        facts=asdict(facts),
        hazards=tuple(map(str, hazards)),
        bytes_moved=case.bytes_moved,
        flops=case.flops,
    )
    return _with_times(finding, case, binary) if arch == 90 else finding


def is_made_for(case: AuditCase, arch: int) -> bool:
    """Whether a case is to be compiled for `arch`."""
    return not case.instructions or arch in case.instructions


def _other_instructions(case: AuditCase, arch: int, tensor_cores: Mapping[str, int]) -> Iterator[str]:
    """What is wrong if the matrix instructions are not, one and all, of the kind that the case declares for `arch`."""
    wanted, kinds = case.instructions.get(arch), kinds_of(tensor_cores)
    if wanted is not None and kinds != {wanted}:
        forms = f"{', '.join(sorted(kinds))} ({_summary(tensor_cores)})" if kinds else "no matrix instruction"
        yield f"has {forms}; it is made for {wanted}"


def _with_times(finding: Finding, case: AuditCase, binary: Binary) -> Finding:
    """The same with the least times that memory, arithmetic and issuing take on an H200, for sm_90."""
    tensor_cores = finding.facts["tensor_cores"]
    assert isinstance(tensor_cores, dict)
    arithmetic = _arithmetic(case, tensor_cores)
    roofline_us = 1e6 * H200.seconds(case.bytes_moved, case.flops, arithmetic)
    finding = replace(finding, roofline_us=roofline_us, bound=H200.bound(case.bytes_moved, case.flops, arithmetic))
    if not case.programs:
        return finding
    try:
        issue = estimate_issue(case, binary.instructions, binary.ptx)
    except ValueError as error:
        return replace(finding, notes=(*finding.notes, f"has no estimate of issue slots: {error}"))
    accessed, failures = issue.accessed_bytes, finding.failures
    if accessed is not None and accessed < 0.9 * case.bytes_moved:  # masked accesses count, so it cannot be less
        failures += (f"accesses {accessed:.3g} bytes by its programs and loop_trips, not {case.bytes_moved:.3g}",)
    return replace(
        finding,
        failures=failures,
        issue_us=issue.microseconds,
        instructions_per_warp=issue.instructions_per_warp,
        instructions_per_trip=issue.instructions_per_trip,
        bound="issue-bound" if issue.microseconds > roofline_us else finding.bound,
    )


def _arithmetic(case: AuditCase, tensor_cores: Iterable[str]) -> str:
    """The roofline's rate for this binary: what its matrix instructions are, and how often each product is done."""
    forms = " ".join(tensor_cores)
    if not forms:
        return "fma"
    emulated = {"tf32x3", "bf16x3", "bf16x6"} & {str(value) for value in case.constexprs.values()}
    if emulated:
        return emulated.pop()
    return "tf32" if "TF32" in forms else "bf16"


def _judge_named(module_names: Sequence[str], case_names: Sequence[str], arch: int) -> list[Finding]:
    """In a worker process: a compiled kernel cannot be pickled, so the cases are looked up again by their names."""
    known = {module: _collect_once(module) for module in module_names}
    return judge_together([known[m][name][1] for m, name in zip(module_names, case_names, strict=True)], arch)


_collect_once = cache(lambda module_name: collect_cases([module_name]))


def judge_all(cases: dict[str, tuple[str, AuditCase]], archs: Iterable[int], jobs: int) -> list[Finding]:
    """Judge every case for every architecture that it is made for, in `jobs` processes; the order does not depend on
    `jobs`.
    """
    groups = []
    for arch in archs:
        names = [name for name, (_, case) in cases.items() if is_made_for(case, arch)]
        groups += [(names[start : start + _TOGETHER], arch) for start in range(0, len(names), _TOGETHER)]
    if jobs == 1:
        judged = [judge_together([cases[name][1] for name in names], arch) for names, arch in groups]
    else:
        tasks = [([cases[name][0] for name in names], names, arch) for names, arch in groups]
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            judged = list(pool.map(_judge_named, *zip(*tasks, strict=True)))
    order = {name: number for number, name in enumerate(cases)}
    return sorted((finding for group in judged for finding in group), key=lambda finding: order[finding.case])


def render(findings: Iterable[Finding]) -> str:
    """The table of facts, one line per case and architecture."""
    header = (
        "case arch regs spill smem matrix-instructions wide-loads wide-stores serial hazard "
        "per-trip issue H200-roofline bound verdict"
    )
    rows = []
    for finding in findings:
        start, verdict = [finding.case, f"sm_{finding.arch}"], "FAIL" if finding.failures else "ok"
        if not finding.facts:
            rows.append([*start, *[""] * 12, verdict])
            continue
        facts = dict(finding.facts)
        forms = facts["tensor_cores"]
        assert isinstance(forms, dict)
        rows.append(
            [
                *start,
                *(str(facts[name]) for name in ("registers", "spill_bytes", "shared_bytes")),
                _summary(forms),
                *(f"{facts[f'wide_{kind}']}/{facts[f'global_{kind}']}" for kind in ("loads", "stores")),
                "YES" if facts["warnings"] else "no",
                f"YES ({len(finding.hazards)})" if finding.hazards else "no" if finding.arch == 90 else "-",
                ", ".join(f"{count:.4g}" for count in finding.instructions_per_trip),
                *("" if time is None else f"{time:.1f} us" for time in (finding.issue_us, finding.roofline_us)),
                finding.bound,
                verdict,
            ]
        )
    return format_table(header.split(" "), rows)


def _summary(forms: Mapping[str, int]) -> str:
    """Matrix instructions by kind and type, without their shapes: "8 HGMMA.BF16 RS"."""
    counts: Counter[str] = Counter()
    for form, count in forms.items():
        opcode, _, operand = form.partition(" ")
        kind, *modifiers = opcode.split(".")
        counts[" ".join(filter(None, [".".join([kind, *modifiers[-1:]]), operand]))] += count
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"


def main(argv: list[str]) -> int:
    """The command line; returns 0 if every kernel passes, 1 if not, 2 if the request cannot be served."""
    parser = argparse.ArgumentParser(prog="python -m bench audit", description=__doc__.split("\n\n")[0])
    known = [f"sm_{arch}" for arch in SHARED_MEMORY_LIMIT]
    parser.add_argument("--arch", nargs="+", choices=known, default=known, help="architectures (default: all)")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every fact to this file")
    parser.add_argument("--module", nargs="+", metavar="NAME", help="where to look (default: all of fastjepa.kernels)")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return rerun_compiling("audit", argv)
    try:
        cases = collect_cases(args.module or kernel_modules())
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    chosen = {name: found for name, found in cases.items() if args.filter in name}
    if not chosen:
        parser.error(f"--filter {args.filter!r} matches none of: {', '.join(cases)}")
    archs = [int(arch.removeprefix("sm_")) for arch in args.arch]
    if not any(is_made_for(case, arch) for _, case in chosen.values() for arch in archs):
        parser.error(f"none of the cases is made for {', '.join(args.arch)}")
    findings = judge_all(chosen, archs, args.jobs)
    print(render(findings))
    print(LEGEND)
    if args.json:
        write_text(args.json, json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    for finding in findings:
        for note in finding.notes:
            print(f"note: {finding.case} on sm_{finding.arch} {note}")
    failed = [finding for finding in findings if finding.failures]
    for finding in failed:
        for failure in finding.failures:
            print(f"FAIL: {finding.case} on sm_{finding.arch} {failure}")
    print(f"{len(findings) - len(failed)} of {len(findings)} pass")
    return 1 if failed else 0


def rerun_compiling(subcommand: str, argv: Sequence[str]) -> int:
    """Start `python -m bench SUBCOMMAND ARGV` without TRITON_INTERPRET=1, under which kernels were imported that cannot
    be compiled; returns its exit status.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    del environment["TRITON_INTERPRET"]
    return subprocess.run([sys.executable, "-m", "bench", subcommand, *argv], env=environment, check=False).returncode
