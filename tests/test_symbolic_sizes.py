"""Ops under torch.compile with dynamic sizes, and in opcheck's dynamic trace: what is a symbol, what a number.

A tile must be made of numbers: they are compiled into the kernel.
Only on a GPU would this code run: interpreted ops are opaque to a trace. `symbolic_sizes` traces the compiled ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from fastjepa.environment import ROOT


@pytest.fixture(scope="module")
def launches() -> dict[str, list[dict[str, Any]]]:
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(ROOT / "tests" / "symbolic_sizes.py")]
    # A size that stays a symbol where it must not makes the trace hang, not fail.
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_op_is_traced_with_numbers_where_kernels_need_them(launches: dict[str, list[dict[str, Any]]]) -> None:
    # The losses of a state and three predictions: 7 launches forward; backward 2 of up to two predictions, and 4 more.
    counts = {"statistics": 2, "moving": 2, "batch_norm": 4, "losses": 13, "convolution": 1}
    for case, found in launches.items():
        assert len(found) == counts[case.split()[0]], case
        for launch in found:
            constants = {name: value for name, value in launch.items() if name.isupper()}
            assert constants
            assert "symbol" not in constants.values(), (case, launch)


def test_the_number_of_rows_may_stay_a_symbol(launches: dict[str, list[dict[str, Any]]]) -> None:
    """Another batch size then needs no other graph, where the cut is the same."""
    for case, found in launches.items():
        if not case.startswith(
            ("statistics", "moving")
        ):  # nn.BatchNorm's own check of the number of values asks for theirs
            assert all(launch.get("n_rows", "symbol") == "symbol" for launch in found), case


def test_a_launch_writes_its_results_only(launches: dict[str, list[dict[str, Any]]]) -> None:
    """Arguments that torch takes to be written are cloned before each launch, inputs among them.

    And all that is written must be among them: what torch does not know of, a compiled graph may leave out.
    """
    results = {"partial_mean_ptr", "partial_m2_ptr", "mean_ptr", "var_ptr"}
    moved = {"running_mean_ptr", "running_var_ptr", "num_batches_tracked_ptr"}
    for case, found in launches.items():
        writes = [" ".join(name.removesuffix("_ptr") for name in launch["writes"]) for launch in found]
        if case.startswith("batch_norm"):
            assert writes == ["out", "partial", "sums", "grad_residual grad_x"]
        elif case == "convolution":
            assert writes == ["out"]
        elif case == "losses":
            assert writes == [
                "centre residual scatter",
                "mean total",
                "batch_mean batch_var centre inv_std offset shift slope weight1_scatter wide_weight2",
                *["sums"] * 3,  # of z, of the predictions, merged
                "cov covariance mean_r prediction projected std transposed",
                "grad_weight2 gram inner variance",
                "sums v0 v1 vz",
                "sums v0 vz",
                "sums",
                "centre constant grad_bias1 grad_bn_bias grad_bn_weight grad_weight1 linear scaled",
                "out0 out1 out2 out3",
            ]
        else:
            for launch in found:
                assert launch["writes"], case
                assert set(launch["writes"]) <= results | (moved if case.startswith("moving") else set()), (
                    case,
                    launch,
                )
