"""Where Triton is not installed (macOS, Windows, a bare CPU), everything but the kernels works, and they say so."""

from __future__ import annotations

from pathlib import Path

import pytest

from absence import python, run_as_main, without

BLOCKED = without("triton")
TINY = (
    "--device cpu --preset demo --henc 2 --hpre 2 --dstc 4 --canvas 16 --digit_size 8 --n_train 6 --n_val 5 "
    "--n_frames 5 --batch_size 3 --epochs 1"
).split()


def test_importing_the_package_is_light() -> None:
    """Neither Triton, nor the machinery of torch.compile, nor what only pictures, data and commands need."""
    heavy = ["triton", "torch._dynamo", "torch._inductor", "matplotlib", "cv2", "sklearn"]
    heavy += ["torchmetrics", "tensorboard", "tyro", "nvtx"]
    code = "import sys, fastjepa\nfor name in fastjepa.__all__:\n    getattr(fastjepa, name)"
    done = python(f"{code}\nprint([name for name in {heavy!r} if name in sys.modules])")
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.packages("safetensors")
def test_the_package_is_imported_where_nothing_can_fork() -> None:
    """Windows has no os.register_at_fork; what others do with it on import has happened before it is taken away."""
    code = "import os, safetensors.torch\ndel os.register_at_fork\nimport fastjepa\nprint('imported')"
    done = python(f"{BLOCKED}{code}")
    assert (done.stdout.strip(), done.returncode) == ("imported", 0), done.stderr


@pytest.mark.packages("matplotlib", "PIL")
def test_every_room_but_the_kernels_is_imported_without_triton() -> None:
    """All modules, except those that are kernels or call them: these end with the one exception that names Triton."""
    code = f"""{BLOCKED}
import importlib, pkgutil, fastjepa
broken = []
for module in pkgutil.walk_packages(fastjepa.__path__, "fastjepa."):
    if module.name.startswith("fastjepa.kernels.") or module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        assert "triton" in str(error), error
        broken.append(module.name)
import fastjepa.kernels.checks
from fastjepa.kernels import batch_norm, frame_windows, moments, projected_losses
from fastjepa.kernels.batch_norm import channel_vectors, reference
from fastjepa.kernels.projected_losses import algebra, chunk_pool, chunks, closed_form, pixel_passes, reference
print(broken)
"""
    done = python(code)
    assert (done.stdout.strip(), done.returncode) == ("['fastjepa.fused.networks']", 0), done.stderr


def test_asking_for_kernels_is_answered_in_one_line() -> None:
    code = f"""{BLOCKED}
import torch, fastjepa
from fastjepa.model.probes import build_probes
from fastjepa.model.step import TrainStep
jepa = fastjepa.build_jepa(dobs=1, henc=2, hpre=2, dstc=4, std_coeff=10.0, cov_coeff=100.0)
video, digit_location = torch.rand(1, 1, 4, 16, 16), torch.zeros(1, 4, 8, 8)
try:
    fastjepa.accelerate(jepa, backend="fused")
except RuntimeError as error:
    print(error)
try:
    TrainStep(jepa, *build_probes(dobs=1, dstc=4), steps=1, projection="fused")(video, digit_location)
except ValueError as error:
    print(error)
fastjepa.accelerate(jepa)
print(*jepa.acceleration.swapped)
print(float(TrainStep(jepa, *build_probes(dobs=1, dstc=4), steps=1)(video, digit_location).total) > 0)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    swap, step, *report, swapped, trained = done.stdout.splitlines()
    assert swap.startswith("fused kernels are not supported here: kernels need Triton, which cannot be imported here")
    assert step.startswith("projection='fused' takes the losses that fastjepa.accelerate")
    assert "regularizer" in " ".join(report)
    assert (swapped, trained) == ("regularizer predcost", "True")


@pytest.mark.packages("tyro", "torchmetrics", "cv2", "sklearn", "matplotlib", "PIL")
def test_training_evaluation_and_pictures(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = run_as_main(BLOCKED, "train.py", *TINY, "--cache_dir", str(tmp_path / "cache"), "--out", str(run))
    assert trained.returncode == 0, trained.stderr
    assert "mAP" in trained.stdout
    evaluated = run_as_main(BLOCKED, "fastjepa.evaluate", "--checkpoint", str(run), "--device", "cpu")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "AP_0" in evaluated.stdout
    rolled_out = run_as_main(BLOCKED, "fastjepa.rollout", "--checkpoint", str(run), "--horizon", "4", "--device", "cpu")
    assert rolled_out.returncode == 0, rolled_out.stderr


@pytest.mark.packages("tyro")
def test_the_flag_that_asks_for_kernels_is_refused_in_one_line(tmp_path: Path) -> None:
    refused = run_as_main(BLOCKED, "train.py", *TINY, "--out", str(tmp_path / "run"), "--backend", "fused")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: --backend fused is not supported here: kernels need Triton")


def test_a_benchmark_measures_what_it_can(tmp_path: Path) -> None:
    done = run_as_main(BLOCKED, "bench", "step", "--quick", "--no-memory", "--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "each thing once" in done.stdout


def test_the_benchmarks_that_need_kernels_say_so_in_one_line() -> None:
    for command in ("audit", "tune"):
        refused = run_as_main(BLOCKED, "bench", command, "--help")
        assert refused.returncode == 2
        (line,) = refused.stderr.splitlines()
        assert line.startswith(f"python -m bench {command} needs Triton, which cannot be imported here")
    counted = run_as_main(BLOCKED, "bench", "saved", "--batch", "1")
    assert counted.returncode == 0, counted.stderr
    lines = {line.split("  ")[1]: line for line in counted.stdout.splitlines()[1:]}
    assert lines["eager, fp32"].endswith(" GB")
    assert "unavailable: kernels need Triton" in lines["fused, bf16"]


def test_tests_of_the_plain_path_run_and_those_of_kernels_are_skipped_with_the_reason() -> None:
    plain = ["golden", "step", "jepa", "losses", "networks", "running_stats", "policy", "projected_losses_closed_form"]
    files = [f"tests/test_{name}.py" for name in (*plain, "moments", "fused_networks")]
    code = f"{BLOCKED}import pytest\nsys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    done = python(code, *files)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()
    assert "passed" in summary[-1]
    assert "failed" not in summary[-1]
    for name in ("moments", "fused_networks"):
        assert any(f"tests/test_{name}.py" in line and "needs Triton" in line for line in summary), done.stdout
