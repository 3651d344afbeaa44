"""What a measurement depends on and its rows must say: the code, the versions, the device and its state."""

from __future__ import annotations

import datetime
import platform
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Environment:
    """Collected once per run; the fields are those of `bench.harness.rows.Row` of the same names."""

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
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    changes = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!bench/results"])
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or "") if device.type == "cuda" else "",
    }
    return Environment(
        command=shlex.join(command),
        commit=commit or "unknown",
        dirty=None if changes is None else changes != "",
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        driver=_query_gpu(device, "driver_version") or "",
        threads=torch.get_num_threads(),
        versions={name: version for name, version in versions.items() if version},
    )


def clocks_mhz(device: torch.device) -> tuple[int | None, int | None]:
    """(SM clock, memory clock) of a GPU now; None where nvidia-smi does not say. Call it right after the work."""
    values = (_query_gpu(device, "clocks.sm,clocks.mem") or "").split(",")
    sm, memory = (int(v) if v.strip().isdigit() else None for v in (*values, "", "")[:2])
    return sm, memory


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


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
