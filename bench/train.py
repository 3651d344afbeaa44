"""`python -m bench train`: time to mAP. Trains for a number of seconds and writes mAP against the wall clock.

Every evaluation of the run is a row, and so is one more when the time is over: `median_ms` is the mean time of a
training step since the row before, and `quality` has mAP, AP by horizon, and `seconds`: the wall clock since training
began, with evaluations and without making the data. A run that its time has stopped goes on when the command is given
again, and its clock goes on too.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness.rows import Row, format_table, read_rows, write_rows, write_text
from fastjepa.config import Config, resolve_device
from fastjepa.environment import Environment, collect
from fastjepa.moving_mnist.official import DownloadError
from fastjepa.refusal import CommandParser, refusals
from fastjepa.storage.run_folder import CHECKPOINT_NAME
from fastjepa.training.command_line import parse_config
from fastjepa.training.evaluation import Evaluation, evaluate
from fastjepa.training.handed_on import refuse_flags, split_at_dashes
from fastjepa.training.stop_signals import Interrupted
from fastjepa.training.trainer import NonFiniteLossError, Trainer

SUITE = "train"


class TimedTrainer(Trainer):
    """A trainer that turns every evaluation into a row, and says what the clock showed when."""

    def __init__(self, config: Config, environment: Environment, rows: list[Row], out: Path, time_limit: float) -> None:
        super().__init__(config)
        self.environment, self.found, self.out = environment, rows, out
        self.time_limit = time_limit
        self.alarm: threading.Timer | None = None
        self.earlier = rows[-1].quality["seconds"] if rows else 0.0
        self.last_step, self.last_seconds = self.global_step, self.seconds
        self.started = time.perf_counter()

    def _train_epoch(self, board: Any, received: list[int], *rest: Any) -> bool:
        if self.alarm is None:
            # `received` is the list of signals that the trainer looks at after each step. No real signal is sent: it
            # could come when the trainer no longer listens, and end the process.
            self.alarm = threading.Timer(self.time_limit, received.append, (signal.SIGTERM,))
            self.alarm.daemon = True
            self.alarm.start()
        return super()._train_epoch(board, received, *rest)

    def _evaluate(self, board: Any) -> Evaluation:
        evaluation = super()._evaluate(board)
        self.note(evaluation)
        return evaluation

    def note(self, evaluation: Evaluation) -> None:
        """Add the row of this evaluation."""
        config, steps = self.config, self.global_step - self.last_step
        wall = self.earlier + time.perf_counter() - self.started
        quality = {"mAP": evaluation.map, "pooled_mAP": evaluation.pooled_map, "seconds": wall}
        quality |= {f"AP_{s}": value for s, value in enumerate(evaluation.ap)}
        quality |= {"chance": evaluation.positive_share, "step": float(self.global_step)}
        quality["epoch"] = self.epoch + self.batch * config.batch_size / len(self.train_clips)
        # Between checkpoints the trainer's clock stands still; then the wall clock is all there is.
        spent = self.seconds - self.last_seconds or wall - (self.found[-1].quality["seconds"] if self.found else 0.0)
        self.found.append(
            Row(
                suite=SUITE, case=f"preset {config.preset}, B={config.batch_size}, seed {config.seed}",
                variant=f"{self.execution}",
                phase=f"step {self.global_step}", precision=config.precision, status="unjudged",
                reason="a training run: its mAP says how good it is", rounds=max(steps, 1),
                median_ms=1e3 * spent / max(steps, 1), timing="host", quality=quality, **vars(self.environment),
            )
        )  # fmt: skip
        self.last_step, self.last_seconds = self.global_step, self.seconds
        write_rows(self.found, self.out / SUITE)  # now: a run that is killed keeps what it has measured


def train(
    config: Config, seconds: float, environment: Environment, rows: list[Row], out: Path
) -> tuple[TimedTrainer, bool]:
    """Train until `config` is done or `seconds` are over; (the trainer, whether it is done).

    Rows are added to `rows` and written to `out`. The time ends the run as Ctrl-C would: after a step, with all saved.
    """
    trainer = TimedTrainer(config, environment, rows, out, seconds)
    try:
        trainer.run()
        return trainer, True
    except Interrupted:
        trainer.note(
            evaluate(
                trainer.jepa, trainer.image_decoder, trainer.detection_head, trainer.val_clips, config.batch_size,
                autocast_dtype=trainer.autocast_dtype, rollout=trainer.graphed_rollout,
            )
        )  # fmt: skip
        return trainer, False
    finally:
        if trainer.alarm is not None:
            trainer.alarm.cancel()


def main(argv: Sequence[str]) -> int:
    """The command line; returns 0 if training went as it should, done or not."""
    parser = CommandParser(
        prog=_PROG,
        usage=f"{_PROG} [-h] [--seconds S] --out DIR [--quick] [-- FLAGS OF THE TRAINER]",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="The trainer's flags follow --, as in -- --precision bf16 --epochs 5; train.py --help lists them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--seconds", type=float, default=120.0, metavar="S", help="of training and evaluation (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for train.jsonl, train.csv and run/")
    parser.add_argument("--quick", action="store_true", help="a smoke run: a tiny model, two short epochs")
    own, flags = split_at_dashes(argv)
    args, unknown = parser.parse_known_args(own)
    if unknown:
        parser.error(f"{unknown[0]} is not a flag of this command; the trainer's follow --: -- {shlex.join(unknown)}")
    if not args.seconds > 0:
        parser.error(f"--seconds must be more than 0, got {args.seconds}")
    with refusals(NonFiniteLossError, DownloadError):
        refuse_flags(flags, _OWN)
        config = _config(args.out / "run", [*(_QUICK if args.quick else ()), *flags])
        return _train_and_show(args, config, argv)


def _train_and_show(args: argparse.Namespace, config: Config, argv: Sequence[str]) -> int:
    environment = collect(["python", "-m", "bench", "train", *argv], resolve_device(config.device))
    rows = read_rows(args.out / "train.jsonl") if config.resume and (args.out / "train.jsonl").exists() else []
    before = len(rows)
    write_text(args.out / "run" / ".gitignore", "*\n")  # rows are committed, checkpoints are not
    trainer, done = train(config, args.seconds, environment, rows, args.out)
    if rows:
        print(f"\n{render(rows)}")
    if done:
        trainer.finish()
    state = "done" if done else f"stopped after {args.seconds:.0f} s; the same command goes on"
    print(
        f"\n{len(rows) - before} new rows; epoch {trainer.epoch} of {config.epochs}, "
        f"step {trainer.global_step}: {state}"
    )
    return 0


_PROG = "python -m bench train"

_OWN = {
    "--out": "is this command's own: name the folder before --; the run lies in its run/",
    "--resume": "is not needed: the same command goes on with the run in --out",
}

_QUICK = (
    "--batch_size 4 --henc 2 --hpre 2 --dstc 4 --steps 1 --epochs 2 --n_train 12 --n_val 4 --n_frames 5 --canvas 16 "
    "--digit_size 8 --preset demo"
).split()


def _config(folder: Path, flags: list[str]) -> Config:
    """The configuration of a new run, or of the one in `folder`, which `flags` must not contradict."""
    if not (folder / CHECKPOINT_NAME).exists():
        return parse_config([*flags, "--out", str(folder)], prog=f"{_PROG} --")
    return parse_config([*flags, "--resume", str(folder)], prog=f"{_PROG} --")


def render(rows: Sequence[Row]) -> str:
    """The rows as a table: mAP against the wall clock."""
    body = [
        [
            f"{row.quality['seconds']:.1f}", f"{row.quality['epoch']:.2f}", f"{row.quality['step']:.0f}",
            f"{row.median_ms:.1f}", f"{row.quality['mAP']:.4f}", f"{row.quality['AP_0']:.4f}",
            f"{row.quality['chance']:.4f}",
        ]
        for row in rows
    ]  # fmt: skip
    return format_table(["seconds", "epoch", "step", "ms per step", "mAP", "AP_0", "chance"], body)
