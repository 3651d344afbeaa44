"""Where machine code can go next, its loops, and the longest way through it.

A loop is what compilers call a natural loop: a jump back to a header that every way into the loop passes, and all code
from which that jump can be reached without passing the header again. So the jump of a kernel to itself behind its last
`EXIT` is none (nothing goes there), nor is code that is laid out elsewhere and jumped back from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.audit.sass import Instruction

_ADDRESS = re.compile(r"0x[0-9a-f]+$")
_CALLS = ("CALL", "WARPSYNC.COLLECTIVE")  # they come back


def is_call(instruction: Instruction) -> bool:
    """Whether a subroutine runs here and then the next instruction."""
    return instruction.mnemonic in _CALLS or instruction.opcode in _CALLS


def successors(instructions: Sequence[Instruction], *, into_calls: bool = True) -> list[list[int]]:
    """For each instruction the indices of those that may be executed next.

    A call goes to its subroutine (unless `into_calls` is False) and to the next instruction; the subroutine's return
    goes nowhere.

    Raises ValueError on an indirect branch, whose targets cannot be read off, or on one into nothing.
    """
    index_of = {instruction.address: index for index, instruction in enumerate(instructions)}
    found = []
    for index, instruction in enumerate(instructions):
        following = [index + 1] if index + 1 < len(instructions) else []
        if instruction.mnemonic in ("BRX", "JMX", "BRXU", "JMXU"):
            raise ValueError(f"indirect branch at {instruction.address:#06x}: its targets cannot be read off the code")
        if instruction.mnemonic in ("EXIT", "RET", "KILL"):
            found.append(following if instruction.guard else [])
        elif instruction.mnemonic in ("BRA", "JMP") or is_call(instruction):
            jump = target(instruction, index_of)
            always = not (is_call(instruction) or instruction.guard or len(instruction.operands) > 1)
            found.append([jump] if always else [jump, *following])
            if is_call(instruction) and not into_calls:
                found[-1] = following
        else:
            found.append(following)
    return found


def target(instruction: Instruction, index_of: dict[int, int]) -> int:
    """The index of the instruction to which a branch or call goes; ValueError if there is none."""
    operand = instruction.operands[-1] if instruction.operands else ""
    if not _ADDRESS.match(operand) or int(operand, 16) not in index_of:
        raise ValueError(f"branch at {instruction.address:#06x} to {operand!r}, which is not an instruction")
    return index_of[int(operand, 16)]


@dataclass(frozen=True)
class Loop:
    """A loop and those inside it; `body` holds the indices of all its instructions, the inner loops' included."""

    header: int
    body: frozenset[int]
    inner: tuple[Loop, ...] = ()

    @property
    def own(self) -> frozenset[int]:
        """The instructions that are in no inner loop."""
        return self.body.difference(*(loop.body for loop in self.inner))


def find_loops(edges: Sequence[Sequence[int]]) -> tuple[Loop, ...]:
    """The outermost loops of the graph that is entered at 0, in the order in which their code is laid out.

    Jumps back to one header make one loop. Raises ValueError if a loop can be entered past its header.
    """
    predecessors: list[list[int]] = [[] for _ in edges]
    jumps_back = []
    done, on_path, stack = set[int](), {0}, [(0, iter(edges[0]))] if edges else []
    while stack:  # depth first; a jump back is one to an instruction that is still on the path
        node, remaining = stack[-1]
        following = next(remaining, None)
        if following is None:
            stack.pop()
            on_path.remove(node)
            done.add(node)
            continue
        predecessors[following].append(node)
        if following in on_path:
            jumps_back.append((node, following))
        elif following not in done:
            on_path.add(following)
            stack.append((following, iter(edges[following])))
    bodies: dict[int, set[int]] = {}
    for source, header in jumps_back:
        body, work = bodies.setdefault(header, {header}), [source]
        while work:
            node = work.pop()
            if node not in body:
                body.add(node)
                work.extend(predecessors[node])
        if header != 0 and 0 in body:
            raise ValueError("a loop that can be entered in two places")
    return _nested([Loop(header, frozenset(body)) for header, body in bodies.items()])


def _nested(loops: Iterable[Loop]) -> tuple[Loop, ...]:
    """The same loops as trees. Two loops of different headers are apart, or one is in the other."""
    found: list[Loop] = []
    for loop in sorted(loops, key=lambda loop: len(loop.body)):
        inner = tuple(other for other in found if other.body < loop.body)
        found = [other for other in found if other not in inner]
        found.append(Loop(loop.header, loop.body, _in_order(inner)))
    return _in_order(found)


def _in_order(loops: Iterable[Loop]) -> tuple[Loop, ...]:
    return tuple(sorted(loops, key=lambda loop: min(loop.body)))


def walk(loops: Iterable[Loop]) -> Iterator[Loop]:
    """These loops and all in them, each before those in it."""
    for loop in loops:
        yield loop
        yield from walk(loop.inner)


def longest_way(
    edges: Sequence[Sequence[int]],
    weights: Sequence[float],
    start: int,
    loops: Mapping[Loop, float],
    region: Collection[int] | None = None,
) -> float:
    """The largest sum of weights on a way from `start` within `region`, to its end or until it is back at `start`.

    `loops` are the outermost ones in the region; one of them on the way has, as a whole, the weight given for it.
    """
    place = {node: loop.header for loop in loops for node in loop.body}
    members = {loop.header: loop.body for loop in loops}
    totals = {loop.header: total for loop, total in loops.items()}
    start = place.get(start, start)
    following: dict[int, set[int]] = {}
    work = [start]
    while work:
        node = work.pop()
        if node not in following:
            ways = {place.get(n, n) for member in members.get(node, (node,)) for n in edges[member]}
            following[node] = {n for n in ways - {node, start} if region is None or n in region}
            work.extend(following[node])
    arrivals = Counter(n for ways in following.values() for n in ways)
    before = dict.fromkeys(following, 0.0)
    work, longest = [start], 0.0
    while work:  # each after all from which it can be reached
        node = work.pop()
        total = before[node] + totals.get(node, weights[node])
        longest = max(longest, total)
        for n in following[node]:
            before[n] = max(before[n], total)
            arrivals[n] -= 1
            if not arrivals[n]:
                work.append(n)
    return longest
