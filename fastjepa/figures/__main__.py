"""`python -m fastjepa.figures RUN [RUN ...]`: draw the pictures of training runs again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastjepa.figures.runs import draw_run, draw_step_comparison
from fastjepa.storage.safe_files import CheckpointError


@dataclass(frozen=True)
class _Arguments:
    """Draws the pictures of training runs into RUN/figures/ and prints the files written."""

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders."""
    compare: Path | None = None
    """Also draw the runs' average precision by their training steps, into this PNG."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = tyro.cli(_Arguments, args=arguments, prog="python -m fastjepa.figures")
    try:
        if not given.runs:
            raise ValueError("name at least one run folder; see --help")
        for run in given.runs:
            for path in draw_run(run):
                print(path)
        if given.compare is not None:
            print(draw_step_comparison(given.runs, given.compare))
    except (OSError, ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
