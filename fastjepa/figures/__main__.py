"""`python -m fastjepa.figures RUN [RUN ...]`: draw the pictures of training runs again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fastjepa.entry import exit_status, stops_at_once
from fastjepa.refusal import CommandParser, refusals


def main(argv: Sequence[str] | None = None, prog: str = "python -m fastjepa.figures") -> int:
    """The command line, typed as `prog`; returns the exit status."""
    parser = CommandParser(
        prog=prog,
        description="Draws the pictures of training runs into RUN/figures/ and prints the files written.",
    )
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run folders")
    parser.add_argument(
        "--compare", type=Path, metavar="PNG",
        help="also draw the runs' average precision by their training steps, into this PNG",
    )  # fmt: skip
    given = parser.parse_args(argv)
    with refusals():
        with stops_at_once():
            from fastjepa.figures.runs import draw_run, draw_step_comparison

        if not given.runs:
            raise ValueError("name at least one run folder; see --help")
        for run in given.runs:
            for path in draw_run(run):
                print(path)
        if given.compare is not None:
            print(draw_step_comparison(given.runs, given.compare))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
