"""The k-step comparison: train with several numbers of prediction steps, and plot AP against horizon for each.

`python -m fastjepa.compare_steps --steps 1 2 4 8`; all flags of train.py are accepted and apply to every run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fastjepa.refusal import CommandParser, fail, refusals
from fastjepa.storage.run_folder import CHECKPOINT_NAME
from fastjepa.training.command_line import parse_config, run_from_command_line


def main(argv: Sequence[str] | None = None) -> int:
    """Train one run for each of --steps into OUT/steps-K, then draw OUT/steps.png; finished runs are not repeated."""
    parser = CommandParser(
        prog="python -m fastjepa.compare_steps",
        description="Train with several numbers of prediction steps and plot AP against horizon for each.",
        epilog="All other flags are those of train.py (see python train.py --help) and apply to every run.",
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of prediction steps")
    parser.add_argument("--out", type=Path, default=Path("runs/steps"), help="folder of the comparison")
    own, flags = parser.parse_known_args(argv)
    if "--resume" in flags:
        fail("--resume is not needed: calling the command again continues the comparison in --out")
    for steps in own.steps:
        if steps < 1:
            fail(f"--steps must be numbers of at least 1, got {steps}")
    if len(set(own.steps)) < len(own.steps):
        fail(f"--steps must be different numbers, got {' '.join(map(str, own.steps))}")
    with refusals():  # now: without matplotlib the runs would be for nothing
        from fastjepa.figures.runs import draw_step_comparison
    folders = []
    for steps in own.steps:
        folder = own.out / f"steps-{steps}"
        folders.append(folder)
        resume = (folder / CHECKPOINT_NAME).exists()
        where = ["--resume", str(folder)] if resume else ["--out", str(folder), "--steps", str(steps)]
        config = parse_config([*flags, *where], prog=parser.prog)
        print(f"\n== {steps} prediction step{'s' if steps > 1 else ''} ==")
        status = run_from_command_line(config)
        if status:
            return status
    with refusals():
        print(f"\nwrote {draw_step_comparison(folders, own.out / 'steps.png')}")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    sys.exit(main())
