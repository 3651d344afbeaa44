"""What every suite's command line shares: options, the loop over cases, the table, and the files of rows."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.harness.case import Case
from bench.harness.kept import Kept
from bench.harness.row_file import RowFile, merge
from bench.harness.rows import Row
from bench.harness.run import DeviceLostError, render, run_case
from bench.harness.session import QUICK, Settings
from bench.harness.variants import Variant
from fastjepa.config import resolve_device
from fastjepa.environment import collect

# Exit statuses of a suite's command. Python's own, 1 and 2, say that the command itself went wrong.
DEVICE_LOST = 3  # another process may go on with what is missing
VARIANT_FAILED = 4  # all is measured, and something failed


@dataclass(frozen=True)
class Options:
    """The options that all suites have, resolved."""

    suite: str
    argv: tuple[str, ...]
    device: torch.device
    quick: bool
    settings: Settings
    only: tuple[str, ...]
    variants: tuple[str, ...]
    out: Path | None
    missing: bool = False
    keep: Path | None = None


def make_parser(suite: str, doc: str) -> argparse.ArgumentParser:
    """A parser with the common options; `doc` is the suite's module docstring, whose first paragraph is shown."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {suite}", description=doc.split("\n\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--only", nargs="+", metavar="TEXT", default=(), help="only cases whose name has one of these")
    parser.add_argument("--variant", nargs="+", metavar="NAME", default=(), help="only these (default: all)")
    parser.add_argument("--rounds", type=int, help="timed rounds of each variant, at most")
    parser.add_argument("--seconds", type=float, help="for the timed rounds of each variant")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out (on a CPU it takes a process)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small and short")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"write {suite}.jsonl and {suite}.csv there")
    parser.add_argument("--missing", action="store_true", help="with --out: measure only what has no row there yet")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep float64 truths there, for the next process")
    return parser


def device_of(args: argparse.Namespace, parser: argparse.ArgumentParser) -> torch.device:
    """What --device asks for; one that is not here ends the program."""
    try:
        return resolve_device(args.device)
    except ValueError as error:
        parser.error(str(error))


def resolve(suite: str, parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Sequence[str]) -> Options:
    """Check and collect the common options."""
    for name, least in (("rounds", 1), ("seconds", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    settings = QUICK if args.quick else Settings()
    if args.rounds is not None:
        settings = replace(settings, rounds=args.rounds, least=min(settings.least, args.rounds))
    if args.seconds is not None:
        settings = replace(settings, seconds=args.seconds)
    if args.no_memory:
        settings = replace(settings, memory=False)
    if args.missing and args.out is None:
        parser.error("--missing needs --out, the folder in which rows may be missing")
    device = device_of(args, parser)
    return Options(
        suite, tuple(argv), device, args.quick, settings, tuple(args.only), tuple(args.variant), args.out,
        args.missing, args.keep,
    )  # fmt: skip


def run(
    options: Options,
    parser: argparse.ArgumentParser,
    plans: Iterable[tuple[Case, Sequence[Variant]]],
    after: Callable[[list[Row]], None] = lambda rows: None,
) -> int:
    """Measure every case, print a table for each, write the rows of every variant at once.

    Returns `VARIANT_FAILED` if a variant failed, or none of those that were asked for by name can run here;
    `DEVICE_LOST` if one has left the device unusable; else 0. `after` is given all rows at the end. `plans` may build
    its cases lazily.
    """
    environment = collect(["python", "-m", "bench", options.suite, *options.argv], options.device)
    file = None if options.out is None else RowFile(options.out, options.suite)
    rows: list[Row] = [] if file is None else file.rows()
    names: list[str] = []
    chosen_cases = 0

    def found(new: list[Row]) -> None:
        rows[:] = merge(rows, new)
        if file is not None:
            file.add(new)

    for case, variants in plans:
        names.append(case.name)
        if options.only and not any(text in case.name for text in options.only):
            continue
        chosen_cases += 1
        known = [variant.name for variant in variants]
        unknown = [name for name in options.variants if name not in known]
        if unknown:
            parser.error(f"--variant {unknown[0]!r} is not one of: {', '.join(known)}")
        chosen = [v for v in variants if not options.variants or v.name in options.variants]
        try:
            with trainers_arithmetic():
                run_case(
                    case, chosen, options.device, environment, options.settings, _progress,
                    known=variants,
                    measured=file.measured(case.name) if file is not None and options.missing else {},
                    kept=Kept(options.keep),
                    before=lambda new: None if file is None else file.begin(new),
                    after=found,
                )  # fmt: skip
        except DeviceLostError as error:
            _progress(str(error))
            return DEVICE_LOST
        table = render(row for row in rows if row.case == case.name)
        print(f"\n{options.suite} {case.name}, on {environment.device}\n{table}", flush=True)
    if not chosen_cases:
        parser.error(f"--only {' '.join(options.only)}: no case has that in its name; cases: {'; '.join(names)}")
    after(rows)
    if options.out is None:
        print("\nno rows were written; --out DIR writes them")
    if options.variants and all(row.status == "unavailable" for row in rows if row.variant in options.variants):
        print(f"none of the variants asked for can run here: {', '.join(options.variants)}", file=sys.stderr)
        return VARIANT_FAILED
    return VARIANT_FAILED if any(row.status == "failed" for row in rows) else 0


@contextlib.contextmanager
def trainers_arithmetic() -> Iterator[None]:
    """Outside a variant's own choice, products of fp32 are fp32 and cuDNN is deterministic, as in the trainer.

    PyTorch's default for convolutions on a GPU is tf32, in the backward pass too, where a variant is no longer asked.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = False
    cudnn.deterministic = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
