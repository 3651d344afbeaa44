"""The command line of training: flags over the defaults of a preset, or of the run that is resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastjepa.config import (
    MAY_CHANGE_ON_RESUME,
    Config,
    preset_config,
    resolve_device,
    resolve_precision,
    resolve_preset,
)
from fastjepa.distributed.launch import Launch, read_launch
from fastjepa.distributed.ranks import LostRanksError, Ranks
from fastjepa.eb_jepa import defaults_from_eb_jepa
from fastjepa.files.safe_files import CheckpointError
from fastjepa.graphs.capture import use_cuda_graph
from fastjepa.kernels.checks import unavailable_reason
from fastjepa.moving_mnist.official import MNIST_TEST_SEQ, DownloadError
from fastjepa.optional_packages import MissingPackageError, needed_for
from fastjepa.refusal import ALWAYS_REFUSED, STOPPED, CommandParser, fail, refusals
from fastjepa.storage.checkpoint import check_same_config
from fastjepa.storage.run_folder import CHECKPOINT_NAME, read_run_config
from fastjepa.training.execution import no_graph_reason
from fastjepa.training.flags import check_flags
from fastjepa.training.one_voice import heard_if, parse_alike
from fastjepa.training.stop_signals import Interrupted
from fastjepa.training.summary import describe, summary
from fastjepa.training.trainer import NonFiniteLossError, Trainer

T = TypeVar("T")

REFUSALS = (NonFiniteLossError, DownloadError)  # of a run, besides those that any command has

DESCRIPTION = """Train and evaluate a Video JEPA on Moving MNIST.

Without flags: the published recipe on a GPU, a demo of a few minutes on a CPU. Everything that the run makes
(checkpoint, metrics, pictures, exported weights) goes to one folder, named at the end."""


def parse_options(
    kind: type[T], argv: Sequence[str] | None, *, prog: str, description: str | None = None, default: T | None = None
) -> T:
    """The flags in `argv` (default: sys.argv) as an object of the dataclass `kind`, whose fields are the flags.

    Ends the program with exit status 2 if they cannot be parsed, or if tyro, which does it, is not installed.
    """
    try:
        with needed_for("the command line"):
            import tyro
        check_flags(kind, sys.argv[1:] if argv is None else argv, prog, default)
    except (MissingPackageError, ValueError) as error:
        fail(error)
    if default is None:
        return tyro.cli(kind, prog=prog, description=description, args=argv, use_underscores=True)
    return tyro.cli(kind, prog=prog, description=description, default=default, args=argv, use_underscores=True)


@dataclass(frozen=True)
class SavedRun:
    """A run that goes on: its folder, and the configuration that is saved there."""

    folder: Path
    config: dict[str, Any]


def find_saved_run(argv: Sequence[str], prog: str, *, restartable: bool = False) -> SavedRun | None:
    """The run that `argv` asks to resume; None for a new one. Of processes that torchrun starts again when one fails
    (`restartable`), that is also the run in --out, if it has got as far as a checkpoint.

    Raises:
        CheckpointError: there is nothing to resume.
    """
    chosen, _ = _first_parser(prog).parse_known_args(argv)
    folder = chosen.resume
    if folder is None and restartable and chosen.out is not None and (chosen.out / CHECKPOINT_NAME).exists():
        folder = chosen.out
    return None if folder is None else SavedRun(folder, read_run_config(folder))


def _first_parser(prog: str) -> CommandParser:
    """Of the flags on which the defaults of others depend."""
    first = CommandParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="auto")
    first.add_argument("--device", default="auto")
    first.add_argument("--data")
    first.add_argument("--resume", type=Path)
    first.add_argument("--out", type=Path)
    first.add_argument("--from_eb_jepa", type=Path)
    first.add_argument("--lr", nargs="?", const="")
    return first


def parse_config(
    argv: Sequence[str] | None = None,
    prog: str = "train.py",
    *,
    launch: Launch | None = None,
    run: SavedRun | None = None,
) -> Config:
    """The configuration that the flags in `argv` (default: sys.argv) ask for.

    The defaults of all other flags depend on --preset, --device, --data and --from_eb_jepa, or on --resume, so those
    are looked at first. `launch` says how this process was started, and `run` is what `find_saved_run` gives, where
    that was asked before.
    Prints a clear line and exits with status 2 if the flags cannot be served.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    launch = launch or Launch()
    with refusals():
        chosen, _ = _first_parser(prog).parse_known_args(argv)
        run = run or find_saved_run(argv, prog, restartable=launch.restartable)
        if run is None:
            device = resolve_device(chosen.device)
            if chosen.from_eb_jepa is None:
                default = preset_config(resolve_preset(chosen.preset, device))
            else:
                default = defaults_from_eb_jepa(
                    chosen.from_eb_jepa, chosen.preset, device, own_lr=chosen.lr is not None
                )
            if chosen.data == "official":  # whose frames have one size
                default = dataclasses.replace(default, canvas=MNIST_TEST_SEQ.size)
        else:
            default = _saved_config(run)
        config = parse_options(Config, argv, prog=prog, description=DESCRIPTION, default=default)
        if config.preset == "auto":  # given explicitly; tyro has parsed the word, not what it stands for
            config = dataclasses.replace(config, preset=default.preset)
        device = resolve_device(config.device)
        if config.precision == "auto":
            # A run keeps what it began with, on whatever device it goes on.
            kept = default.precision if run is not None else "auto"
            config = dataclasses.replace(config, precision=resolve_precision(kept, device))
        if run is not None:
            # Options that the run did not know yet have their defaults.
            check_same_config(Config.from_json(run.config).to_json(), config.to_json(), MAY_CHANGE_ON_RESUME)
            if config.out != config.resume:
                raise ValueError("--out cannot be given with --resume: a run goes on in its own folder")
        if launch.restartable and config.out is None:
            raise ValueError(
                "torchrun --max-restarts needs --out (or --resume): a run that is started again goes on from the "
                "checkpoint in its folder"
            )
        if device.type != "cuda" and config.precision == "tf32":
            raise ValueError("--precision tf32 needs a CUDA device; use fp32 or bf16")
        if config.backend == "fused" and (reason := unavailable_reason(device)) is not None:
            raise ValueError(f"--backend fused is not supported here: {reason}; use auto or eager")
        use_cuda_graph(config.cuda_graph, device)
        if config.cuda_graph == "on" and (problem := no_graph_reason(config, Ranks(), device)):
            raise ValueError(f"--cuda_graph on is not supported here: {problem}; use auto or off")
        if config.recompute == "on" and (config.backend == "eager" or unavailable_reason(device) is not None):
            why = unavailable_reason(device) if config.backend != "eager" else "--backend eager has none"
            raise ValueError(f"--recompute on needs fused networks: {why}; use off")
    return config


def _saved_config(run: SavedRun) -> Config:
    """The configuration of a run that is about to be resumed in its folder."""
    try:
        return dataclasses.replace(Config.from_json(run.config), resume=run.folder, out=run.folder)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"--resume {run.folder}: {error}") from error


def main(argv: Sequence[str] | None = None, prog: str = "python train.py") -> int:
    """The command line of training, typed as `prog`; the process's exit status. Under torchrun, one of several."""
    with refusals():
        launch = read_launch()
    if launch.size > 1:
        return train_as_one_of(launch, argv, prog)
    return run_from_command_line(parse_config(argv, prog, launch=launch), prog, ranks=Ranks(launch))


def run_from_command_line(
    config: Config, prog: str = "python train.py", again: str | None = None, ranks: Ranks | None = None
) -> int:
    """Train, draw, export and print a summary; the process's exit status.

    A run that is stopped names the command that goes on: `again`, or `prog` with --resume.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("fastjepa").setLevel(logging.INFO if ranks is None or ranks.is_first else logging.ERROR)
    started = time.perf_counter()
    trainer = None

    def how_to_go_on() -> str:
        if trainer is None:
            return ""
        return f"; continue with: {again or f'{prog} --resume {shlex.quote(str(trainer.folder))}'}"

    with refusals(*REFUSALS, LostRanksError):
        try:
            trainer = Trainer(config, ranks)
            print(describe(trainer), flush=True)
            trained = trainer.run() is not None
            files = trainer.finish()
        except KeyboardInterrupt:
            print(f"stopped{how_to_go_on()}")
            return STOPPED
        except Interrupted as stopped:
            print(f"stopped by {stopped}{how_to_go_on()}")
            return 128 + stopped.signal_number
    print(summary(trainer, time.perf_counter() - started, files, trained=trained))
    return 0


def train_as_one_of(launch: Launch, argv: Sequence[str] | None, prog: str) -> int:
    """`main` of one of several processes. The first speaks for all; all have the same flags, and end together."""
    argv = sys.argv[1:] if argv is None else list(argv)
    ranks = Ranks(launch, refusals=(*ALWAYS_REFUSED, *REFUSALS))
    with ended_at_once(), heard_if(ranks.is_first), refusals(LostRanksError), ranks.joined():
        run = ranks.from_first(lambda: find_saved_run(argv, prog, restartable=launch.restartable))
        config = parse_alike(ranks, lambda: parse_config(argv, prog, launch=launch, run=run))
        script = f"-m {prog}" if prog.startswith("fastjepa") else prog.removeprefix("python ")
        return run_from_command_line(config, f"{launch.command} {script}", ranks=ranks)


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
    """A SystemExit inside ends the process here, with its status. The threads of process groups, which an error leaves
    running, may abort the process while the interpreter takes itself apart.
    """
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.code, int):  # a message, which the interpreter prints
            raise
        with contextlib.suppress(OSError):  # nobody reads any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(error.code)
