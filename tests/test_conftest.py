"""What the tests' own gate promises: an order on a GPU, and failures that are said even by a run that dies."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from conftest import BUILTINS, value_on_a_gpu


def item(
    path: str, name: str = "test_it", device: str | None = None, *, gpu: bool = False, fixture: bool = True
) -> Any:
    parameters = {} if device is None else {"device": device}
    return SimpleNamespace(
        path=Path(path),
        name=name,
        get_closest_marker=lambda mark: mark if gpu else None,
        fixturenames=["device"] if fixture else [],
        callspec=SimpleNamespace(params=parameters),
    )


def test_on_a_gpu_kernels_come_before_graphs_networks_and_the_rest() -> None:
    order = [
        item("test_batch_norm.py"),
        item("test_moments.py", gpu=True),
        item("test_graphed_rollout.py", device="cuda", gpu=True),
        item("test_fused_networks.py"),
        item("test_moving_mnist_clips.py", device="cuda", gpu=True),
        item("test_graphed_rollout.py", device="cpu"),
    ]
    assert [value_on_a_gpu(each) for each in order] == list(range(6))
    assert value_on_a_gpu(item("test_batch_norm.py", "test_torch_compile_fullgraph[plain]")) == 3
    assert value_on_a_gpu(item("test_batch_norm.py", fixture=False)) == 5


def test_a_run_that_is_killed_has_said_what_failed(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_dies.py").write_text(
        "import os\ndef test_first(): assert 1 == 2, 'one is not two'\ndef test_second(): os._exit(3)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_dies.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 3
    assert "failed: test_dies.py::test_first (call): AssertionError: one is not two" in done.stdout.splitlines()


def test_every_builtin_of_the_language_is_known_to_the_interpreter(interpreted: None) -> None:
    from triton import language as tl

    assert len(BUILTINS) == 5
    for package, names in BUILTINS.items():
        assert len(names) > 5
        assert {name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)} <= set(names)
