"""What an installation has: the names of the package, asked for late; its extras; its command; its types."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import fastjepa
from absence import python
from fastjepa.environment import ROOT
from fastjepa.optional_packages import EXTRAS


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return settings


def names(requirements: list[str]) -> set[str]:
    """Of the packages in a list of requirements, without their versions: "fastjepa[train]" is one."""
    return {re.split(r"[<>=; ]", requirement)[0] for requirement in requirements}


# ---- the names of the package ----


def test_the_names_are_the_same_to_type_checkers_and_when_asked_for() -> None:
    tree = ast.parse(Path(str(fastjepa.__file__)).read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    found = {a.name: node.module for node in typed.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert found == vars(fastjepa)["_DEFINED_IN"]
    assert sorted(found) == fastjepa.__all__
    for name, module in found.items():
        assert module is not None
        assert getattr(fastjepa, name) is getattr(importlib.import_module(module), name)
    assert set(fastjepa.__all__) <= set(dir(fastjepa))


def test_no_name_is_that_of_a_module_which_would_take_its_place() -> None:
    assert not {module.name for module in pkgutil.iter_modules(fastjepa.__path__)} & set(fastjepa.__all__)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'fastjepa' has no attribute 'acelerate'"):
        fastjepa.acelerate  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'acelerate' from 'fastjepa'"):
        from fastjepa import acelerate  # noqa: F401


# ---- what is imported when ----

HEAVY = "torch numpy matplotlib PIL sklearn scipy cv2 torchmetrics tensorboard tyro safetensors submitit triton".split()


@pytest.mark.parametrize(
    ("code", "taken"),
    [
        ("import fastjepa", ""),
        ("from fastjepa.__main__ import main; main(['--version']); main(['--help']); main(['trian'])", ""),
        (
            "from fastjepa.figures.__main__ import main\ntry: main(['nowhere'])\nexcept SystemExit: pass",
            "numpy matplotlib PIL",
        ),
        ("import fastjepa.evaluate, fastjepa.rollout, fastjepa.compare_steps", "torch numpy"),
        ("import fastjepa.training.command_line", "torch numpy"),
        ("from fastjepa.sweep import main\ntry: main(['--help'])\nexcept SystemExit: pass", ""),
        ("import bench.__main__ as bench; bench.main(['--help'])", ""),
    ],
)
@pytest.mark.packages("matplotlib", "PIL")
def test_a_command_imports_what_it_needs_and_no_more(code: str, taken: str) -> None:
    done = python(f"import sys\n{code}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()[-1].split()) == set(taken.split())


# ---- what is installed ----


def test_importing_and_accelerating_need_five_packages(project: dict[str, Any]) -> None:
    assert names(project["project"]["dependencies"]) == {"torch", "triton", "numpy", "nvtx", "filelock"}


def test_the_extras_are_those_that_errors_name(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    assert names(extras["figures"]) == set(EXTRAS["figures"])
    assert names(extras["train"]) == {"fastjepa[figures]", *EXTRAS["train"]}
    assert extras["all"] == ["fastjepa[train]"]
    assert names(extras["slurm"]) == {"fastjepa[train]", *EXTRAS["slurm"]}
    assert {"fastjepa[all]", "fastjepa[slurm]"} <= names(extras["dev"])


def test_the_command_and_the_version_are_there(project: dict[str, Any]) -> None:
    module, _, function = project["project"]["scripts"]["fastjepa"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    attribute = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attribute == "fastjepa.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastjepa.__version__)


def test_types_are_shipped(project: dict[str, Any]) -> None:
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["fastjepa"]
    assert (ROOT / "fastjepa" / "py.typed").is_file()
