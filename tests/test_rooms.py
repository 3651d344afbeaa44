"""Imports run one way: kernels ← model ← fused, graphs ← training ← train.py, with bench and tests on top; no cycles.

A room is a folder of fastjepa/, or one of the modules beside them. What each may import is written down here and in the
docstring of its package.
"""

from __future__ import annotations

import ast
import graphlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastjepa.environment import ROOT
from fastjepa.kernels import OPS

# Every room with those it may import, besides itself. A room may import only what stands above it in this list.
ROOMS: dict[str, set[str]] = {
    "files": set(),
    "kernels": set(),
    "measuring": set(),
    "config": set(),
    "environment": set(),
    "execution": set(),
    "profiling": set(),
    "optional_packages": set(),
    "distributed": {"kernels"},
    "model": {"files", "kernels", "profiling", "optional_packages", "distributed"},
    "storage": {"files", "config", "optional_packages", "model"},
    "refusal": {"files", "measuring", "optional_packages"},
    "entry": {"optional_packages", "refusal"},
    "moving_mnist": {"files", "optional_packages"},
    "calibration": {"files", "measuring", "config", "environment", "storage"},
    "autotune": set(),
    "fused": {"autotune", "kernels", "profiling", "distributed", "model", "calibration"},
    "graphs": {"kernels", "profiling", "model", "moving_mnist", "fused"},
    "verification_result": {"measuring"},
    "verification": {"verification_result", "measuring", "calibration", "fused"},
    "trials": {"kernels", "measuring", "model", "moving_mnist", "calibration", "fused", "graphs"},
    "figures": {"files", "optional_packages", "model", "refusal", "entry"},
    "training": {
        "files", "kernels", "config", "environment", "profiling", "optional_packages", "distributed", "model",
        "storage", "refusal", "moving_mnist", "calibration", "fused", "graphs", "figures",
    },
    "sweeping": {
        "files", "measuring", "config", "optional_packages", "storage", "figures", "training",
    },
    "calibrate": {"config", "refusal", "entry", "calibration", "fused"},
    "evaluate": {
        "entry",
        "files", "kernels", "config", "optional_packages", "model", "storage", "refusal", "moving_mnist", "calibration",
        "fused", "graphs", "training",
    },
    "rollout": {
        "config", "environment", "model", "refusal", "entry", "moving_mnist", "calibration", "graphs", "figures",
        "training", "evaluate",
    },
    "export": {"files", "config", "storage", "refusal", "entry", "training"},
    "compare_steps": {"optional_packages", "refusal", "entry", "storage", "figures", "training"},
    "sweep": {"distributed", "optional_packages", "refusal", "entry", "training", "sweeping"},
    "__main__": {"entry"},  # and the commands by name, when they are called
}  # fmt: skip


def files() -> Iterator[Path]:
    for folder in ("fastjepa", "kernels", "bench", "tests"):
        yield from (
            path for path in (ROOT / folder).rglob("*.py") if (ROOT / "fastjepa" / "kernels") not in path.parents
        )
    yield ROOT / "train.py"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(("fastjepa", *parts) if parts[0] == "kernels" else parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(path): path for path in files()}


def imports(module: str, *, at_import: bool = False) -> set[str]:
    """The project's modules that `module` imports anywhere in its code, or only those that importing it imports.

    Helpers of tests are imported by their bare names (pytest's pythonpath), and found here as tests.<name>.
    """
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; name the room"
            assert node.module is not None
            # `from package import module` imports the module, `from module import name` does not.
            found |= {name for alias in node.names if (name := f"{node.module}.{alias.name}") in MODULES} or {
                node.module
            }
    found |= {f"tests.{name}" for name in found}
    return {name for name in found if name in MODULES}


def room_of(module: str) -> str | None:
    """ "model" for fastjepa.model.step; None outside fastjepa, and for the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "fastjepa" and len(parts) > 1 else None


def test_the_rooms_are_the_folders_and_modules_there_are() -> None:
    assert {room for module in MODULES if (room := room_of(module))} == ROOMS.keys()


def test_a_room_imports_only_rooms_above_it_in_the_list() -> None:
    order = list(ROOMS)
    for room, allowed in ROOMS.items():
        assert allowed <= set(order[: order.index(room)]), room


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_may(room: str) -> None:
    for module in MODULES:
        if room_of(module) != room:
            continue
        for imported in imports(module):
            assert imported.split(".")[0] == "fastjepa", f"{module} imports {imported}, which is on top of it"
            assert imported != "fastjepa" or room == "__main__", f"{module} imports the package, which imports it"
            other = room_of(imported)
            assert other in (room, None) or other in ROOMS[room], f"{module} imports {imported}; {room} may not"


def test_what_a_room_may_import_is_used() -> None:
    """So that the list is what the code does, not what it once did."""
    for room, allowed in ROOMS.items():
        used = {room_of(i) for module in MODULES if room_of(module) == room for i in imports(module)} - {room, None}
        assert used == allowed, room


def test_bench_does_not_import_tests_and_train_py_imports_training_and_how_to_begin() -> None:
    for module in MODULES:
        if module.startswith("bench"):
            assert not any(imported.startswith("tests") for imported in imports(module)), module
    assert {room_of(imported) for imported in imports("train")} == {"entry", "training"}


# What the rooms of bench may import, besides themselves and fastjepa.
ROOMS_OF_BENCH = {
    "bench.harness": (),
    "bench.audit": ("bench.harness",),
    "bench.report": ("bench.harness", "bench.recipe"),
    "bench.prove": ("bench.harness", "bench.report", "bench.recipe", "bench.step", "bench.ceilings"),
    "bench.profile": ("bench.harness", "bench.recipe", "bench.recipe_suite", "bench.step"),
}


@pytest.mark.parametrize("room", ROOMS_OF_BENCH)
def test_a_room_of_bench_imports_what_it_may(room: str) -> None:
    def within(module: str, *rooms: str) -> bool:
        return any(module == r or module.startswith(f"{r}.") for r in rooms)

    for module in MODULES:
        if within(module, room):
            for imported in imports(module):
                assert within(imported, "fastjepa", room, *ROOMS_OF_BENCH[room]), f"{module} imports {imported}"


def test_no_module_needs_itself() -> None:
    graphlib.TopologicalSorter({module: imports(module, at_import=True) for module in MODULES}).prepare()


@pytest.mark.parametrize("package", sorted(p for p, path in MODULES.items() if path.name == "__init__.py"))
def test_a_package_says_what_belongs_in_it(package: str) -> None:
    docstring = ast.get_docstring(ast.parse(MODULES[package].read_text(encoding="utf-8")))
    assert docstring
    assert len(docstring.split()) >= 10, f"{package}: {docstring}"


def test_the_wheel_has_every_package() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    packages = [name for name, path in MODULES.items() if path.name == "__init__.py" and name.startswith("fastjepa")]
    assert sorted(listed) == sorted(packages)


@pytest.mark.parametrize("instead", [None, "../kernels"])
def test_a_checkout_without_links_finds_its_own_kernels(instead: str | None, tmp_path: Path) -> None:
    """On Windows git writes a link's target into a small file; an archive may leave links out."""
    for folder in ("fastjepa", "kernels"):
        leave_out = shutil.ignore_patterns("kernels", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=leave_out if folder == "fastjepa" else None)
    if instead is not None:
        (tmp_path / "fastjepa" / "kernels").write_text(instead)
    code = (
        "import fastjepa, fastjepa.kernels.checks, fastjepa.kernels.projected_losses.closed_form as c\n"
        "print(fastjepa.kernels.__file__, c.__file__, len(fastjepa.__path__), fastjepa.kernels.OPS, sep='\\n')"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    package, module, paths, ops = done.stdout.splitlines()
    assert Path(package).parent == tmp_path / "kernels"
    assert Path(module).parent == tmp_path / "kernels" / "projected_losses"
    assert (paths, ops) == ("1", str(OPS))
