"""`python -m bench traffic`: bytes read and written, and kernels launched, by a step, an evaluation and a rollout step.

At full size on any machine: shapes are traced, and nothing of that size is allocated. "GB" counts each operator's
tensors once, an op of ours as one operator; "GB of all passes" counts every launch of ours by itself. Convolutions of
torch are counted at the least that they must move, by whatever library, each as one kernel.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.harness.row_file import RowFile
from bench.recipe import TINY, Recipe
from fastjepa.environment import collect

BATCHES = {"rollout step": (1, 64)}


def main(argv: Sequence[str]) -> int:
    """The command line; returns 2 if kernels were imported compiled, in this process, before."""
    parser = argparse.ArgumentParser(
        prog="python -m bench traffic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, help="clips (default: 64; of a rollout step 1 and 64)")
    parser.add_argument("--quick", action="store_true", help="a tiny recipe")
    parser.add_argument("--only", default="", metavar="TEXT", help="only work whose name contains TEXT")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write rows there")
    args = parser.parse_args(argv)
    if args.batch is not None and args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    # Compiled kernels refuse a CPU's tensors, which fake ones are. Read when kernels are imported.
    os.environ["TRITON_INTERPRET"] = "1"
    from bench.traffic import totals, work
    from fastjepa.kernels.checks import unavailable_reason

    chosen = {name: found for name, found in work.WORKS.items() if args.only in name}
    if not chosen:
        parser.error(f"--only {args.only}: none of {', '.join(work.WORKS)}")
    no_kernels = unavailable_reason(torch.device("cpu"))
    environment = collect(["python", "-m", "bench", "traffic", *argv], torch.device("cpu"))
    for name, (count, ways) in chosen.items():
        for batch in (args.batch,) if args.batch is not None else BATCHES.get(name, (64,)):
            recipe = replace(TINY if args.quick else Recipe(), batch=batch)
            print(f"\n{name}, {recipe}", flush=True)
            for way in ways:
                if way.fused and no_kernels:
                    print(f"\n{way.name}: unavailable: {no_kernels}", file=sys.stderr)
                    continue
                parts = totals.by_part(count(recipe, way))
                print(f"\n{way.name}\n{totals.render(parts)}", flush=True)
                if args.out is not None:
                    RowFile(args.out, "traffic").add(totals.to_rows(f"{name}, {recipe}", way.name, parts, environment))
    if args.out is None:
        print("\nno rows were written; --out DIR writes them")
    return 0
