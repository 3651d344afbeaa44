"""Machine code that is read many kernels at a time is what cuobjdump prints of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.audit import disassembly
from bench.audit.disassembly import disassemble
from bench.audit.sass import Compiled, Instruction, parse_sass
from tests.test_audit import sass

ROOT = Path(__file__).resolve().parent.parent

# In a process of its own, which compiles: planted kernels with loops and with a subroutine, and real ones, of which
# those for sm_100 jump in other ways (BRA.U, BSSY.RECONVERGENT).
_COMPARE = """
import json
from bench.audit.command import collect_cases
from bench.audit.disassembly import disassemble, read_alone
from bench.audit.sass import compile_case
planted, real = collect_cases(["tests.audit_planted"]), collect_cases(["fastjepa.kernels.moments.merge"])
chosen = [planted[name][1] for name in ("copy", "copy in a loop", "1000 FMAs in an inner loop", "wgmma as declared")]
chosen += [planted["a quotient"][1], next(iter(real.values()))[1]]
kernels = [compile_case(case, arch) for case in chosen for arch in (80, 90, 100)]
together, alone = disassemble(kernels), [read_alone(kernel.cubin) for kernel in kernels]
print(json.dumps({
    "different": [number for number, (a, b) in enumerate(zip(together, alone, strict=True)) if a != b],
    "lengths": [len(instructions) for instructions in alone],
    "mnemonics": sorted({i.mnemonic for instructions in alone for i in instructions}),
}))
"""


def test_read_together_and_alone_are_the_same() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPARE],
        **{"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 300, "check": False},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["different"] == []
    assert len(found["lengths"]) == 18
    assert min(found["lengths"]) > 10
    assert {"BRA", "CALL", "RET", "BSSY"} <= set(found["mnemonics"])  # all that has an address in it was there


def instructions(*lines: str, begin: int = 0x100) -> list[Instruction]:
    """As they come out where others lie before them."""
    text = sass(*lines)
    found = parse_sass(text)
    return [Instruction(i.address + begin, i.opcode, i.operands, i.guard) for i in found]


def test_a_jump_is_counted_from_the_begin_of_its_kernel() -> None:
    lines = ("MOV R1, 0x110", "@!P1 BRA P0, 0x120", "CALL.REL.NOINC 0x100", "RET.REL.NODEC R2 0x100", "BSSY B0, 0x130")
    found = disassembly._from_zero(instructions(*lines), 0x100, 0x150)
    assert found is not None
    assert [i.address for i in found] == [0, 16, 32, 48, 64]
    assert [i.operands[-1] for i in found] == ["0x110", "0x20", "0x0", "R2 0x0", "0x30"]  # a number is no address
    assert [i.guard for i in found] == ["", "@!P1", "", "", ""]


@pytest.mark.parametrize("target", ["0xf0", "0x120"])
def test_a_jump_out_of_the_kernel_is_left_to_cuobjdump(target: str) -> None:
    assert disassembly._from_zero(instructions("NOP", f"BRA {target}"), 0x100, 0x120) is None


def test_what_cannot_be_read_together_is_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = {b"a": b"0" * 32, b"b": None, b"c": b"1" * 32}
    monkeypatch.setattr(disassembly, "_code", codes.get)
    monkeypatch.setattr(disassembly, "_run", lambda *_, content: sass("NOP", "EXIT", "NOP", "BRA 0x0"))
    monkeypatch.setattr(disassembly, "read_alone", lambda cubin: parse_sass(sass(f"MOV {cubin.decode()}, RZ")))
    kernels = [Compiled(cubin, "", 0, 0, ".target sm_90a") for cubin in (b"a", b"b", b"c")]
    first, second, third = disassemble(kernels)
    assert [i.opcode for i in first] == ["NOP", "EXIT"]
    assert (second[0].operands, third[0].operands) == (("b", "RZ"), ("c", "RZ"))  # relocated; jumps into the first


def test_what_is_no_binary_is_refused() -> None:
    with pytest.raises(ValueError, match="is no 64-bit ELF file"):
        disassemble([Compiled(b"text", "", 0, 0, ".target sm_80")])
