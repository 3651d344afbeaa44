"""A run that begins where a checkpoint of the original ended (`--from_eb_jepa`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastjepa.config import Config, preset_config, resolve_preset
from fastjepa.files.safe_files import CheckpointError
from fastjepa.files.tensor_files import shown
from fastjepa.storage.eb_jepa_run import EbJepaRun, load_eb_jepa_run
from fastjepa.training.progress import say


def defaults_from_eb_jepa(path: Path, preset: str, device: torch.device, *, own_lr: bool = False) -> Config:
    """The defaults of a run that goes on from this file: those of the preset ("auto" takes the published recipe, which
    the file is of), with its sizes and its learning rate. With `own_lr`, which is for a run that is given another, the
    file's is not looked at: where a schedule ended it may be 0.

    Raises:
        CheckpointError: the file cannot be used.
        ValueError: an unknown preset, or a model that is not for Moving MNIST.
    """
    run = _load(path)
    defaults = preset_config("full" if preset == "auto" else resolve_preset(preset, device))
    values: dict[str, Any] = {**run.sizes, "from_eb_jepa": path}
    if not own_lr:
        values["lr"] = float(run.optimizer.param_groups[0]["lr"])
    try:
        return dataclasses.replace(defaults, **values)
    except ValueError as error:
        raise ValueError(f"--from_eb_jepa {path} cannot be trained here: {error}") from error


def read_start(config: Config) -> EbJepaRun | None:
    """What the run begins with, checked against its options; None if it begins anew or is resumed.

    Raises:
        CheckpointError: the file cannot be used.
        ValueError: an option contradicts it.
    """
    path = config.from_eb_jepa
    if path is None or config.resume is not None:
        return None
    run = _load(path, std_coeff=config.std_coeff, cov_coeff=config.cov_coeff)
    asked = {name: getattr(config, name) for name in run.sizes}
    asked["projector"] = config.projector or f"{config.dstc}-64-64"
    differing = [
        f"--{name} {asked[name]} (the file has {size})" for name, size in run.sizes.items() if size != asked[name]
    ]
    if differing:
        raise ValueError(f"--from_eb_jepa {path} is of another size than asked for: {', '.join(differing)}")
    if kinds := {str(p.dtype) for module in run.modules.values() for p in module.parameters()} - {"torch.float32"}:
        raise ValueError(f"--from_eb_jepa {path} has weights in {', '.join(kinds)}; training takes torch.float32")
    if run.epoch >= config.epochs:
        raise ValueError(
            f"--from_eb_jepa {path} ended after epoch {run.epoch}, and --epochs {config.epochs} counts those too: give "
            f"more than {run.epoch}"
        )
    if config.max_steps is not None and run.step >= config.max_steps:
        raise ValueError(
            f"--from_eb_jepa {path} ended after step {run.step}, and --max_steps {config.max_steps} counts those too: "
            f"give more than {run.step}"
        )
    return run


def continue_from(
    run: EbJepaRun, config: Config, modules: Mapping[str, nn.Module], optimizer: torch.optim.Adam
) -> tuple[int, int]:
    """Put weights and Adam's state into the modules of a new run, say what was not there; its epoch and step.

    Learning rates are the configuration's: that is where the file's came to, unless a flag gave another.

    Raises:
        CheckpointError: something does not fit; then nothing has changed.
    """
    for group, rate in zip(run.optimizer.param_groups, (config.lr, config.lr / 10, config.lr), strict=True):
        group["lr"] = rate
    run.copy_into(modules, optimizer)
    say(
        f"goes on from {config.from_eb_jepa} after epoch {run.epoch}, step {run.step}; it has no loss coefficients, "
        f"taken are std {config.std_coeff:g} and cov {config.cov_coeff:g}"
    )
    if run.new_heads:
        names = " and ".join(name.replace("_", " ") for name in run.new_heads)
        say(f"it has no weights of {names}: begun anew, with fresh Adam state")
    if run.unused:
        say(f"not used of it: {', '.join(map(shown, run.unused))}")
    return run.epoch, run.step


def _load(path: Path, **coefficients: Any) -> EbJepaRun:
    try:
        return load_eb_jepa_run(path, **coefficients)
    except CheckpointError as error:
        raise CheckpointError(f"--from_eb_jepa {path}: {error}") from error
