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

# What the first parts measure on a GPU; the peers, and all that is worth less, come at the end.
HEADLINE = (ORIGINAL, "TF32", EAGER_BF16, "fused blocks", GRAPH)
_ROLLOUTS = (
    "eager", "folded convolutions bf16, in one graph", "folded bf16, in one graph", "eager bf16",
    "folded convolutions, in one graph", "fused bf16, in one graph", "fused bf16",
)  # fmt: skip
_OPS = ("eager", "eager bf16", "fused", "fused bf16")
_KERNELS = ("fused", "fused bf16")  # of every op's benchmark
# Tests that run the kernels, besides those marked gpu.
_KERNEL_TESTS = (*OPS, "fused_networks", "accelerate", "recompute", "graphs", "graphed_rollout")
# What training cannot do without, besides torch: its data, its metric, its command line.
_TRAINING = ("cv2", "sklearn", "torchmetrics", "tyro")


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
    make = _Maker(_relative(out), device, quick)
    ceilings = ("--seconds", "0.2", "--no-memory")
    first = [
        make.self_check(),
        make.suite("ceilings", 60, *make.only_on_gpu("--only", "copy", "product"), *ceilings, per_variant=15),
        make.suite("step", 300, "--seconds", "4", variants=HEADLINE, per_variant=120),
        make.suite("checks", 150, "--rounds", "2", "--no-memory", per_variant=45),
        make.suite("rollout", 150, "--batch", *make.sizes("1", "64"), "--horizon", "8", "--seconds", "0.5",
                   variants=_ROLLOUTS),
        make.suite("convolution", 150, *make.only_on_gpu("--batch", "1", "64", "--only", "predictor"),
                   "--seconds", "0.1", variants=_OPS),
        make.suite("projected_losses", 150, *make.only_on_gpu("--batch", "64"), "--seconds", "1", variants=_OPS),
        make.suite("moments", 150, "--seconds", "0.5", variants=_OPS),
        make.suite("frame_windows", 150, "--seconds", "0.5", variants=_OPS),
        make.suite("layers", 180, "--seconds", "0.5", variants=_OPS),
        make.training(),
        make.suite("ceilings", 90, *ceilings, name="ceilings of convolutions", per_variant=30),
        *(make.sanitized(op) for op in OPS),
        make.ncu(),
        make.tests("tests marked gpu", "gpu"),
        make.tests("kernel tests", "not gpu", *_KERNEL_TESTS),
        make.suite("eval", 150, "--seconds", "3", unavailable=_not_installed("torchmetrics")),
    ]  # fmt: skip
    peers = [
        make.peers("step", 1000, "--seconds", "4", per_variant=400),
        make.peers("rollout", 600, "--batch", "1", "64", "--horizon", "1", "8", "50", "--seconds", "0.5"),
        make.peers("convolution", 600, "--seconds", "0.2"),
        make.peers("projected_losses", 600, "--batch", "64", "--seconds", "1"),
        make.peers("moments", 400, "--seconds", "0.5"),
        make.peers("layers", 1000, "--seconds", "0.5"),
        make.suite("tune", 600, per_variant=45, unavailable=make.no_gpu),
    ]
    report = Part("report", [sys.executable, "-m", "bench", "report", make.folder], 60, again=True)
    return [*first, *peers, report]


class _Maker:
    """Makes the parts for one device: full sizes, or, for a smoke run, small ones."""

    def __init__(self, folder: str, device: torch.device, quick: bool) -> None:
        self.folder, self.device, self.quick = folder, device, quick
        self.on_gpu = device.type == "cuda"
        self.no_gpu = None if self.on_gpu else "needs a CUDA device"
        self.bench = [sys.executable, "-m", "bench"]
        self.compiled = {"TRITON_INTERPRET": "0"}

    def only_on_gpu(self, *words: str) -> tuple[str, ...]:
        """A CPU takes the suite's own choice."""
        return words if self.on_gpu else ()

    def sizes(self, *batches: str) -> tuple[str, ...]:
        """All on a GPU, the first on a CPU."""
        return batches if self.on_gpu else batches[:1]

    def suite(
        self, command: str, seconds: float, *arguments: str, name: str = "", variants: Sequence[str] = (),
        per_variant: float = 60.0, unavailable: str | None = None,
    ) -> Part:  # fmt: skip
        """A suite; on a GPU only those variants of it, while a CPU has others, all of which are quick enough."""
        chosen = ["--variant", *variants] if variants and self.on_gpu else []
        # Memory on a CPU takes a process for each variant: in a smoke run the step's are enough.
        small = ["--quick", *([] if command == "step" else ["--no-memory"])]
        words = [*self.bench, command, "--device", self.device.type, *(small if self.quick else [*arguments, *chosen])]
        words += ["--out", self.folder, "--missing", "--keep", f"{self.folder}/kept"]
        # On a CPU nothing hangs a device, and a busy machine takes several times as long.
        patience = 1 if self.on_gpu else 4
        return Part(name or command, words, patience * seconds, command, patience * per_variant, unavailable)

    def peers(self, command: str, seconds: float, *arguments: str, per_variant: float = 150.0) -> Part:
        """The variants of a suite that no earlier part has measured: torch.compile, mostly, which takes its time."""
        name = f"{command}, all variants"
        return self.suite(
            command, seconds, *arguments, name=name, per_variant=per_variant, unavailable=self.no_gpu
        )  # fmt: skip

    def training(self) -> Part:
        """Two minutes of training at the fastest, with its mAP."""
        flags = ["--quick", "--", "--device", self.device.type]
        if not self.quick:
            fast = ["--precision", "bf16", *self.only_on_gpu("--backend", "fused", "--cuda_graph", "on")]
            flags = ["--seconds", "120", "--", "--device", self.device.type, *fast]
        command = [*self.bench, "train", "--out", self.folder, *flags]
        return Part("train", command, 240 if self.on_gpu else 600, unavailable=_not_installed(*_TRAINING))

    def self_check(self) -> Part:
        """What `auto` finds out before its first fused run here."""
        command = [sys.executable, "-m", "bench", "self_check", "--out", self.folder]
        return Part("self-check", command, 150, unavailable=self.no_gpu)

    def sanitized(self, op: str) -> Part:
        """The kernels of an op at small sizes, with every access to memory checked."""
        command = [*self.bench, op, "--quick", "--no-memory", "--rounds", "1", "--device", "cuda"]
        return Part(
            f"compute-sanitizer {op}",
            ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", *command, "--variant", *_KERNELS],
            150, unavailable=self.no_gpu or missing_program("compute-sanitizer"),
            variables=self.compiled | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )  # fmt: skip

    def ncu(self) -> Part:
        """The five kernels that take the most time, with Nsight Compute."""
        command = ["bash", "bench/profile/ncu.sh", f"{self.folder}/ncu"]
        unavailable = self.no_gpu or missing_program("ncu")
        return Part("ncu", command, 120, variables={"PYTHON_GPU": sys.executable}, unavailable=unavailable)

    def tests(self, name: str, marker: str, *stems: str) -> Part:
        """Tests that run compiled kernels."""
        # Compiling some 350 kernels is work for several processes; each failure is printed at once, and the time ends
        # the run with SIGINT, at which pytest prints the rest.
        parallel = [] if missing_packages("xdist") else ["-n", "8"]
        files = [str(_test_file(stem).relative_to(ROOT)) for stem in stems]
        return Part(
            name, [sys.executable, "-m", "pytest", "-q", "--tb=short", *parallel, "-m", marker, *files], 180,
            unavailable=self.no_gpu or _not_installed("pytest"), variables=self.compiled,
        )  # fmt: skip


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
