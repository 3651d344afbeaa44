"""How long a launch takes merely to issue its instructions, by its machine code: a floor beside the roofline.

    time = instructions of a warp × warps of all programs / (schedulers × clock)

A warp's instructions are those outside loops, and those of a trip times the trips, which the case declares
(`AuditCase.loop_trips`, `.programs`). A scheduler issues one instruction a cycle. A streaming multiprocessor (SM) has
four; a launch has the schedulers of as many SMs as it has programs, and no more than it has warps.

What is approximated:

- A guarded instruction takes its slot whether or not the guard holds, and is counted. Of two ways that a branch opens
  the longer one counts, as if all threads of a warp went there: branches of Triton are on scalars. Of a loop, whole
  trips count.
- A subroutine counts as often as it is called on that way, with every instruction that it has.
- What was peeled off a loop, by Triton's pipelining or by the assembler, is straight code, and counts on top of all
  trips.
- Every program does the same, programs spread evenly, and waves need not be whole: 133 programs take 1/132 longer than
  132. Nothing waits, whether for memory, a barrier, a pipe that takes one instruction every two cycles (integers,
  conversions) or a matrix unit. So a launch takes longer than this, and one of a few programs much longer.

Unrolling. If ptxas unrolled a loop u times, a trip of the machine code is u trips of the case. u is the number of
accesses to global memory in the machine code's loop over that in the PTX's (of a loop without any: of fp32 additions,
products and FMAs), which are the same loops in the same order. ptxas leaves the trips that remain to more, shorter
loops behind the unrolled one, which then outnumber the PTX's; their slots, a few trips in all, are not counted. LLVM,
which makes the PTX, unrolls whole loops or none. Where loops cannot be told apart there is no estimate.

Seen by hand, with Triton 3.7.1: `batch_norm_forward/plain/bf16` (4 loads and 4 stores of 128 bits a trip for a tile of
8192 bytes and 128 threads, 190 instructions), `batch_norm_statistics/bf16` (2 loads, 132 instructions) and
`moments/fp32/D=16` (4 loads, 214 instructions) are not unrolled, nor is any other kernel here; a loop of
one 32-bit load and one store is, 4 times (19 instructions), and is followed by two trips as straight code and a loop of
one; one of 8 FMAs and 1024 trips is unrolled 34 times, and 4 trips precede it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bench.audit.control_flow import Loop, find_loops, is_call, longest_way, successors, target, walk
from bench.audit.ptx import parse_ptx
from bench.audit.sass import BULK_LOADS, BULK_STORES, GLOBAL_LOADS, GLOBAL_STORES, Instruction
from fastjepa.kernels.launch import AuditCase

MULTIPROCESSORS = 132  # of an H100 or H200 with SXM
SCHEDULERS = 4  # of each
CLOCK_HZ = 1.8e9  # of a busy one; 1.98e9 is the most
_THREADS = 32  # of a warp

# What is counted in a loop to see how often it was unrolled, in PTX and in machine code: the first that the PTX has.
_ANCHORS = (
    (
        re.compile(r"(ld|st|red|atom)\.(\w+\.)*global\b|cp\.async\.(ca|cg|bulk\.(tensor|shared|global))\b"),
        (*GLOBAL_LOADS, *GLOBAL_STORES, *BULK_LOADS, *BULK_STORES, "RED", "ATOMG"),
    ),
    (re.compile(r"(fma|add|sub|mul)\.(\w+\.)*f32$"), ("FFMA", "FADD", "FMUL")),
)
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}  # of an access by one thread; else 4


@dataclass(frozen=True)
class Estimate:
    """What it takes to issue one launch."""

    microseconds: float
    instructions_per_warp: float
    instructions_per_trip: tuple[float, ...]  # of each loop, an outer one before those in it, which it includes
    accessed_bytes: float | None  # of global memory, masked or cached ones too; None: bulk copies do not say how many


def estimate_issue(case: AuditCase, instructions: Sequence[Instruction], ptx: str) -> Estimate:
    """The estimate for one launch of `case`, which was compiled to `ptx` and that to `instructions`.

    Raises ValueError, with the reason, where there cannot be one.
    """
    if case.programs < 1:
        raise ValueError("the case does not say how many programs there are")
    edges, source = successors(instructions, into_calls=False), parse_ptx(ptx)
    loops = find_loops(edges)
    trips = dict(_trips(loops, find_loops(successors(source)), instructions, source, case.loop_trips))
    weights = _weights(instructions)
    costs: dict[Loop, float] = {}  # of a trip of the machine code
    for loop in reversed(list(walk(loops))):
        inner = {other: trips[other].number * costs[other] for other in loop.inner}
        costs[loop] = longest_way(edges, weights, loop.header, inner, loop.body)
    per_warp = longest_way(edges, weights, 0, {loop: trips[loop].number * costs[loop] for loop in loops})
    warps = case.programs * case.config.num_warps
    schedulers = min(warps, SCHEDULERS * min(case.programs, MULTIPROCESSORS))
    return Estimate(
        microseconds=1e6 * per_warp * warps / (schedulers * CLOCK_HZ),
        instructions_per_warp=per_warp,
        instructions_per_trip=tuple(costs[loop] / trips[loop].copies for loop in walk(loops) if trips[loop].copies),
        accessed_bytes=_accessed_bytes(instructions, loops, trips, warps),
    )


class _Trips(NamedTuple):
    """How often a loop of the machine code is gone through, and how many trips of the case each time is."""

    number: float
    copies: int


def _trips(
    loops: Sequence[Loop],
    source_loops: Sequence[Loop],
    instructions: Sequence[Instruction],
    source: Sequence[Instruction],
    declared: Sequence[int],
) -> Iterator[tuple[Loop, _Trips]]:
    """The trips of `loops` and of all loops in them, where `declared` are those of `loops`, then of the next ones in.

    `source_loops` are the same loops in `source`, the PTX.
    """
    if not loops:
        return
    if not declared:
        raise ValueError("the case has no loop_trips for one of its loops")

    def copies(loop: Loop, source_loop: Loop) -> int:
        for pattern, mnemonics in _ANCHORS:
            expected = _count(pattern, source_loop, source, () if loop.inner else declared[1:])
            if expected:
                return max(1, round(sum(instructions[i].mnemonic in mnemonics for i in loop.own) / expected))
        return 1

    kept = loops
    if len(source_loops) == 1:  # what else there is does the trips that an unrolled loop left
        kept = [max(loops, key=lambda loop: copies(loop, source_loops[0]))]
    if len(kept) != len(source_loops):
        raise ValueError(f"{len(source_loops)} loops of the PTX are {len(loops)} in the machine code")
    yield from ((rest, _Trips(0, 0)) for rest in walk(loop for loop in loops if loop not in kept))
    for loop, source_loop in zip(kept, source_loops, strict=True):
        yield loop, _Trips(declared[0] / copies(loop, source_loop), copies(loop, source_loop))
        yield from _trips(loop.inner, source_loop.inner, instructions, source, declared[1:])


def _count(pattern: re.Pattern[str], loop: Loop, source: Sequence[Instruction], inner_trips: Sequence[int]) -> int:
    """Matches in a trip of `loop`, and in its inner loops if `inner_trips` says how often they are gone through."""
    found = sum(pattern.match(source[i].opcode) is not None for i in loop.own)
    if inner_trips:
        found += inner_trips[0] * sum(_count(pattern, inner, source, inner_trips[1:]) for inner in loop.inner)
    return found


def _weights(instructions: Sequence[Instruction]) -> list[int]:
    """How many instructions each one issues: itself and, if it is a call, its subroutine."""
    edges = successors(instructions)
    index_of = {instruction.address: index for index, instruction in enumerate(instructions)}
    weights = []
    for instruction in instructions:
        found, work = set[int](), [target(instruction, index_of)] if is_call(instruction) else []
        while work:
            node = work.pop()
            if node not in found:
                found.add(node)
                work.extend(edges[node])
        weights.append(1 + len(found))
    return weights


def _accessed_bytes(
    instructions: Sequence[Instruction], loops: Sequence[Loop], trips: Mapping[Loop, _Trips], warps: int
) -> float | None:
    times = dict.fromkeys(range(len(instructions)), 1.0)
    for loop in walk(loops):
        for index in loop.body:
            times[index] *= trips[loop].number
    total = 0.0
    for index, instruction in enumerate(instructions):
        if instruction.mnemonic in (*BULK_LOADS, *BULK_STORES):
            return None
        if instruction.mnemonic in (*GLOBAL_LOADS, *GLOBAL_STORES):
            width = next((_BYTES[part] for part in instruction.opcode.split(".") if part in _BYTES), 4)
            total += times[index] * width
    return total * warps * _THREADS
