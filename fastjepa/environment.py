"""What a result was made with: code, versions, device and its state. Saved beside every run and every measurement."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent  # of the checkout; where fastjepa is installed there is none
PACKAGES = ("fastjepa", "torch", "triton", "numpy", "torchmetrics", "opencv-python-headless", "scikit-learn")


@dataclass(frozen=True)
class Environment:
    """What a measurement depends on and its row must say; collected once per command, before it measures."""

    command: str
    commit: str  # "unknown" outside a git checkout
    dirty: bool | None  # tracked or untracked changes outside bench/results; None outside a git checkout
    date: str  # UTC, ISO 8601
    device: str
    driver: str  # "" without an NVIDIA driver
    threads: int  # that torch uses on the CPU
    versions: dict[str, str]


def collect(command: list[str], device: torch.device) -> Environment:
    """The environment of this process, about to measure on `device`; `command` is what the user typed, as words."""
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton") or _version("pytorch-triton") or _version("pytorch-triton-rocm"),
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version() or "") if device.type == "cuda" else "",
    }
    commit, dirty = _code(untracked=True)
    return Environment(
        command=shlex.join(command),
        commit=commit or "unknown",
        dirty=dirty,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        device=device_name(device),
        driver=_query_gpu(device, "driver_version") or "",
        threads=torch.get_num_threads(),
        versions={name: version for name, version in versions.items() if version},
    )


def run_environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, processor and commit of a training run, as plain values for its environment.json.

    The commit has "+changes" if tracked files differ from it: data and runs may lie in the checkout untracked.
    """
    commit, dirty = _code(untracked=False)
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": commit and commit + ("+changes" if dirty else ""),
        "device": device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def driver_version(device: torch.device) -> str:
    """Of the NVIDIA driver, "" without one; quick where the kernel tells it."""
    if device.type != "cuda":
        return ""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return _query_gpu(device, "driver_version") or ""


def machine_key(device: torch.device, *more: object) -> str:
    """32 hexadecimal digits that stand for the GPU, its driver, torch, Triton, the sources, and what else is given."""
    parts = (device_name(device), driver_version(device), torch.__version__, _version("triton"), sources_hash(), *more)
    return hashlib.blake2b(json.dumps([str(part) for part in parts]).encode(), digest_size=16).hexdigest()


@functools.cache
def sources_hash() -> str:
    """12 hexadecimal digits of the code that computes, the same in a checkout and where it is installed."""
    package, digest = Path(__file__).resolve().parent, hashlib.blake2b(digest_size=6)
    for room in ("kernels", "model", "fused", "graphs"):
        # A checkout without links has kernels/ beside the package.
        folder = next(folder for folder in (package / room, package.parent / room) if folder.is_dir())
        for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
            digest.update(f"{room}/{path.relative_to(folder).as_posix()}\n".encode())
            digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def clocks_mhz(device: torch.device) -> tuple[int | None, int | None]:
    """(SM clock, memory clock) of a GPU now; None where nvidia-smi does not say. Call it right after the work."""
    values = (_query_gpu(device, "clocks.sm,clocks.mem") or "").split(",")
    sm, memory = (int(v) if v.strip().isdigit() else None for v in (*values, "", "")[:2])
    return sm, memory


def _code(*, untracked: bool) -> tuple[str | None, bool | None]:
    """(commit, whether tracked files, or `untracked` ones too, differ from it) of this checkout; None outside one."""
    if not (ROOT / ".git").exists():  # git would look further up, and find somebody else's
        return None, None
    git = ["git", "-C", str(ROOT)]
    # Rows that are being written do not change what is measured.
    files = f"--untracked-files={'normal' if untracked else 'no'}"
    changes = _output([*git, "status", "--porcelain", files, "--", ".", ":!bench/results"])
    return _output([*git, "rev-parse", "HEAD"]), None if changes is None else changes != ""


def _query_gpu(device: torch.device, fields: str) -> str | None:
    """nvidia-smi's answer about this GPU, whatever CUDA_VISIBLE_DEVICES calls it; read only."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--id={uuid}"])


def _output(command: list[str]) -> str | None:
    """What a command prints, stripped, or None if it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
