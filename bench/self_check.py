"""The self-check that `auto` makes before its first fused run on a GPU, at the recipe's widths, in each precision."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from fastjepa.config import Config, resolve_device
from fastjepa.execution import RunPrecision
from fastjepa.fused.auto import Widths, fused_problem
from fastjepa.kernels.checks import unavailable_reason


def main(argv: Sequence[str]) -> int:
    """The command line; not 0 if a precision is not exact, or kernels cannot run."""
    recipe = Config()
    parser = argparse.ArgumentParser(prog="python -m bench self_check", description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", nargs="+", default=get_args(RunPrecision), choices=get_args(RunPrecision))
    parser.add_argument("--widths", type=int, nargs=3, default=(recipe.henc, recipe.hpre, recipe.dstc))
    parser.add_argument("--out", type=Path, help="folder for self_check.json")
    options = parser.parse_args(argv)
    device = resolve_device(options.device)
    if (reason := unavailable_reason(device)) is not None:
        print(f"unavailable: {reason}")
        return 1
    henc, hpre, dstc = options.widths
    found = {}
    for precision in options.precision:
        started = time.perf_counter()
        problem = fused_problem(device, precision, Widths(1, henc, hpre, dstc, f"{dstc}-64-64"))
        found[precision] = {"problem": problem, "seconds": round(time.perf_counter() - started, 1)}
        print(f"{precision}: {problem or 'exact'} ({found[precision]['seconds']} s)", flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "self_check.json").write_text(json.dumps(found, indent=1) + "\n")
    return int(any(entry["problem"] for entry in found.values()))
