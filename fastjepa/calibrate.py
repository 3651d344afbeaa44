"""Measure, or show, what `auto` takes on this GPU: `python -m fastjepa.calibrate [--show | --redo]`.

Training and `fastjepa.accelerate` do the same by themselves when they first run on a GPU.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from fastjepa.entry import run_command

    sys.exit(run_command("fastjepa.calibrate", None, "python -m fastjepa.calibrate"))

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from fastjepa.calibration.memory import Memory, recompute_first
from fastjepa.calibration.setting import CONTEXT, ROLLOUT_STEPS, setting_of_config, setting_of_rollout
from fastjepa.calibration.store import MEASURED, read_rows, rows_folder
from fastjepa.calibration.verdict import Verdict, resolve, switched_off
from fastjepa.config import Config, Precision, resolve_device, resolve_precision
from fastjepa.fused.step_memory import memory_on
from fastjepa.refusal import CommandParser, refusals

_SIZES = ("batch_size", "n_frames", "canvas", "henc", "hpre", "dstc", "steps")
_OF_TRAINING = ("n_frames", "steps")
_FLAGS_OF_TRAINING = " and ".join(f"--{name}" for name in _OF_TRAINING)


def main(argv: Sequence[str] | None = None, prog: str = "python -m fastjepa.calibrate") -> int:
    """The command line, typed as `prog`; the process's exit status."""
    options = _parser(prog).parse_args(argv)
    with refusals():
        if options.show:
            return show(options.cache_dir)
        device = resolve_device(options.device)
        if device.type != "cuda":
            raise ValueError("there is nothing to calibrate on a CPU: auto takes the losses' closed form there")
        digit_size = min(Config().digit_size, options.canvas)  # of data, which calibration has none of
        config = Config(**{name: getattr(options, name) for name in _SIZES}, digit_size=digit_size)
        if options.inference and any(getattr(options, name) != getattr(Config(), name) for name in _OF_TRAINING):
            raise ValueError(
                f"a rollout is of {ROLLOUT_STEPS} frames from {CONTEXT}: {_FLAGS_OF_TRAINING} are of training"
            )
        precision = resolve_precision(options.precision, device)
        # As the trainer sets them, or as PyTorch does unless told otherwise.
        torch.backends.cudnn.deterministic = not options.nondeterministic
        if options.inference:
            setting = setting_of_rollout(config, device, precision, config.batch_size)
        else:
            setting = setting_of_config(config, device, precision)
        memory = "" if switched_off() else memory_on(setting, device)
        allowed = memory.allows if isinstance(memory, Memory) else lambda _: True
        verdict = resolve(
            setting, device, allowed=allowed, recompute=recompute_first(memory), cache_dir=options.cache_dir,
            redo=options.redo,
        )  # fmt: skip
    print(verdict.report(verdict.best(allowed)))
    if str(memory):
        print(f"  {memory}")
    return 0


def show(cache_dir: Path | None) -> int:
    """Print what is known: rows in the cache, and rows of the package. Damaged files are named."""
    folder = rows_folder(cache_dir)
    paths = [*sorted(folder.glob("*.json")), *sorted(MEASURED.glob("*.json"))]
    for path in paths:
        try:
            setting, rows = read_rows(path)
        except (ValueError, OSError) as error:
            print(f"{path} cannot be used: {error}")
            continue
        verdict = Verdict(setting, rows, str(path))
        print(verdict.report(verdict.best()))
    if not paths:
        print(f"nothing is calibrated yet in {folder}")
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=prog,
        description="Measure once what is fastest, and exact, on this GPU; at the sizes of the recipe unless told "
        "otherwise. Rows are kept in the cache, where training and fastjepa.accelerate find them.",
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--show", action="store_true", help="print what is known, and measure nothing")
    what.add_argument("--redo", action="store_true", help="measure again, whatever is known")
    parser.add_argument(
        "--inference",
        action="store_true",
        help=f"a rollout of {ROLLOUT_STEPS} frames from {CONTEXT}, not training; of --batch_size clips",
    )
    parser.add_argument("--device", default="auto", help="auto, cuda or cuda:N")
    parser.add_argument("--precision", default="auto", choices=get_args(Precision))
    parser.add_argument(
        "--nondeterministic", action="store_true",
        help="as in a script of one's own: the trainer asks cuDNN for deterministic algorithms, PyTorch does not",
    )  # fmt: skip
    parser.add_argument("--cache_dir", type=Path, help="default: ~/.cache/fastjepa")
    defaults = Config()
    for name in _SIZES:
        parser.add_argument(f"--{name}", type=int, default=getattr(defaults, name), help="default: %(default)s")
    return parser
