"""The command line of training: flags over the defaults of a preset, or of the run that is resumed."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from fastjepa.config import (
    MAY_CHANGE_ON_RESUME,
    Config,
    preset_config,
    resolve_device,
    resolve_precision,
    resolve_preset,
)
from fastjepa.environment import device_name
from fastjepa.graphs.capture import use_cuda_graph
from fastjepa.kernels.checks import unavailable_reason
from fastjepa.optional_packages import MissingPackageError, needed_for
from fastjepa.storage.checkpoint import check_same_config
from fastjepa.storage.run_folder import read_run_config
from fastjepa.storage.safe_files import CheckpointError
from fastjepa.training.eb_jepa_start import defaults_from_eb_jepa
from fastjepa.training.stop_signals import Interrupted
from fastjepa.training.trainer import NonFiniteLossError, Trainer

T = TypeVar("T")

DESCRIPTION = """Train and evaluate a Video JEPA on Moving MNIST.

Without flags: the published recipe on a GPU, a demo of a few minutes on a CPU. Everything that the run makes
(checkpoint, metrics, pictures, exported weights) goes to one folder, named at the end."""


def fail(message: object) -> NoReturn:
    """End the program with exit status 2 and one line that says why."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_options(
    kind: type[T], argv: Sequence[str] | None, *, prog: str, description: str | None = None, default: T | None = None
) -> T:
    """The flags in `argv` (default: sys.argv) as an object of the dataclass `kind`, whose fields are the flags.

    Ends the program with exit status 2 if they cannot be parsed, or if tyro, which does it, is not installed.
    """
    try:
        with needed_for("the command line"):
            import tyro
    except MissingPackageError as error:
        fail(error)
    if default is None:
        return tyro.cli(kind, prog=prog, description=description, args=argv, use_underscores=True)
    return tyro.cli(kind, prog=prog, description=description, default=default, args=argv, use_underscores=True)


def parse_config(argv: Sequence[str] | None = None, prog: str = "train.py") -> Config:
    """The configuration that the flags in `argv` (default: sys.argv) ask for.

    The defaults of all other flags depend on --preset, --device and --from_eb_jepa, or on --resume, so those are looked
    at first.
    Prints a clear line and exits with status 2 if the flags cannot be served.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="auto")
    first.add_argument("--device", default="auto")
    first.add_argument("--resume", type=Path)
    first.add_argument("--from_eb_jepa", type=Path)
    chosen, _ = first.parse_known_args(argv)
    try:
        saved = None if chosen.resume is None else read_run_config(chosen.resume)
        if saved is None:
            device = resolve_device(chosen.device)
            if chosen.from_eb_jepa is None:
                default = preset_config(resolve_preset(chosen.preset, device))
            else:
                default = defaults_from_eb_jepa(chosen.from_eb_jepa, chosen.preset, device)
        else:
            default = dataclasses.replace(Config.from_json(saved), resume=chosen.resume, out=chosen.resume)
        config = parse_options(Config, argv, prog=prog, description=DESCRIPTION, default=default)
        if config.preset == "auto":  # given explicitly; tyro has parsed the word, not what it stands for
            config = dataclasses.replace(config, preset=default.preset)
        device = resolve_device(config.device)
        if config.precision == "auto":
            # A run keeps what it began with, on whatever device it goes on.
            kept = default.precision if saved is not None else "auto"
            config = dataclasses.replace(config, precision=resolve_precision(kept, device))
        if saved is not None:
            # Options that the run did not know yet have their defaults.
            check_same_config(Config.from_json(saved).to_json(), config.to_json(), MAY_CHANGE_ON_RESUME)
            if config.out != config.resume:
                raise ValueError("--out cannot be given with --resume: a run goes on in its own folder")
        if device.type != "cuda" and config.precision == "tf32":
            raise ValueError("--precision tf32 needs a CUDA device; use fp32 or bf16")
        if config.backend == "fused" and (reason := unavailable_reason(device)) is not None:
            raise ValueError(f"--backend fused cannot be served: {reason}; use auto or eager")
        use_cuda_graph(config.cuda_graph, device)
    except (ValueError, CheckpointError) as error:
        fail(error)
    return config


def run_from_command_line(config: Config) -> int:
    """Train, draw, export and print a summary; the process's exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("fastjepa").setLevel(logging.INFO)
    started = time.perf_counter()
    try:
        trainer = Trainer(config)
        print(describe(trainer))
        trainer.run()
        files = trainer.finish()
    except KeyboardInterrupt:
        print("stopped")
        return 130
    except Interrupted as stopped:
        print(f"stopped by {stopped}; continue with: python train.py --resume {trainer.folder}")
        return 128 + stopped.signal_number
    except (ValueError, OSError, CheckpointError, NonFiniteLossError, MissingPackageError) as error:
        fail(error)
    last = trainer.rows[-1]
    print(f"\ndone in {time.perf_counter() - started:.0f} s: {trainer.epoch} epochs, {trainer.global_step} steps")
    print(
        f"mAP {last['map']:.3f} (pooled {last['pooled_map']:.3f}), AP_0 {last['ap_0']:.3f}; guessing would give "
        f"{last['positive_share']:.3f}"
    )
    print("wrote:")
    for path in files:
        print(f"  {path}")
    return 0


def describe(trainer: Trainer) -> str:
    """What will be trained, on what, and where it goes."""
    config, parameters = trainer.config, sum(p.numel() for p in trainer.jepa.parameters())
    small = " (small, for a CPU; --preset full is the published recipe)" if config.preset == "demo" else ""
    resolution = trainer.resolution
    how = f"computes with: {resolution.choice} (--backend, --cuda_graph)"
    if resolution.report:
        how += f"\n{resolution.report}"
    return (
        f"preset {config.preset}{small}; {device_name(trainer.device)}\n"
        f"precision {config.precision} (--precision changes it); {how}\n"
        f"{parameters:,} parameters; {len(trainer.train_clips):,} + {len(trainer.val_clips):,} clips of "
        f"{config.n_frames}×{config.canvas}×{config.canvas} ({config.data}); {config.epochs} epochs of batches of "
        f"{config.batch_size}\nfolder: {trainer.folder}"
    )
