"""`python -m bench prove`: everything that can be shown on this machine, in one command and one folder.

Parts run one after another, each in a process of its own and for a bounded time; what a part prints is in logs/. A part
that has passed is not repeated when the command is given again with the same folder, so a run that was cut short goes
on. On a CPU the parts that need a GPU are skipped, with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.harness import suite
from bench.harness.rows import format_table, write_text
from bench.report.page import collect as collect_rows
from fastjepa.environment import ROOT, collect
from fastjepa.kernels import OPS

PASSED, FAILED, OUT_OF_TIME, SKIPPED, PENDING = "passed", "failed", "out of time", "skipped", "not started"
# Tests that run the kernels, besides those marked gpu.
_KERNEL_TESTS = (*OPS, "fused_networks", "accelerate", "graphs", "graphed_rollout")


@dataclass(frozen=True)
class Part:
    """One part: its command, the seconds that it may take, and why it cannot run here, if it cannot."""

    name: str
    command: Sequence[str]
    seconds: float
    unavailable: str | None = None
    variables: dict[str, str] = field(default_factory=dict)  # added to the environment


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    status: str
    seconds: float = 0.0
    note: str = ""


def parts(out: Path, device: torch.device, quick: bool) -> list[Part]:
    """All parts, in order. The seconds are limits; on an H200 the whole must end within nine minutes."""
    gpu = device.type == "cuda"
    no_gpu = None if gpu else "needs a CUDA device"
    python = sys.executable
    compiled = {"TRITON_INTERPRET": "0"}

    def measured(name: str, seconds: float, *arguments: str, reason: str | None = None) -> Part:
        # Memory on a CPU takes a process for each variant: in a smoke run the step's are enough.
        small = (
            ["--quick", *([] if name in ("projected_losses", "step") else ["--no-memory"])]
            if quick
            else list(arguments)
        )
        command = [python, "-m", "bench", name, "--device", device.type, *small, "--out", str(out)]
        return Part(name, command, seconds, reason)

    no_tests = no_gpu or _missing_package("pytest") or _missing_package("hypothesis")
    tests = [str(_test_file(name)) for name in _KERNEL_TESTS]
    sanitizer = [
        python,
        "-m",
        "bench",
        "projected_losses",
        "--quick",
        "--device",
        "cuda",
        "--variant",
        "fused",
        "fused bf16",
    ]
    training = (
        ["--quick", "--", "--device", device.type] if quick else ["--seconds", "120", "--", "--precision", "bf16"]
    )
    return [
        Part("tests marked gpu", [python, "-m", "pytest", "-q", "-m", "gpu"], 60, no_tests, compiled),
        Part("op tests", [python, "-m", "pytest", "-q", "-m", "not gpu", *tests], 60, no_tests, compiled),
        Part(
            "compute-sanitizer",
            ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1", *sanitizer],
            40, no_gpu or _missing("compute-sanitizer"), compiled | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
        measured("tune", 40, reason=no_gpu),
        measured("projected_losses", 60 if quick else 40, *(["--batch", "64"] if gpu else [])),
        measured("moments", 20, "--seconds", "1"),
        measured("layers", 60, "--only", "encoder", "predictor", "576x32x64x64", "--seconds", "1"),
        measured("rollout", 50, "--horizon", "1", "8", "50", "--seconds", "0.5"),
        measured("step", 100, "--seconds", "10"),
        measured("eval", 60 if quick else 25, "--seconds", "3"),
        Part("train", [python, "-m", "bench", "train", "--out", str(out), *training], 165),
        Part(
            "ncu", ["bash", "bench/profile/ncu.sh", str(out / "ncu")], 40, no_gpu or _missing("ncu"),
            {"PYTHON_GPU": python},
        ),
        Part("report", [python, "-m", "bench", "report", str(out)], 30),
    ]  # fmt: skip


def _test_file(stem: str) -> Path:
    """The test of that name. Raises FileNotFoundError if there is none: a check that is left out proves nothing."""
    path = ROOT / "tests" / f"test_{stem}.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is to be proved, but there is no such file")
    return path


def _missing(program: str) -> str | None:
    return None if shutil.which(program) else f"{program} is not installed"


def _missing_package(name: str) -> str | None:
    return None if importlib.util.find_spec(name) else f"the Python package {name} is not installed"


def run_part(part: Part, limit: float, log: Path) -> Outcome:
    """Run one part for at most `limit` seconds, with what it prints in `log`."""
    if part.unavailable is not None:
        return Outcome(SKIPPED, note=part.unavailable)
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    environment = {**os.environ, **part.variables}
    with log.open("w", encoding="utf-8") as file:
        file.write(f"$ {' '.join(part.command)}\n")
        file.flush()
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=limit)
        except BaseException as error:
            _end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise  # Ctrl-C: nothing is left running
            return Outcome(OUT_OF_TIME, time.monotonic() - started, f"ended after {limit:.0f} s; see {log.name}")
    seconds = time.monotonic() - started
    if status:
        return Outcome(FAILED, seconds, f"exit status {status}; see {log.name}")
    return Outcome(PASSED, seconds)


def _end(process: subprocess.Popen[Any]) -> None:
    """End a part with all processes that it has started: they are a session of their own."""
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            pass
        return


class Proof:
    """The folder of one proof: what each part came to, in prove.json, written after each."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.path = out / "prove.json"
        self.settings = settings
        self.outcomes: dict[str, Outcome] = {}
        if self.path.exists():
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            if saved["settings"] != settings:
                raise ValueError(
                    f"{out} was begun with {saved['settings']}, this is {settings}; choose another --out to start anew"
                )
            self.outcomes = {name: Outcome(**outcome) for name, outcome in saved["parts"].items()}

    def passed(self, name: str) -> bool:
        """Whether this part has passed, now or in an earlier call."""
        return name in self.outcomes and self.outcomes[name].status == PASSED

    def note(self, name: str, outcome: Outcome) -> None:
        """Keep what a part came to."""
        self.outcomes[name] = outcome
        saved = {"settings": self.settings, "parts": {name: asdict(o) for name, o in self.outcomes.items()}}
        write_text(self.path, json.dumps(saved, indent=1) + "\n")


def prove(
    proof: Proof, every: Sequence[Part], seconds: float, logs: Path, say: Callable[[str], None] = print
) -> dict[str, Outcome]:
    """Run the parts that have not passed, within `seconds` in all; what each came to."""
    started = time.monotonic()
    for part in every:
        if proof.passed(part.name) and part.name != "report":  # the page is drawn again from what is there now
            say(f"{part.name}: passed before")
            continue
        left = seconds - (time.monotonic() - started)
        if left < 5 and part.unavailable is None:
            proof.note(part.name, Outcome(PENDING, note="the time is over; the same command goes on"))
            continue
        outcome = run_part(part, min(part.seconds, left), logs / f"{part.name.replace(' ', '-')}.log")
        proof.note(part.name, outcome)
        say(f"{part.name}: {outcome.status} ({outcome.seconds:.0f} s) {outcome.note}")
    return {part.name: proof.outcomes[part.name] for part in every}


def render(outcomes: dict[str, Outcome]) -> str:
    """What each part came to, as a table."""
    rows = [[name, o.status, f"{o.seconds:.0f}", o.note] for name, o in outcomes.items()]
    return format_table(["part", "status", "s", "note"], rows)


def render_speedups(out: Path) -> str:
    """The variants of each suite that have a speed-up over its baseline, or a mAP."""
    rows = [row for row in collect_rows(out) if row.suite not in ("tune",) and row.median_ms is not None]
    body = [
        [
            row.suite, row.case, row.variant, row.phase, f"{row.median_ms:.4g}",
            f"{row.speedup:.2f}x" if row.speedup is not None else f"{row.quality['mAP']:.3f} mAP",
        ]
        for row in rows
        if (row.speedup is not None and row.variant != row.baseline) or "mAP" in row.quality
    ]  # fmt: skip
    return format_table(["suite", "case", "variant", "phase", "ms", "gain"], body) if body else ""


def main(argv: Sequence[str]) -> int:
    """The command line; returns 0 if every part that can run here has passed."""
    parser = argparse.ArgumentParser(prog="python -m bench prove", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results/<device>-<date>")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small and short")
    parser.add_argument("--seconds", type=float, default=530.0, help="in all (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.seconds <= 0:
        parser.error(f"--seconds must be more than 0, got {args.seconds}")
    device = suite.device_of(args, parser)
    environment = collect(["python", "-m", "bench", "prove", *argv], device)
    slug = "-".join("".join(c if c.isalnum() else " " for c in environment.device.lower()).split())
    out = (args.out or ROOT / "bench" / "results" / f"{slug}-{datetime.date.today()}").resolve()
    try:
        proof = Proof(out, {"device": environment.device, "quick": args.quick})
    except (ValueError, KeyError, TypeError) as error:
        parser.error(f"{out / 'prove.json'}: {error}")
    try:
        every = parts(out, device, args.quick)
    except FileNotFoundError as error:
        parser.error(str(error))
    write_text(out / "environment.json", json.dumps(asdict(environment), indent=1) + "\n")
    outcomes = prove(proof, every, args.seconds, out / "logs", say=lambda text: print(text, flush=True))
    speedups = render_speedups(out)
    print(f"\n{speedups}\n\n{render(outcomes)}\n\nrows, logs and environment: {out}")
    return 0 if all(outcome.status in (PASSED, SKIPPED) for outcome in outcomes.values()) else 1
