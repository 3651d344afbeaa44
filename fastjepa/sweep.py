"""A sweep: every cell of a grid of options × every seed is trained, and all results are one table and two pictures.

`python -m fastjepa.sweep --grid cov_coeff=1,10,100 std_coeff=1,10,100 --seeds 1,1000,10000 -- --epochs 10`: what
follows `--` is the trainer's, in every run.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports
    import sys

    from fastjepa.entry import run_command

    sys.exit(run_command("fastjepa.sweep", None, "python -m fastjepa.sweep"))

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fastjepa.distributed.launch import read_launch
from fastjepa.entry import stops_at_once
from fastjepa.optional_packages import require_packages
from fastjepa.refusal import CommandParser, refusals
from fastjepa.sweeping.grid import NAMED, SEEDS, parse_grid, parse_seeds
from fastjepa.sweeping.record import Record, read_record
from fastjepa.training.handed_on import split_at_dashes


def main(argv: Sequence[str] | None = None, prog: str = "python -m fastjepa.sweep") -> int:
    """Train what is not finished, one run after another or through Slurm, and report; `prog` is what was typed.

    Returns 0 if no run broke, 1 if some did, 128 + the signal's number if it was stopped.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    before, flags = split_at_dashes(argv)
    parser = _parser(prog)
    own, loose = parser.parse_known_args(before)
    if loose:
        parser.error(f"{loose[0]} is not a flag of this command; the trainer's follow --: -- {shlex.join(loose)}")
    with refusals():
        if not {"-h", "--help"}.isdisjoint(flags):
            return _show_flags(flags, prog)
        if (launch := read_launch()).size > 1:
            raise ValueError(f"a sweep starts its runs itself, each as one process; this is one of {launch.size}")
        record = _asked(own, flags)
        grid, seeds = parse_grid(record.grid), parse_seeds(record.seeds)
        # now: without these the runs would be for nothing
        require_packages("a sweep", "tyro", "torchmetrics", "matplotlib", "PIL")
        if own.slurm is not None:
            require_packages("a sweep on Slurm", "submitit")
        with stops_at_once():
            from fastjepa.sweeping import carry_out
            from fastjepa.sweeping.cluster import parse_slurm
            from fastjepa.sweeping.plan import plan_runs

        slurm = None if own.slurm is None else parse_slurm(own.slurm)
        here = slurm is None and not own.report_only
        runs = plan_runs(grid, seeds, record.flags, own.out, prog=prog, here=here)
        again = f"{prog} {shlex.join(argv)}"
        if own.report_only:
            return carry_out.report(runs, own.out)
        return carry_out.train(runs, own.out, record, again=again, slurm=slurm)


def _show_flags(flags: Sequence[str], prog: str) -> int:
    """The trainer's --help."""
    with stops_at_once():
        from fastjepa.training.command_line import parse_config

    parse_config(flags, prog=f"{prog} --")
    return 0


def _asked(own: argparse.Namespace, flags: Sequence[str]) -> Record:
    """The words of grid, seeds and trainer: those given, or, without --grid, those of the sweep in --out."""
    if own.report_only and (own.grid is not None or own.slurm is not None):
        raise ValueError("--report_only reports the sweep in --out as it was asked for; it takes no --grid or --slurm")
    if own.grid is not None:
        return Record(tuple(own.grid), own.seeds or SEEDS, tuple(flags))
    if own.seeds is not None or flags:
        given = "--seeds" if own.seeds is not None else f"-- {shlex.join(flags)}"
        raise ValueError(f"{given} needs --grid; without it the sweep in --out goes on as it was asked for")
    return read_record(own.out)


def _parser(prog: str) -> CommandParser:
    parser = CommandParser(
        prog=prog,
        usage=f"{prog} [-h] [--grid NAME=V,V,… [NAME=V,V,… ...]] [--seeds N,N,…] [--out DIR] [--report_only] "
        "[--slurm NAME=VALUE ...] [-- FLAGS OF THE TRAINER]",
        description="Train every cell of a grid of the trainer's options with every seed; all results are one table, "
        "DIR/sweep.csv, a heat-map of mAP and curves of AP by horizon.",
        epilog="The trainer's flags follow --, as in -- --epochs 10 --precision bf16, and apply to every run; "
        "-- --help lists them. The same command goes on where a sweep was stopped, with what is not finished.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--grid", nargs="+", metavar="NAME=V,V,…",
        help=f"axes, or one of {', '.join(NAMED)}; default: that of the sweep in DIR. The first axis is the heat-map's "
        "rows, the second its columns",
    )  # fmt: skip
    parser.add_argument("--seeds", metavar="N,N,…", help=f"seeds of each cell (default: {SEEDS})")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), metavar="DIR", help="folder of the sweep")
    parser.add_argument("--report_only", action="store_true", help="train nothing; make table and pictures again")
    parser.add_argument(
        "--slurm", nargs="+", metavar="NAME=VALUE",
        help="hand the runs to Slurm, through submitit: time=MINUTES partition=gpu gpus_per_node=1 …",
    )  # fmt: skip
    return parser
