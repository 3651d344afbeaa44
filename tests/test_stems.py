"""One stem for each op: its folder in kernels/, its test, its benchmark, one reference; and what is listed exists."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from bench import __main__ as command_line
from fastjepa.environment import ROOT
from fastjepa.kernels import OPS

KERNELS, TESTS, BENCH = ROOT / "kernels", ROOT / "tests", ROOT / "bench"


def public_functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}


def test_the_ops_are_the_folders() -> None:
    assert tuple(sorted(path.parent.name for path in KERNELS.glob("*/__init__.py"))) == OPS


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_files(op: str) -> None:
    for path in (KERNELS / op / "fused.py", TESTS / f"test_{op}.py", BENCH / f"{op}.py"):
        assert path.is_file(), f"{op} needs {path.relative_to(ROOT)}"
    # One reference, which has what the fused module offers: the same function under the same name.
    references = list(KERNELS.rglob("*reference*.py"))
    assert [path for path in references if op in path.parts] == [KERNELS / op / "reference.py"]
    shared = public_functions(KERNELS / op / "fused.py") & public_functions(KERNELS / op / "reference.py")
    assert shared, f"nothing in {op}/reference.py has the name of a function in {op}/fused.py"


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_a_command_of_bench(op: str) -> None:
    module, _ = command_line.COMMANDS[op]
    assert module == f"bench.{op}"


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_every_command_has_a_module_with_a_main(command: str, needs_triton: None) -> None:
    assert callable(importlib.import_module(command_line.COMMANDS[command][0]).main)


def test_every_kernel_is_in_the_folder_of_an_op_with_its_audit_cases(needs_triton: None) -> None:
    for path in KERNELS.rglob("*.py"):
        if "@triton.jit\ndef _" not in path.read_text(encoding="utf-8"):
            continue
        assert path.parent.name in OPS, path
        assert "audit_cases" in public_functions(path), f"{path.relative_to(ROOT)} has a kernel and no audit_cases()"
