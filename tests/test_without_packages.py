"""With torch, numpy and Triton alone models train and benchmarks run; what needs another package names it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from absence import python, run_as_main, without
from fastjepa.moving_mnist import load_clips
from fastjepa.optional_packages import (
    MissingPackageError,
    install_command,
    missing_packages,
    needed_for,
    require_packages,
)
from fastjepa.storage.run_folder import CHECKPOINT_NAME

OPTIONAL = (
    "cv2", "sklearn", "matplotlib", "PIL", "tyro", "tensorboard", "torchmetrics", "nvtx", "safetensors",
    "tqdm", "scipy", "hypothesis", "submitit",
)  # fmt: skip
BARE = without(*OPTIONAL)
TINY = (
    "--device cpu --preset demo --henc 2 --hpre 2 --dstc 4 --canvas 16 --digit_size 8 --n_train 6 --n_val 5 "
    "--n_frames 5 --batch_size 3 --epochs 1"
).split()


def test_everything_but_pictures_is_imported_and_a_model_trains() -> None:
    code = f"""{BARE}
import importlib, pkgutil, bench, fastjepa, train
from fastjepa.optional_packages import MissingPackageError
broken = []
for package in (fastjepa, bench):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name.endswith("__main__") or module.name == "bench.test_benchmarks":
            continue
        try:
            importlib.import_module(module.name)
        except MissingPackageError as error:
            assert str(error) == "drawing needs the Python package matplotlib, which is not installed; " \\
                {install_command(["matplotlib"])!r}, error
            broken.append(module.name)
print(*broken)
import torch
from fastjepa.model.probes import build_probes
from fastjepa.model.step import TrainStep, build_optimizer
from fastjepa.moving_mnist import ClipSet
jepa = fastjepa.build_jepa(dobs=1, henc=2, hpre=2, dstc=4, std_coeff=10.0, cov_coeff=100.0)
fastjepa.accelerate(jepa, verbose=False)
model = (jepa, *build_probes(dobs=1, dstc=4))
clips = ClipSet(torch.ones(3, 5, 16, 16, dtype=torch.uint8), torch.ones(3, 5, 8, 8, dtype=torch.uint8))
step = TrainStep(*model, build_optimizer(*model, lr=1e-3), steps=2)
print(bool(step(*clips.batch(torch.arange(2))).total.isfinite()))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    broken, trained = done.stdout.splitlines()
    pictures = [f"fastjepa.figures.{name}" for name in ("curves", "horizon", "rollouts", "runs", "style", "sweeps")]
    assert broken.split() == [
        *pictures,
        *(f"fastjepa.sweeping.{name}" for name in ("carry_out", "report")),
        "bench.report.figures",
    ]
    assert trained == "True"


def test_what_needs_a_package_names_it() -> None:
    code = f"""{BARE}
import numpy as np, torch, fastjepa
from pathlib import Path
from fastjepa.config import preset_config
from fastjepa.moving_mnist import digit_maps, embedded_digits, generate_clips
from fastjepa.optional_packages import MissingPackageError
from fastjepa.rollout import Options, roll_out
from fastjepa.storage.export import export_pretrained
from fastjepa.training.evaluation import average_precision
from fastjepa.training.trainer import Trainer
from bench import __main__ as bench
import tempfile
folder = Path(tempfile.mkdtemp())
jepa = fastjepa.build_jepa(dobs=1, henc=2, hpre=2, dstc=4, std_coeff=10.0, cov_coeff=100.0)
images = np.ones((2, 9, 9), np.uint8)
calls = [
    embedded_digits,
    lambda: generate_clips(images, 1, canvas=16, digit_size=8, seed=0),
    lambda: digit_maps(images),
    lambda: export_pretrained(jepa, {{}}, folder / "export"),
    lambda: average_precision(torch.ones(2), torch.ones(2)),
    lambda: Trainer(preset_config("demo")),
    lambda: roll_out(Options(folder)),
]
for call in calls:
    try:
        call()
    except MissingPackageError as error:
        print(error)
print(sorted(path.name for path in folder.iterdir()))
sys.stderr = sys.stdout
print(bench.main(["eval", "--quick"]), bench.main(["step", "--eval"]))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    *errors, left, eval_error, step_error, statuses = done.stdout.splitlines()
    assert errors == [
        f"{what} needs the Python package {package}, which is not installed; {install_command([package])}"
        for what, package in (
            ("making the embedded digits", "opencv-python-headless"),
            ("resizing digits", "opencv-python-headless"),
            ("finding the digits of a frame", "opencv-python-headless"),
            ("exporting weights", "safetensors"),
            ("evaluation", "torchmetrics"),
            ("evaluation", "torchmetrics"),
            ("drawing", "matplotlib"),
        )
    ]
    assert left == "[]"
    for command, line in (("eval", eval_error), ("step", step_error)):
        assert line.startswith(f"python -m bench {command}: the evaluation needs the Python package torchmetrics")
    assert statuses == "2 2"


def test_a_benchmark_runs(tmp_path: Path) -> None:
    flags = ("--quick", "--no-memory", "--device", "cpu", "--variant", "original", "--out", str(tmp_path))
    done = run_as_main(BARE, "bench", "step", *flags)
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, (tmp_path / "step.jsonl").read_text().splitlines())
    assert (row["variant"], row["status"]) == ("original", "exact")
    reported = run_as_main(BARE, "bench", "report", str(tmp_path))
    assert reported.returncode == 0, reported.stderr
    assert "pictures are left out, because of what is not installed: matplotlib, pillow" in reported.stderr
    page = (tmp_path / "report.md").read_text()
    assert "| original |" in page
    assert "![" not in page


@pytest.mark.parametrize("command", ["train.py", "fastjepa.rollout"])
def test_a_command_without_tyro_says_so_in_one_line(command: str) -> None:
    done = run_as_main(without("tyro"), command, "--help")
    assert (done.returncode, done.stdout) == (2, "")
    expected = "error: the command line needs the Python package tyro, which is not installed; "
    assert done.stderr == f"{expected}{install_command(['tyro'])}\n"


@pytest.mark.packages("tyro", "torchmetrics", "cv2", "sklearn")
def test_training_leaves_out_what_it_cannot_make_and_says_so_at_the_start(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*TINY, "--cache_dir", str(tmp_path / "cache"), "--out", str(run)]
    blocker = without("tensorboard", "matplotlib", "PIL", "safetensors", "tqdm")
    done = run_as_main(blocker, "train.py", *flags)
    assert done.returncode == 0, done.stderr
    first = [line for line in done.stderr.splitlines() if line.startswith("left out")]
    assert done.stderr.splitlines()[: len(first)] == first
    assert first == [
        f"left out: {what}, because of what is not installed: {', '.join(packages)}; {install_command(packages)}"
        for what, packages in (
            ("TensorBoard events", ["tensorboard", "pillow"]),
            ("the progress bar", ["tqdm"]),
            ("pictures", ["matplotlib", "pillow"]),
            ("exported weights", ["safetensors"]),
        )
    ]
    listed = {Path(line.strip()) for line in done.stdout.partition("wrote:\n")[2].splitlines()}
    made = {"config.json", "environment.json", "metrics.csv", CHECKPOINT_NAME}
    assert listed == {run / name for name in made}
    assert {path.name for path in run.iterdir()} == made | {"rollout.npz"}
    (header, row) = (run / "metrics.csv").read_text().splitlines()
    assert float(dict(zip(header.split(","), row.split(","), strict=True))["map"]) > 0
    assert "step 2: mAP" in done.stdout


@pytest.mark.packages("tyro", "torchmetrics", "cv2", "sklearn")
def test_the_second_run_needs_no_package_that_made_the_data(tmp_path: Path) -> None:
    flags = [*TINY, "--cache_dir", str(tmp_path / "cache"), "--out"]
    blocker = without("cv2", "sklearn", "tensorboard", "matplotlib", "PIL", "safetensors")
    first = run_as_main(blocker, "train.py", *flags, str(tmp_path / "first"))
    assert (first.returncode, first.stderr.splitlines()[-1]) == (
        2,
        "error: making the embedded digits needs the Python package opencv-python-headless, which is not installed; "
        + install_command(["opencv-python-headless"]),
    )
    load_clips(cache_dir=tmp_path / "cache", n_train=6, n_val=5, n_frames=5, canvas=16, digit_size=8, seed=2025)
    second = run_as_main(blocker, "train.py", *flags, str(tmp_path / "second"))
    assert second.returncode == 0, second.stderr


def test_the_helpers_name_what_pip_installs() -> None:
    assert missing_packages("torch", "no_such_package", "numpy") == ["no_such_package"]
    require_packages("training", "torch", "numpy")
    with pytest.raises(
        MissingPackageError,
        match=r"^training needs the Python packages no_such_a, no_such_b, which are not installed; pip install "
        r"no_such_a no_such_b$",
    ):
        require_packages("training", "no_such_a", "numpy", "no_such_b")


@pytest.mark.parametrize(
    ("packages", "installed", "command"),
    [
        (["pillow"], True, "pip install 'fastjepa[figures]'"),
        (["tensorboard", "pillow"], True, "pip install 'fastjepa[train]'"),
        (["tensorboard", "pillow"], False, "pip install tensorboard pillow"),
        (["numpy", "tyro"], True, "pip install numpy tyro"),
    ],
)
def test_what_to_type_names_an_extra_where_fastjepa_is_installed(
    packages: list[str], installed: bool, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> object:
        if not installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return object()

    monkeypatch.setattr(importlib.metadata, "distribution", find)
    assert install_command(packages) == command


def test_an_error_inside_a_package_is_not_taken_for_its_absence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fastjepa_broken_package.py").write_text("import torch.no_such_part")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"torch\.no_such_part") as raised, needed_for("this test"):
        import fastjepa_broken_package  # noqa: F401
    assert not isinstance(raised.value, MissingPackageError)
    with pytest.raises(MissingPackageError, match=r"^this test needs the Python package no_such_package"):  # noqa: SIM117
        with needed_for("this test"):
            import no_such_package.part  # noqa: F401
