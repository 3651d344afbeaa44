"""Does any instruction overwrite a register that an asynchronous wgmma may still be using? Read off the machine code.

On Hopper `HGMMA` runs beside the warps that issued it. Until its group has been waited for, PTX leaves undefined what
happens when the program writes to its accumulators, or to the registers from which it takes operand A. Triton can
emit such a write: with an operand computed in registers and software pipelining it keeps groups in flight over a
loop's back edge, and the next iteration refills those registers (https://github.com/triton-lang/triton/issues/9433).

The check is a forward data-flow analysis over the control-flow graph. The state at an instruction is the registers in
use by the groups that may be in flight there, oldest group first; states that meet are joined group by group, counted
from the newest. It is conservative: "none" means that no path has the pattern; a finding means that one may.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from bench.audit.control_flow import successors
from bench.audit.sass import Instruction

_ASYNC = ("HGMMA", "IGMMA", "BGMMA", "QGMMA")
_REGISTERS_OF_A = 4  # a 64×K tile is 4 registers per thread for every K and type
_MAX_GROUPS = 8  # more than any real kernel keeps in flight; older ones are merged into one

# The first operand that is not a predicate is the destination, if it is a plain register; in these it is a source.
_NO_DESTINATION = ("ISETP", "FSETP", "DSETP", "HSETP2", "FCHK", "R2P", "BAR", "RET", "CALL", "WARPSYNC", "NANOSLEEP")
_PREDICATE = re.compile(r"!?U?P(?:\d+|T|R)$")
_REGISTER = re.compile(r"R(\d+)(?:\.\w+)*$")

_Use = tuple[int, int]  # (register, index of the wgmma that uses it)


@dataclass(frozen=True)
class Hazard:
    """`write` overwrites `register` on a path where `wgmma` may still be in flight."""

    register: int
    wgmma: Instruction
    write: Instruction

    def __str__(self) -> str:
        return (
            f"R{self.register}: {self.write.address:#06x} {self.write.opcode} overwrites it "
            f"while {self.wgmma.address:#06x} {self.wgmma.opcode} may be in flight"
        )


@dataclass(frozen=True)
class _State:
    groups: tuple[frozenset[_Use], ...] = ()  # committed and not waited for, oldest first
    open: frozenset[_Use] = frozenset()  # issued since the last commit

    def join(self, other: _State) -> _State:
        longer, shorter = sorted((self.groups, other.groups), key=len, reverse=True)
        none: frozenset[_Use] = frozenset()
        padded = (none,) * (len(longer) - len(shorter)) + shorter
        return _State(tuple(a | b for a, b in zip(longer, padded, strict=True)), self.open | other.open)

    def issue(self, uses: frozenset[_Use], commits: bool) -> _State:
        if not commits:
            return _State(self.groups, self.open | uses)
        groups = (*self.groups, self.open | uses)
        if len(groups) > _MAX_GROUPS:
            groups = (groups[0] | groups[1], *groups[2:])
        return _State(groups)

    def wait(self, allowed: int) -> _State:
        return _State(self.groups[-allowed:] if allowed else (), self.open)


def find_hazards(instructions: Sequence[Instruction]) -> tuple[Hazard, ...]:
    """Every write to a register of a wgmma that may be in flight, one finding per write and wgmma, in program order.

    Raises ValueError on an indirect branch, whose targets cannot be read off.
    """
    if not any(i.mnemonic in _ASYNC for i in instructions):
        return ()
    edges = successors(instructions)
    written = [frozenset(_written_registers(instruction)) for instruction in instructions]
    before: dict[int, _State] = {0: _State()}
    work = deque([0])
    while work:  # to the fixed point: states only grow, and are finite
        index = work.popleft()
        after = _step(instructions[index], index, before[index])
        for successor in edges[index]:
            old = before.get(successor)
            new = after if old is None else old.join(after)
            if new != old:
                before[successor] = new
                work.append(successor)
    found: dict[tuple[int, int], Hazard] = {}
    for index, state in sorted(before.items()):
        for register, wgmma in sorted(state.open.union(*state.groups)):
            if register in written[index]:
                found.setdefault((index, wgmma), Hazard(register, instructions[wgmma], instructions[index]))
    return tuple(found.values())


def _step(instruction: Instruction, index: int, state: _State) -> _State:
    if instruction.mnemonic in _ASYNC:
        uses = frozenset((register, index) for register in _wgmma_registers(instruction))
        return state.issue(uses, commits=any(operand.startswith("gsb") for operand in instruction.operands))
    if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        return state.wait(int(instruction.operands[-1], 16))
    return state


def _wgmma_registers(instruction: Instruction) -> set[int]:
    """The accumulators (64×N, spread over 128 threads) and, if it comes from registers, operand A."""
    shape = re.search(r"\.64x(\d+)x\d+\.(\w+)", instruction.opcode)
    if shape is None:
        raise ValueError(f"wgmma without a shape at {instruction.address:#06x}: {instruction}")
    accumulators = int(shape[1]) // (4 if shape[2] == "F16" else 2)
    spans = zip(instruction.operands[:2], (accumulators, _REGISTERS_OF_A), strict=True)
    return {int(m[1]) + k for operand, size in spans if (m := _REGISTER.match(operand)) for k in range(size)}


def _written_registers(instruction: Instruction) -> range:
    if instruction.mnemonic in _NO_DESTINATION or instruction.mnemonic in _ASYNC:
        return range(0)  # wgmmas among themselves are ordered by the hardware
    destination = next((operand for operand in instruction.operands if not _PREDICATE.match(operand)), "")
    match = _REGISTER.match(destination)
    return range(int(match[1]), int(match[1]) + _width(instruction)) if match else range(0)


def _width(instruction: Instruction) -> int:
    """How many registers the destination spans."""
    mnemonic, modifiers = instruction.mnemonic, instruction.opcode.split(".")[1:]
    if mnemonic == "LDSM":
        return {"2": 2, "4": 4}.get(modifiers[-1], 1)
    if mnemonic in ("HMMA", "IMMA", "QMMA"):
        return 2 if "F16" in modifiers[:2] else 4
    if mnemonic in ("DADD", "DMUL", "DFMA", "FFMA2", "FADD2", "FMUL2"):
        return 2
    if mnemonic == "DMMA":
        return 4
    if mnemonic == "CS2R":
        return 1 if "32" in modifiers else 2
    if mnemonic == "SHF":
        return 1  # .U64 is its source
    if mnemonic.startswith(("LD", "ATOM")):
        return next((size for name, size in (("256", 8), ("128", 4), ("64", 2)) if name in modifiers), 1)
    return 2 if {"WIDE", "64", "F64", "S64", "U64"} & set(modifiers) else 1
