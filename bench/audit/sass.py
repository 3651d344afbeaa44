"""Compile a kernel for a GPU that need not be there, and read what the assembler made of it.

The facts come from three places: ptxas's own log of the assembly that made the binary (registers, spills,
serialisation warnings), Triton's metadata (shared memory), and the machine code (SASS), which `disassembly` reads.
Nothing here runs on a GPU.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from fastjepa.kernels.launch import AuditCase

# Mnemonics of matrix instructions by their kind in PTX: warp-wide (Ampere), warpgroup-wide (Hopper), tensor memory
# (Blackwell).
MATRIX_INSTRUCTIONS = {
    "mma.sync": ("HMMA", "IMMA", "BMMA", "DMMA", "QMMA", "OMMA"),
    "wgmma": ("HGMMA", "IGMMA", "BGMMA", "QGMMA"),
    "tcgen05": ("UTCHMMA", "UTCIMMA", "UTCQMMA", "UTCOMMA"),
}
_KINDS = {mnemonic: kind for kind, mnemonics in MATRIX_INSTRUCTIONS.items() for mnemonic in mnemonics}
_LOG_FILE = "ptxas.log"
GLOBAL_LOADS = ("LDG", "LDGSTS", "LD")
GLOBAL_STORES = ("STG", "ST")
BULK_LOADS = ("UTMALDG", "UBLKCP")  # the copy engine moves whole tiles
BULK_STORES = ("UTMASTG",)

_SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z]\S*)\s*([^;]*);")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_WARNING = re.compile(
    r"(?:\((C\d+)\) )?Potential Performance Loss: (.*?)(?: (?:in|for) the function\b.*)?$", re.MULTILINE
)


@dataclass(frozen=True)
class Instruction:
    """One line of SASS, e.g. `/*0530*/ @P0 LDG.E.128 R4, [R2.64] ;`."""

    address: int
    opcode: str  # with its modifiers: "LDG.E.128"
    operands: tuple[str, ...]
    guard: str = ""  # "@P0", or "" when it always executes

    @property
    def mnemonic(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".", 1)[0]

    def __str__(self) -> str:
        return f"{self.guard} {self.opcode} {', '.join(self.operands)}".strip()


@dataclass(frozen=True)
class Compiled:
    """What a compilation leaves behind; `disassembly.disassemble` reads the machine code."""

    cubin: bytes
    assembler_log: str
    shared_bytes: int
    tensor_memory_columns: int
    ptx: str  # what the assembler was given

    def read(self, instructions: tuple[Instruction, ...]) -> Binary:
        """The same with its machine code."""
        return Binary(instructions, self.assembler_log, self.shared_bytes, self.tensor_memory_columns, self.ptx)


@dataclass(frozen=True)
class Binary:
    """What a compilation leaves behind that can be read without running it."""

    instructions: tuple[Instruction, ...]
    assembler_log: str
    shared_bytes: int
    tensor_memory_columns: int
    ptx: str = ""  # what the assembler was given


@dataclass(frozen=True)
class Inspection:
    """The facts about one binary on which the audit judges it."""

    registers: int
    spill_bytes: int  # the larger of bytes stored and bytes loaded, per thread
    shared_bytes: int
    tensor_memory_columns: int
    instructions: int
    tensor_cores: dict[str, int]  # e.g. {"HGMMA.64x64x16.F32.BF16 RS": 8}; RS: A from registers, SS: from shared memory
    global_loads: int
    wide_loads: int  # of these, 128 bits or more per thread, or bulk copies
    global_stores: int
    wide_stores: int
    warnings: tuple[str, ...]  # ptxas: wgmma serialised


def parse_sass(text: str) -> tuple[Instruction, ...]:
    """Read the output of cuobjdump or nvdisasm; lines that are not instructions are passed over."""
    found = (_SASS_LINE.match(line) for line in text.splitlines())
    return tuple(
        Instruction(
            address=int(match[1], 16),
            opcode=match[3],
            operands=tuple(operand.strip() for operand in match[4].split(",") if operand.strip()),
            guard=match[2] or "",
        )
        for match in found
        if match
    )


def compile_case(case: AuditCase, arch: int) -> Compiled:
    """Compile one audit case for compute capability `arch` (80, 90, 100); needs no GPU.

    Raises ValueError if the case does not describe its kernel's arguments, and whatever Triton raises if the kernel
    does not compile.
    """
    source = _source(case)
    compiled, log = _compile(source, case, arch, again=False)
    # Triton's cache holds the binary but not ptxas's log, so the log is put beside it.
    cache = get_cache_manager(compiled.hash)
    if log:
        cache.put(log, _LOG_FILE, binary=False)
    elif (cached := cache.get_file(_LOG_FILE)) is not None:
        log = Path(cached).read_text()
    else:
        compiled, log = _compile(source, case, arch, again=True)
        cache.put(log, _LOG_FILE, binary=False)
    return Compiled(
        cubin=compiled.asm["cubin"],
        assembler_log=log,
        shared_bytes=compiled.metadata.shared,
        tensor_memory_columns=getattr(compiled.metadata, "tmem_size", 0) or 0,
        ptx=compiled.asm["ptx"],
    )


def inspect(binary: Binary) -> Inspection:
    """Count what the audit judges. Raises ValueError if ptxas's log or the machine code cannot be read."""
    registers, spills = _REGISTERS.search(binary.assembler_log), _SPILLS.findall(binary.assembler_log)
    if registers is None or not spills:
        raise ValueError(f"ptxas's log has no register or spill counts: {binary.assembler_log[:200]!r}")
    if not binary.instructions:
        raise ValueError("the disassembly has no instructions")
    count = Counter(instruction.mnemonic for instruction in binary.instructions)
    wide = Counter(i.mnemonic for i in binary.instructions if re.search(r"\.(128|256)\b", i.opcode))
    bulk_loads, bulk_stores = (sum(count[name] for name in names) for names in (BULK_LOADS, BULK_STORES))
    return Inspection(
        registers=int(registers[1]),
        spill_bytes=max(int(size) for pair in spills for size in pair),
        shared_bytes=binary.shared_bytes,
        tensor_memory_columns=binary.tensor_memory_columns,
        instructions=len(binary.instructions),
        tensor_cores=dict(Counter(_matrix_form(i) for i in binary.instructions if i.mnemonic in _KINDS)),
        global_loads=sum(count[name] for name in GLOBAL_LOADS) + bulk_loads,
        wide_loads=sum(wide[name] for name in GLOBAL_LOADS) + bulk_loads,
        global_stores=sum(count[name] for name in GLOBAL_STORES) + bulk_stores,
        wide_stores=sum(wide[name] for name in GLOBAL_STORES) + bulk_stores,
        warnings=tuple(sorted({f"{code or 'ptxas'}: {what}" for code, what in _WARNING.findall(binary.assembler_log)})),
    )


def _matrix_form(instruction: Instruction) -> str:
    if instruction.mnemonic.endswith("GMMA"):
        return f"{instruction.opcode} {'SS' if instruction.operands[1].startswith('gdesc') else 'RS'}"
    return instruction.opcode


def kinds_of(tensor_cores: Iterable[str]) -> set[str]:
    """The kinds of matrix instructions, keys of `MATRIX_INSTRUCTIONS`, among the forms of `Inspection.tensor_cores`."""
    return {_KINDS[form.split(".", 1)[0]] for form in tensor_cores}


def _compile(source: Any, case: AuditCase, arch: int, *, again: bool) -> tuple[Any, str]:
    """The compiled kernel and ptxas's log; the log is empty if the kernel came from Triton's cache."""
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = again
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": case.config.num_warps, "num_stages": case.config.num_stages},
        )
    return compiled, log.getvalue()


def _source(case: AuditCase) -> Any:
    """The kernel with its argument types, as a real launch would specialise it."""
    names: list[str] = list(case.kernel.arg_names)
    blocks = {name: size for name, size in case.config.blocks.items() if name in names}
    for name in blocks.keys() & case.constexprs.keys():
        if blocks[name] != case.constexprs[name]:
            raise ValueError(
                f"audit case {case.name!r}: {name} is {case.constexprs[name]} in constexprs, {blocks[name]} in config"
            )
    constexprs = {**blocks, **case.constexprs}
    given = case.signature.keys() | constexprs.keys()
    missing, unknown = set(names) - given, given - set(names)
    twice, not_integers = case.signature.keys() & constexprs.keys(), set(case.divisible_by_16) - case.signature.keys()
    for wrong, what in (
        (missing, "neither in signature nor in constexprs"),
        (unknown, "not arguments of the kernel"),
        (twice, "both in signature and in constexprs"),
        (not_integers, "in divisible_by_16 but not in signature"),
    ):
        if wrong:
            raise ValueError(f"audit case {case.name!r}: {', '.join(sorted(wrong))} {what}")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in case.divisible_by_16]
    return ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs=constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
