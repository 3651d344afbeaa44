"""`python -m bench.profile.top_kernels CSV`: the kernels that take the most time, with their share of it.

Reads the CSV that `nsys stats --report cuda_gpu_kern_sum --format csv` exports, or that `bench.profile.target
--kernels` writes. With --regex it prints one expression that matches those kernels' names, for `ncu --kernel-name`.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.harness.rows import format_table

COLUMNS = ("Time (%)", "Total Time (ns)", "Instances", "Name")  # those of nsys that are read; it has more


@dataclass(frozen=True)
class Kernel:
    """One kernel, all its launches together."""

    name: str
    nanoseconds: float
    launches: int


def read_kernels(path: Path) -> list[Kernel]:
    """The kernels of an exported CSV, the longest first. Raises ValueError if it is not one."""
    with path.open(newline="", encoding="utf-8") as file:
        # nsys may print lines about its work before the table.
        lines = file.read().splitlines()
    start = next((i for i, line in enumerate(lines) if all(column in line for column in COLUMNS)), None)
    if start is None:
        raise ValueError(f"{path} has no line with the columns {', '.join(COLUMNS)}")
    kernels = []
    for number, row in enumerate(csv.DictReader(lines[start:]), start=start + 2):
        try:
            kernels.append(Kernel(row["Name"], float(row["Total Time (ns)"]), int(row["Instances"])))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return sorted(kernels, key=lambda kernel: -kernel.nanoseconds)


def render(kernels: Sequence[Kernel], count: int) -> str:
    """The first `count` kernels as a table; shares are of all kernels' time."""
    total = sum(kernel.nanoseconds for kernel in kernels) or 1.0
    covered = 0.0
    rows = []
    for kernel in kernels[:count]:
        covered += kernel.nanoseconds
        rows.append(
            [
                f"{100 * kernel.nanoseconds / total:.1f}", f"{100 * covered / total:.1f}",
                f"{kernel.nanoseconds / 1e6:.3f}", str(kernel.launches),
                f"{kernel.nanoseconds / 1e3 / max(kernel.launches, 1):.1f}", kernel.name[:100],
            ]
        )  # fmt: skip
    return format_table(["% of time", "together", "ms", "launches", "us each", "kernel"], rows)


def regex_of(kernels: Sequence[Kernel], count: int) -> str:
    """Matches the base names of the first `count` kernels, which is what ncu compares by default."""
    names = dict.fromkeys(base_name(kernel.name) for kernel in kernels)
    return f"^({'|'.join(re.escape(name) for name in list(names)[:count])})$"


def base_name(name: str) -> str:
    """A C++ kernel's name without return type, namespaces, template arguments and parameters; Triton's as it is."""
    bare = re.sub(r"\(anonymous namespace\)", "anonymous", name)
    depth, kept = 0, []
    for character in bare:
        depth += character in "<("
        if depth == 0:
            kept.append(character)
        depth -= character in ">)"
    return "".join(kept).strip().split("::")[-1].split(" ")[-1]


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile.top_kernels", description=(__doc__ or "").split("\n\n")[0]
    )  # fmt: skip
    parser.add_argument("csv", type=Path)
    parser.add_argument("--count", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--regex", action="store_true", help="print an expression for ncu in place of the table")
    args = parser.parse_args(argv)
    try:
        kernels = read_kernels(args.csv)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not kernels:
        parser.error(f"{args.csv} lists no kernels")
    print(regex_of(kernels, args.count) if args.regex else render(kernels, args.count))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
