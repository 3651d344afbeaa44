"""`python -m bench.profile.target`: what a profiler watches: a few warm training steps, and nothing else.

Between cudaProfilerStart and cudaProfilerStop there are only the steps, so `nsys --capture-range=cudaProfilerApi` and
`ncu --profile-from-start off` record those. With --kernels, torch.profiler makes the table itself, on any machine.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench import step
from bench.harness import suite
from bench.harness.rows import write_text
from bench.profile.top_kernels import COLUMNS
from bench.recipe import Recipe, make_batch
from bench.recipe_suite import chosen_recipe
from fastjepa.profiling import span


def kernel_table(recorded: profile, device: torch.device) -> str:
    """torch.profiler's kernels (on a CPU: operators) as a CSV with the columns of nsys's cuda_gpu_kern_sum."""
    on_gpu = device.type == "cuda"
    rows = []
    for event in recorded.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        is_kernel = event.device_type.name == "CUDA"
        # Ranges (an optimizer's step is one) span kernels that are counted already.
        if microseconds > 0 and is_kernel == on_gpu and not event.is_user_annotation:
            rows.append((1e3 * microseconds, event.count, event.key))
    total = sum(row[0] for row in rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for nanoseconds, count, name in sorted(rows, reverse=True):
        writer.writerow([f"{100 * nanoseconds / total:.2f}", f"{nanoseconds:.0f}", count, name])
    return text.getvalue()


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile.target", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--variant", default="fused blocks", help="of `python -m bench step` (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="recorded steps (default: %(default)s)")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--quick", action="store_true", help="a tiny recipe")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--kernels", type=Path, metavar="CSV", help="write torch.profiler's table of kernels there")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    device = suite.device_of(args, parser)
    recipe: Recipe = chosen_recipe(parser, args, device)
    variants = {variant.name: variant for variant in step.make_variants(recipe, device)}
    if args.variant not in variants:
        parser.error(f"--variant {args.variant!r} is not one of: {', '.join(variants)}")
    variant = variants[args.variant]
    if reason := variant.available(device):
        parser.error(f"--variant {args.variant!r} cannot run here: {reason}")
    compute, inputs = variant.build(device), make_batch(recipe, device, torch.float32)

    def steps() -> None:
        for number in range(args.steps):
            with span(f"step {number + 1}"):
                compute(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize()

    compute(inputs)
    steps()  # warm: kernels are compiled, algorithms chosen, graphs captured
    if args.kernels is not None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=activities, acc_events=True) as recorded:
            steps()
        write_text(args.kernels, kernel_table(recorded, device))
    elif device.type == "cuda":
        torch.cuda.profiler.start()
        steps()
        torch.cuda.profiler.stop()
    else:
        parser.error("without a GPU there is nothing for nsys or ncu to watch; --kernels CSV works everywhere")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
