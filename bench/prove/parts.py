"""The parts of a proof, the most valuable first: what each runs, how long it may take, and what it needs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.recipe import GRAPH
from bench.step import EAGER_BF16, ORIGINAL
from fastjepa.environment import ROOT
from fastjepa.kernels import OPS
from fastjepa.optional_packages import missing_packages

HEADLINE = (ORIGINAL, "TF32", EAGER_BF16, "fused blocks", GRAPH)
# Tests that run the kernels, besides those marked gpu.
_KERNEL_TESTS = (*OPS, "fused_networks", "accelerate", "graphs", "graphed_rollout")
# What training takes besides torch: its data, its metric, its command line, its progress bar, its export.
_TRAINING = ("cv2", "sklearn", "torchmetrics", "tyro", "tqdm", "safetensors")


@dataclass(frozen=True)
class Part:
    """One part of a proof.

    Attributes:
        name: in reports and of its log.
        command: what runs.
        seconds: how long it may take in one call.
        suite: its rows are in <suite>.jsonl, written variant by variant; a variant that crashes or hangs costs itself.
            None for a command that succeeds or not.
        variant_seconds: how long one variant of a suite may take, compilation included.
        unavailable: why it cannot run here, or None.
        variables: added to the environment.
        again: it is done again in every call, because it reads what the others have left.
    """

    name: str
    command: Sequence[str]
    seconds: float
    suite: str | None = None
    variant_seconds: float = 60.0
    unavailable: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    again: bool = False


def parts(out: Path, device: torch.device, quick: bool) -> list[Part]:
    """All parts, in order. On a GPU each row that is worth most comes before all that are worth less."""
    gpu = device.type == "cuda"
    no_gpu = None if gpu else "needs a CUDA device"
    python, folder = sys.executable, _relative(out)
    compiled = {"TRITON_INTERPRET": "0"}

    def suite(
        name: str, command: str, seconds: float, *arguments: str, per_variant: float = 60.0, reason: str | None = None
    ) -> Part:
        # Memory on a CPU takes a process for each variant: in a smoke run the step's are enough.
        small = ["--quick", *([] if command == "step" else ["--no-memory"])] if quick else list(arguments)
        words = [python, "-m", "bench", command, "--device", device.type, *small, "--out", folder, "--missing"]
        words += ["--keep", f"{folder}/kept"]
        return Part(name, words, seconds, _SUITE_NAMES.get(command, command), per_variant, reason)

    def variants(*names: str) -> list[str]:
        return ["--variant", *names]

    def tests(name: str, marker: str, *stems: str) -> Part:
        # Compiling some 350 kernels is work for several processes; each failure is printed at once, and the time ends
        # the run with SIGINT, at which pytest prints the rest.
        parallel = [] if missing_packages("xdist") else ["-n", "8"]
        files = [str(_test_file(stem).relative_to(ROOT)) for stem in stems]
        return Part(
            name, [python, "-m", "pytest", "-q", "--tb=short", *parallel, "-m", marker, *files], 150,
            unavailable=no_gpu or _not_installed("pytest"), variables=compiled,
        )  # fmt: skip

    def sanitized(op: str) -> Part:
        command = [python, "-m", "bench", op, "--quick", "--no-memory", "--rounds", "1", "--device", "cuda"]
        return Part(
            f"compute-sanitizer {op}",
            ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", *command, *variants(*_kernels_of(op))],
            60, unavailable=no_gpu or missing_program("compute-sanitizer"),
            variables=compiled | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )  # fmt: skip

    training = ["--quick", "--", "--device", device.type]
    if not quick:
        fast = ["--precision", "bf16", *(["--backend", "fused", "--cuda_graph", "on"] if gpu else [])]
        training = ["--seconds", "120", "--", "--device", device.type, *fast]
    fast_rollouts = ("eager", "fused bf16, in one graph", "folded bf16, in one graph", "eager bf16", "fused bf16")
    return [
        suite("ceilings", "ceilings", 90, "--seconds", "0.2", "--no-memory", per_variant=30),
        # A CPU has other variants, all of which are quick enough.
        suite("step", "step", 240, "--seconds", "4", *(variants(*HEADLINE) if gpu else ()), per_variant=150),
        suite("checks", "checks", 150, "--rounds", "2", "--no-memory", per_variant=45),
        suite("rollout", "rollout", 120, "--batch", *(("1", "64") if gpu else ("1",)), "--horizon", "8",
              "--seconds", "0.5", *(variants(*fast_rollouts) if gpu else ())),
        suite("projected_losses", "projected_losses", 90, *(["--batch", "64"] if gpu else []), "--seconds", "1",
              *(variants("eager", "eager bf16", "fused", "fused bf16", "closed form", "closed form bf16")
                if gpu else ()), per_variant=45),
        suite("moments", "moments", 45, "--seconds", "0.5", per_variant=45),
        suite("layers", "layers", 150, "--seconds", "0.5"),
        Part("train", [python, "-m", "bench", "train", "--out", folder, *training], 240 if gpu or quick else 600,
             unavailable=_not_installed(*_TRAINING)),
        *(sanitized(op) for op in OPS),
        Part("ncu", ["bash", "bench/profile/ncu.sh", f"{folder}/ncu"], 90, variables={"PYTHON_GPU": python},
             unavailable=no_gpu or missing_program("ncu")),
        tests("tests marked gpu", "gpu"),
        tests("kernel tests", "not gpu", *_KERNEL_TESTS),
        suite("eval", "eval", 90, "--seconds", "3", reason=_not_installed("torchmetrics")),
        suite("step, all variants", "step", 900, "--seconds", "4", per_variant=400, reason=no_gpu),
        suite("rollout, all variants", "rollout", 400, "--horizon", "1", "8", "50", "--seconds", "0.5",
              per_variant=120, reason=no_gpu),
        suite("projected_losses, all variants", "projected_losses", 300, "--batch", "64", "--seconds", "1",
              per_variant=120, reason=no_gpu),
        suite("tune", "tune", 300, per_variant=45, reason=no_gpu),
        Part("report", [python, "-m", "bench", "report", folder], 60, again=True),
    ]  # fmt: skip


_SUITE_NAMES = {"losses": "projected_losses"}


def _kernels_of(op: str) -> tuple[str, str]:
    """The names of the kernels' variants in the benchmark of an op."""
    return "fused", "fused bf16"


def _not_installed(*modules: str) -> str | None:
    """Which of the packages of these modules are not installed, in words; None if all are."""
    missing = missing_packages(*modules)
    return f"not installed: {', '.join(missing)}" if missing else None


def missing_program(name: str) -> str | None:
    """The same for a program."""
    return None if shutil.which(name) else f"{name} is not installed"


def _test_file(stem: str) -> Path:
    """The test of that name. Raises FileNotFoundError if there is none: a check that is left out proves nothing."""
    path = ROOT / "tests" / f"test_{stem}.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is to be proved, but there is no such file")
    return path


def _relative(path: Path) -> str:
    """From the root of the checkout where it lies inside, so that commands in rows name nobody's folders."""
    return os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else str(path)
