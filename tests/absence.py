"""Fresh processes in which packages that are installed cannot be found, for tests of what works without them."""

from __future__ import annotations

import os
import subprocess
import sys

from fastjepa.environment import ROOT


def without(*modules: str) -> str:
    """The code that makes `modules` (names as they are imported) absent, to importing and to importlib.metadata."""
    return f"""
import importlib.metadata, sys
for name in {modules!r}:
    sys.modules[name] = None
def hidden(name, find=importlib.metadata.distribution):
    if name.lower() in {tuple(name.lower() for name in modules)!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)
importlib.metadata.distribution = hidden
"""


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh process, in the root of the checkout, where TRITON_INTERPRET=1 could not hide anything."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, timeout=300, check=False)


def run_as_main(blocker: str, target: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python train.py ...` or `python -m module ...` after the code `blocker`, which is `without(...)`."""
    call = f"run_path({target!r}" if target.endswith(".py") else f"run_module({target!r}, alter_sys=True"
    code = f"{blocker}import runpy\nsys.argv = [{target!r}, *sys.argv[1:]]\nrunpy.{call}, run_name='__main__')"
    return python(code, *arguments)
