"""One stem for each op: its folder in kernels/, its test, its benchmark, one reference; and what is listed exists."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from bench import __main__ as command_line
from fastjepa.environment import ROOT
from fastjepa.kernels import OPS

KERNELS, TESTS, BENCH = ROOT / "kernels", ROOT / "tests", ROOT / "bench"


def public_functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}


def test_the_ops_are_the_folders_and_nothing_but_what_they_share_lies_beside_them() -> None:
    assert tuple(sorted(path.parent.name for path in KERNELS.glob("*/__init__.py"))) == OPS
    assert {path.stem for path in KERNELS.glob("*.py")} == {"__init__", "checks", "launch", "shares", "tf32"}


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_files(op: str) -> None:
    for path in (KERNELS / op / "fused.py", TESTS / f"test_{op}.py", BENCH / f"{op}.py"):
        assert path.is_file(), f"{op} needs {path.relative_to(ROOT)}"
    # One reference: what callers call is defined by the fused module, the reference and, at most, a closed form.
    shared = public_functions(KERNELS / op / "fused.py") & public_functions(KERNELS / op / "reference.py")
    assert shared, f"nothing in {op}/reference.py has the name of a function in {op}/fused.py"
    for path in KERNELS.rglob("*.py"):
        if path.parent.name != op or path.stem not in ("fused", "reference", "closed_form"):
            assert not shared & public_functions(path), f"{path.relative_to(ROOT)} defines {shared} again"


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_a_command_of_bench(op: str) -> None:
    module, _ = command_line.COMMANDS[op]
    assert module == f"bench.{op}"


def test_the_commands_that_users_know_are_there() -> None:
    known = {"audit", "losses", "saved", "step", "layers", "rollout", "train", "tune", "report", "prove", "eval"}
    assert known <= command_line.COMMANDS.keys()
    assert command_line.COMMANDS["losses"][0] == "bench.projected_losses"
    assert command_line.COMMANDS["layers"][0] == "bench.layers"


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_every_command_has_a_module_with_a_main(command: str, request: pytest.FixtureRequest) -> None:
    try:
        module = importlib.import_module(command_line.COMMANDS[command][0])
    except ImportError:
        request.getfixturevalue("needs_triton")  # skips this command, where that is why
        raise
    assert callable(module.main)


def test_every_kernel_is_in_the_folder_of_an_op_with_its_audit_cases(needs_triton: None) -> None:
    for path in KERNELS.rglob("*.py"):
        if not re.search(r"^@triton\.jit.*\ndef _", path.read_text(encoding="utf-8"), re.MULTILINE):
            continue
        assert path.parent.name in OPS, path
        beside = path.parent / "audit.py"  # of several kernels that have their cases in common
        where = beside if beside.is_file() else path
        assert "audit_cases" in public_functions(where), f"{path.relative_to(ROOT)} has a kernel and no audit_cases()"


def test_every_kernel_has_an_audit_case(needs_triton: None) -> None:
    from bench.audit.command import collect_cases, kernel_modules

    audited = {case.kernel.__name__ for _, case in collect_cases(kernel_modules()).values()}
    written = {
        name
        for module in kernel_modules()
        for name in vars(importlib.import_module(module))
        if name.startswith("_") and name.endswith("_kernel")
    }
    assert written == audited
