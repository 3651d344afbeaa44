"""PTX, from which the assembler makes machine code, read as far as its loops need it."""

from __future__ import annotations

import re

from bench.audit.sass import Instruction

_LABEL = re.compile(r"([$\w]+):$")
_STATEMENT = re.compile(r"[{\s]*(@!?%?\w+\s+)?([a-z]\w*(?:[.:]+\w+)*)(?:\s+(.*))?$")
_MNEMONICS = {"bra": "BRA", "brx": "BRX", "ret": "RET", "exit": "EXIT", "trap": "EXIT"}


def parse_ptx(text: str) -> tuple[Instruction, ...]:
    """The entry function's instructions, numbered; branches and returns have the names and targets of machine code.

    Raises ValueError if there is no entry, or a label twice.
    """
    _, entry, body = text.partition(".entry")
    if not entry:
        raise ValueError("the PTX has no entry function")
    labels: dict[str, int] = {}
    found: list[tuple[str, str, str]] = []
    for line in body.partition("// -- End function")[0].splitlines():
        code = line.partition("//")[0].strip()
        if label := _LABEL.match(code):
            if label[1] in labels:
                raise ValueError(f"the PTX has the label {label[1]} twice")
            labels[label[1]] = len(found)
        statements = (_STATEMENT.match(statement) for statement in code.split(";")[:-1])
        found.extend(((match[1] or "").strip(), match[2], (match[3] or "").strip()) for match in statements if match)
    found.append(("", "ret", ""))  # what a label at the end stands for
    instructions = []
    for address, (guard, opcode, operands) in enumerate(found):
        opcode = _MNEMONICS.get(opcode.split(".")[0], opcode)
        if opcode == "BRA" and operands in labels:
            operands = f"{labels[operands]:#x}"
        instructions.append(Instruction(address, opcode, (operands,) if operands else (), guard))
    return tuple(instructions)
