"""What a run resolves once, when it starts, and keeps for its whole life: how its numbers are computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastjepa.calibration.choice import EAGER, Choice
from fastjepa.calibration.setting import setting_of_config
from fastjepa.calibration.verdict import VARIABLE, resolve
from fastjepa.config import Config
from fastjepa.files.safe_files import CheckpointError
from fastjepa.graphs import use_cuda_graph
from fastjepa.kernels.checks import unavailable_reason


@dataclass(frozen=True)
class Resolution:
    """The precision and the choice of a run; `report` says how it was found, "" where nothing was measured."""

    precision: str
    choice: Choice
    report: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the checkpoint."""
        return {"precision": self.precision, **self.choice.to_json()}


def resolve_run(config: Config, device: torch.device) -> Resolution:
    """How a new run computes; `config.precision` is resolved already. On a GPU, what its flags leave to "auto" is
    calibrated.

    Raises:
        ValueError: a flag that this device cannot serve, or whose every candidate was found not to work on it;
            FASTJEPA_CALIBRATE is neither 0 nor 1.
    """
    assert config.precision != "auto"
    usual = _without_measuring(config, device)
    if device.type != "cuda" or (config.backend != "auto" and config.cuda_graph != "auto"):
        return Resolution(config.precision, usual)

    def allowed(choice: Choice) -> bool:
        of_backend = {
            "auto": True,
            "eager": not choice.batch_norm and choice.losses == "eager",
            "fused": choice.batch_norm and choice.losses == "fused",
        }[config.backend]
        return of_backend and config.cuda_graph in ("auto", "on" if choice.cuda_graph else "off")

    setting = setting_of_config(config, device, config.precision)
    verdict = resolve(setting, device, allowed=allowed, cache_dir=config.cache_dir)
    if not allowed(EAGER) and (problem := verdict.broken(allowed)) is not None:
        asked = " ".join(
            f"--{name} {value}"
            for name, value in (("backend", config.backend), ("cuda_graph", config.cuda_graph))
            if value != "auto"
        )
        raise ValueError(
            f"{asked} cannot be served here: nothing with it works, for example {problem}; leave it to auto, or set "
            f"{VARIABLE}=0 to run it unchecked ({verdict.origin})"
        )
    chosen = verdict.best(allowed, usual)
    return Resolution(config.precision, chosen, verdict.report(chosen))


def resolution_of(state: Mapping[str, Any], config: Config, device: torch.device, path: Path) -> Resolution:
    """How a resumed run goes on: exactly as it began, but for a graph that a flag asks for or refuses.

    A run from before this was recorded computes as such runs did.

    Raises:
        CheckpointError: the record is damaged.
        ValueError: what was resolved cannot be served here; the message says why.
    """
    if "resolved" not in state:
        return Resolution(config.precision, _without_measuring(config, device))
    choice = read_choice(state, path)
    if state["resolved"]["precision"] != config.precision:
        raise CheckpointError(f"{path} was resolved to {state['resolved']['precision']!r}, not {config.precision!r}")
    if config.cuda_graph != "auto":
        choice = dataclasses.replace(choice, cuda_graph=use_cuda_graph(config.cuda_graph, device))
    elif choice.cuda_graph:
        try:
            use_cuda_graph("on", device)
        except ValueError:
            raise ValueError(
                f"the run in {path.parent} began with CUDA graphs, and this runs on {device}; --cuda_graph off goes on "
                "without, with the same numbers"
            ) from None
    if choice.needs_kernels and (reason := unavailable_reason(device)) is not None:
        raise ValueError(f"the run in {path.parent} began with {choice}, which cannot be served here: {reason}")
    return Resolution(config.precision, choice, "as the run began")


def read_choice(state: Mapping[str, Any], path: Path) -> Choice:
    """The choice in a checkpoint, eager if it records none. Raises CheckpointError if the record is damaged."""
    values = state.get("resolved", {"precision": "", **Choice().to_json()})
    try:
        if not isinstance(values, Mapping) or type(values.get("precision")) is not str:
            raise ValueError("it is no table with a precision")
        return Choice.from_json({name: value for name, value in values.items() if name != "precision"})
    except ValueError as error:
        raise CheckpointError(f"{path}: what the run resolved is damaged: {error}") from error


def _without_measuring(config: Config, device: torch.device) -> Choice:
    """What flags and device alone say."""
    fused, on_cpu = config.backend == "fused", device.type == "cpu"
    return Choice(
        batch_norm=fused,
        losses="fused" if fused else "closed_form" if on_cpu and config.backend == "auto" else "eager",
        cuda_graph=use_cuda_graph(config.cuda_graph, device),
        recompute=fused,
        # On a CPU this makes steps of the demo about a fifth shorter; on a GPU it is the layout of the tensor cores,
        # which fp32 does not use.
        channels_last=on_cpu or config.precision != "fp32",
    )
