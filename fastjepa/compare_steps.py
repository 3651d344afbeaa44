"""The k-step comparison: train with several numbers of prediction steps, and plot AP against horizon for each.

`python -m fastjepa.compare_steps --steps 1 2 4 8 -- --epochs 10`: what follows `--` is the trainer's, in every run.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from fastjepa.entry import run_command

    sys.exit(run_command("fastjepa.compare_steps", None, "python -m fastjepa.compare_steps"))

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fastjepa.optional_packages import require_packages
from fastjepa.refusal import CommandParser, fail, refusals
from fastjepa.storage.run_folder import CHECKPOINT_NAME
from fastjepa.training.command_line import parse_config, run_from_command_line
from fastjepa.training.handed_on import refuse_flags, split_at_dashes

_OWN = {
    "--steps": "is the comparison's own: name all numbers of steps before --",
    "--out": "is the comparison's own: name its folder before --",
    "--resume": "is not needed: calling the command again continues the comparison in --out",
}


def main(argv: Sequence[str] | None = None, prog: str = "python -m fastjepa.compare_steps") -> int:
    """Train one run for each of --steps into OUT/steps-K, then draw OUT/steps.png; finished runs are not repeated.

    `prog` is what was typed to come here; returns the process's exit status.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = CommandParser(
        prog=prog,
        usage=f"{prog} [-h] [--steps K [K ...]] [--out DIR] [-- FLAGS OF THE TRAINER]",
        description="Train with several numbers of prediction steps and plot AP against horizon for each.",
        epilog="The trainer's flags follow --, as in -- --epochs 10 --precision bf16, and apply to every run; "
        "-- --help lists them. Without -- they are taken as well.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[1, 2, 4, 8], metavar="K", help="numbers of prediction steps"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/steps"), metavar="DIR", help="folder of the comparison")
    before, after = split_at_dashes(argv)
    own, loose = parser.parse_known_args(before)
    flags = [*loose, *after]
    for steps in own.steps:  # now: a later run would tell after hours
        if steps < 1:
            fail(f"--steps must be numbers of at least 1, got {steps}")
    if len(set(own.steps)) < len(own.steps):
        fail(f"--steps must be different numbers, got {' '.join(map(str, own.steps))}")
    with refusals():
        refuse_flags(flags, _OWN)
        # now: without these the runs would be for nothing
        require_packages("comparing steps", "tyro", "torchmetrics", "matplotlib", "PIL")
        from fastjepa.figures.runs import draw_step_comparison
    folders = []
    for steps in own.steps:
        folder = own.out / f"steps-{steps}"
        folders.append(folder)
        resume = (folder / CHECKPOINT_NAME).exists()
        where = ["--resume", str(folder)] if resume else ["--out", str(folder), "--steps", str(steps)]
        config = parse_config([*flags, *where], prog=f"{prog} --")
        print(f"\n== {steps} prediction step{'s' if steps > 1 else ''} ==")
        status = run_from_command_line(config, again=f"{prog} {shlex.join(argv)}")
        if status:
            return status
    with refusals():
        print(f"\nwrote {draw_step_comparison(folders, own.out / 'steps.png')}")
    return 0
