"""What a run resolves once, when it starts, and keeps for its whole life: how its numbers are computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastjepa.calibration.choice import EAGER, Choice
from fastjepa.calibration.memory import Memory, recompute_first
from fastjepa.calibration.setting import setting_of_config
from fastjepa.calibration.verdict import VARIABLE, resolve, switched_off
from fastjepa.config import Config
from fastjepa.distributed.ranks import Ranks
from fastjepa.files.safe_files import CheckpointError
from fastjepa.fused.step_memory import memory_on
from fastjepa.graphs import use_cuda_graph
from fastjepa.kernels.checks import unavailable_reason
from fastjepa.model.networks import DetHead


@dataclass(frozen=True)
class Resolution:
    """The precision and the choice of a run; `report` says how they were found, "" where by flags alone."""

    precision: str
    choice: Choice
    report: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the checkpoint."""
        return {"precision": self.precision, **self.choice.to_json()}


def resolve_run(config: Config, device: torch.device, ranks: Ranks | None = None) -> Resolution:
    """How a new run computes; `config.precision` is resolved already. On a GPU, what its flags leave to "auto" is
    calibrated, or, of recomputation, counted; of several processes, at the clips of one, and without what joins them.

    Raises:
        ValueError: a flag that this device cannot serve, or whose every candidate was found not to work on it;
            FASTJEPA_CALIBRATE is neither 0 nor 1.
    """
    ranks = ranks or Ranks()
    config = dataclasses.replace(config, batch_size=max(ranks.counts(config.batch_size)))
    refuse_recompute(config, device)
    graph_problem = graph_problem_of(config, ranks, device)
    if graph_problem and config.cuda_graph == "on":
        raise ValueError(f"--cuda_graph on cannot be served: {graph_problem}; use auto or off")
    if graph_problem:
        config = dataclasses.replace(config, cuda_graph="off")
    assert config.precision != "auto"
    memory = _count_memory(config, device)
    recompute = recompute_first(memory) if config.recompute == "auto" else config.recompute == "on"
    usual = _without_measuring(config, device, recompute)
    if device.type != "cuda" or (config.backend != "auto" and config.cuda_graph != "auto"):
        return Resolution(config.precision, usual, _lines(str(memory), graph_problem))

    def allowed(choice: Choice) -> bool:
        of_backend = {
            "auto": True,
            "eager": not choice.batch_norm and choice.losses == "eager",
            "fused": choice.batch_norm and choice.losses == "fused",
        }[config.backend]
        return (
            of_backend
            and config.cuda_graph in ("auto", "on" if choice.cuda_graph else "off")
            and config.recompute in ("auto", "on" if choice.recompute else "off")
            and (isinstance(memory, str) or memory.allows(choice))
        )

    setting = setting_of_config(config, device, config.precision)
    verdict = resolve(setting, device, allowed=allowed, recompute=recompute, cache_dir=config.cache_dir)
    if not allowed(EAGER) and (problem := verdict.broken(allowed)) is not None:
        asked = " ".join(
            f"--{name} {value}"
            for name in ("backend", "cuda_graph", "recompute")
            if (value := getattr(config, name)) != "auto"
        )
        raise ValueError(
            f"{asked} cannot be served here: nothing with it works, for example {problem}; leave it to auto, or set "
            f"{VARIABLE}=0 to run it unchecked ({verdict.origin})"
        )
    chosen = verdict.best(allowed, usual)
    report = verdict.report(chosen) + (f"\n  {memory}" if str(memory) else "")
    return Resolution(config.precision, chosen, _lines(report, graph_problem))


def graph_problem_of(config: Config, ranks: Ranks, device: torch.device) -> str:
    """Why steps of this run cannot be recorded as CUDA graphs, where there are such; "" if they can."""
    if device.type != "cuda":
        return ""
    if config.data == "shards":
        return "a graph gathers clips that lie on the GPU, and those of --data shards are streamed from disk"
    if ranks.can_be_recorded:
        return ""
    return f"statistics and gradients go over {ranks.backend}, by way of the host, and only NCCL can be in a CUDA graph"


def _lines(report: str, graph_problem: str) -> str:
    return "\n".join(filter(None, (report, graph_problem and f"no CUDA graphs: {graph_problem}")))


def refuse_recompute(config: Config, device: torch.device) -> None:
    """Raises ValueError for --recompute on where there are no fused networks, which alone can do it."""
    if config.recompute not in ("auto", "on", "off"):
        raise ValueError(f"--recompute must be auto, on or off; got {config.recompute!r}")
    if config.recompute != "on":
        return
    if config.backend == "eager":
        raise ValueError("--recompute on is for fused networks, and --backend eager has none; use auto or off")
    if config.backend == "auto" and device.type != "cuda":
        raise ValueError(f"--recompute on is for fused networks, which auto never takes on {device}; use auto or off")
    if (reason := unavailable_reason(device)) is not None:
        raise ValueError(f"--recompute on is for fused networks, which cannot be served: {reason}; use auto or off")


def _count_memory(config: Config, device: torch.device) -> Memory | str:
    """What a step needs with and without recomputation; or why that is not known, "" where it does not matter."""
    never_fused = config.backend == "eager" or (config.backend == "auto" and switched_off())
    if device.type != "cuda" or never_fused or config.recompute != "auto":
        return ""
    assert config.precision != "auto"
    setting = setting_of_config(config, device, config.precision)
    frames = (config.n_train + config.n_val) * config.n_frames
    clips = frames * (config.canvas**2 + DetHead.CELLS**2)  # uint8
    return memory_on(setting, device, clips)


def resolution_of(state: Mapping[str, Any], config: Config, device: torch.device, path: Path) -> Resolution:
    """How a resumed run goes on: exactly as it began, but for a graph or recomputation that a flag asks for or refuses.

    A run from before this was recorded computes as such runs did.

    Raises:
        CheckpointError: the record is damaged.
        ValueError: what was resolved, or a flag, cannot be served here; the message says why.
    """
    if "resolved" not in state:
        began = _without_measuring(dataclasses.replace(config, recompute="auto"), device, recompute=True)
        return Resolution(config.precision, _with_recomputation(began, config, path))
    choice = read_choice(state, path)
    if state["resolved"]["precision"] != config.precision:
        raise CheckpointError(f"{path} was resolved to {state['resolved']['precision']!r}, not {config.precision!r}")
    choice = _with_recomputation(choice, config, path)
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


def _with_recomputation(began: Choice, config: Config, path: Path) -> Choice:
    """The choice of a resumed run, but with recomputation as its flag says."""
    if config.recompute == "on" and not began.batch_norm:
        raise ValueError(
            f"--recompute on is for fused networks, and the run in {path.parent} began without ({began}); use auto or "
            "off"
        )
    return began if config.recompute == "auto" else dataclasses.replace(began, recompute=config.recompute == "on")


def read_choice(state: Mapping[str, Any], path: Path) -> Choice:
    """The choice in a checkpoint, eager if it records none. Raises CheckpointError if the record is damaged."""
    values = state.get("resolved", {"precision": "", **Choice().to_json()})
    try:
        if not isinstance(values, Mapping) or type(values.get("precision")) is not str:
            raise ValueError("it is no table with a precision")
        before = {"convolutions": ""}  # a run from before this was a field
        choice = Choice.from_json({**before, **{name: value for name, value in values.items() if name != "precision"}})
        if choice.convolutions:
            raise ValueError(f"own convolutions are for inference, and it has {choice}")
        return choice
    except ValueError as error:
        raise CheckpointError(f"{path}: what the run resolved is damaged: {error}") from error


def _without_measuring(config: Config, device: torch.device, recompute: bool) -> Choice:
    """What flags, device and counted memory alone say."""
    on_cpu = device.type == "cpu"
    fused = config.backend == "fused" or config.recompute == "on"  # which asks for fused networks too
    return Choice(
        batch_norm=fused,
        losses="fused" if fused else "closed_form" if on_cpu and config.backend == "auto" else "eager",
        cuda_graph=use_cuda_graph(config.cuda_graph, device),
        recompute=fused and recompute,
        # On a CPU this makes steps of the demo about a fifth shorter; on a GPU it is the layout of the tensor cores,
        # which fp32 does not use.
        channels_last=on_cpu or config.precision != "fp32",
    )
