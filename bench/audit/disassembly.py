"""Machine code as instructions, by the disassemblers that Triton ships.

They take a third of a second to start and a few milliseconds a kernel. cuobjdump reads one binary a time, and starts
nvdisasm for it; so the code of many kernels is laid end to end, and nvdisasm reads all of it at once. A kernel's jumps,
which are relative, then come out as addresses in the whole, and its begin is taken off them. A kernel that cannot be
read so (code to be relocated, or a jump out of it) is left to cuobjdump.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from triton import knobs

from bench.audit.sass import Compiled, Instruction, parse_sass

_TARGET = re.compile(r"^\.target\s+sm_(\w+)", re.MULTILINE)
_RELATIVE = ("BRA", "BSSY", "CALL", "RET", "WARPSYNC", "JMP")  # their last operand may be an address in the code
_ADDRESS = re.compile(r"0x[0-9a-f]+$")
_SECTION = struct.Struct("<IIQQQQIIQQ")  # a section header of a 64-bit ELF file


def disassemble(kernels: Sequence[Compiled]) -> list[tuple[Instruction, ...]]:
    """The instructions of each kernel; those of one architecture are read together.

    Raises RuntimeError if a disassembler fails, ValueError if a binary is none.
    """
    found: dict[int, tuple[Instruction, ...]] = {}
    groups: dict[str, dict[int, bytes]] = {}
    for number, kernel in enumerate(kernels):
        code, target = _code(kernel.cubin), _TARGET.search(kernel.ptx)
        if code is not None and target is not None:
            groups.setdefault(target[1], {})[number] = code
    for target_name, codes in groups.items():
        for number, read in zip(codes, _read_together(list(codes.values()), target_name), strict=True):
            if read is not None:
                found[number] = read
    return [
        found[number] if number in found else read_alone(kernel.cubin) for number, kernel in enumerate(kernels)
    ]  # fmt: skip


def read_alone(cubin: bytes) -> tuple[Instruction, ...]:
    """The instructions of one binary as cuobjdump prints them."""
    return parse_sass(_run(knobs.nvidia.cuobjdump.path, "--dump-sass", content=cubin))


def _read_together(codes: Sequence[bytes], target: str) -> list[tuple[Instruction, ...] | None]:
    """The instructions of each, None where a jump leaves its kernel."""
    text = _run(knobs.nvidia.nvdisasm.path, "--binary", f"SM{target}", content=b"".join(codes))
    instructions = parse_sass(text)
    addresses = [instruction.address for instruction in instructions]
    found, begin = [], 0
    for code in codes:
        end = begin + len(code)
        own = instructions[bisect_left(addresses, begin) : bisect_left(addresses, end)]
        found.append(_from_zero(own, begin, end))
        begin = end
    return found


def _from_zero(instructions: Sequence[Instruction], begin: int, end: int) -> tuple[Instruction, ...] | None:
    """The same as if the code lay at 0; None if it jumps to somewhere else than between `begin` and `end`."""
    found = []
    for instruction in instructions:
        operands = instruction.operands
        if instruction.mnemonic in _RELATIVE and operands and (match := _ADDRESS.search(operands[-1])):
            address = int(match[0], 16)
            if not begin <= address < end:
                return None
            operands = (*operands[:-1], f"{operands[-1][: match.start()]}{address - begin:#x}")
        found.append(replace(instruction, address=instruction.address - begin, operands=operands))
    return tuple(found)


def _code(cubin: bytes) -> bytes | None:
    """The machine code in a binary, None if it is not in one piece that needs no relocation.

    Raises ValueError if it is no 64-bit ELF file.
    """
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError(f"a binary that begins with {cubin[:5]!r} is no 64-bit ELF file")
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [_SECTION.unpack_from(cubin, offset + size * number) for number in range(count)]
    sections = {}
    for name, _, _, _, start, length, *_ in headers:
        at = headers[names][4] + name
        sections[cubin[at : cubin.index(b"\0", at)].decode()] = cubin[start : start + length]
    codes = [code for name, code in sections.items() if name.startswith(".text")]
    relocated = any(name.startswith((".rel.text", ".rela.text")) for name in sections)
    return codes[0] if len(codes) == 1 and not relocated else None


def _run(program: str, *arguments: str, content: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(content)
        done = subprocess.run([program, *arguments, str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(program).name} failed ({done.returncode}): {done.stderr.strip()[:300]}")
    return done.stdout
