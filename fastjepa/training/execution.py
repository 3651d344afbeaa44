"""How a run is computed: resolved when it begins, saved with it, and used again when it is resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastjepa import autotune
from fastjepa.config import Config
from fastjepa.distributed.ranks import Ranks
from fastjepa.execution import ExecutionConfig
from fastjepa.files.safe_files import CheckpointError
from fastjepa.fused.auto import Widths, resolve_execution
from fastjepa.graphs import use_cuda_graph
from fastjepa.kernels.checks import unavailable_reason


def begun_execution(config: Config, device: torch.device, ranks: Ranks) -> tuple[ExecutionConfig, str]:
    """How a new run computes, `config.precision` being resolved, and what is to be said of it.

    Raises:
        ValueError: a flag asks for what is not supported here.
    """
    assert config.precision != "auto"
    projector = config.projector or f"{config.dstc}-64-64"
    return resolve_execution(
        device,
        config.precision,
        Widths(config.dobs, config.henc, config.hpre, config.dstc, projector),
        backend=config.backend,
        cuda_graph=config.cuda_graph,
        recompute=config.recompute == "on",
        no_graph=no_graph_reason(config, ranks, device),
        cache_dir=config.cache_dir,
    )


def resumed_execution(
    state: Mapping[str, Any], config: Config, device: torch.device, path: Path
) -> tuple[ExecutionConfig, str]:
    """How a resumed run goes on: as it began, but for a graph or recomputation that a flag asks for or refuses.

    Raises:
        CheckpointError: what the checkpoint says of it is damaged.
        ValueError: what the run began with, or a flag, is not supported here; the message says why.
    """
    began, told = read_execution(state, device, path)
    if began.precision != config.precision:
        raise CheckpointError(f"{path} was computed in {began.precision!r}, not {config.precision!r}")
    if config.recompute == "on" and not began.fused:
        raise ValueError(f"--recompute on needs fused networks, and the run in {path.parent} began without ({began})")
    graph = use_cuda_graph(config.cuda_graph, device, auto=began.cuda_graph)
    if began.cuda_graph and config.cuda_graph == "auto" and not graph:
        raise ValueError(
            f"the run in {path.parent} began with CUDA graphs, and this runs on {device}; --cuda_graph off goes on "
            "without, with the same numbers"
        )
    if began.fused and (reason := unavailable_reason(device)) is not None:
        raise ValueError(f"the run in {path.parent} began with {began}, which is not supported here: {reason}")
    recompute = {"auto": began.recompute, "on": True, "off": False}[config.recompute]
    return dataclasses.replace(began, cuda_graph=graph, recompute=recompute), told


def first_decides(ranks: Ranks, work: Callable[[], tuple[ExecutionConfig, str]]) -> tuple[ExecutionConfig, str]:
    """What `work` gives on the first process, for all, with what autotune has chosen there: none of them times alone
    what the first has from a checkpoint.
    """
    execution, notes, choices = ranks.from_first(lambda: (*work(), autotune.chosen()))
    autotune.use(choices)
    return execution, notes


def read_execution(state: Mapping[str, Any], device: torch.device, path: Path) -> tuple[ExecutionConfig, str]:
    """How the run of a checkpoint computes, and what is to be said of that; `autotune` takes over its choices.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        autotune.use(state.get("autotuned", {}))
        if "execution" in state:
            return ExecutionConfig.from_json(state["execution"]), ""
        return _of_earlier_version(state, device)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: what it says of how the run computes is damaged: {error}") from error


def _of_earlier_version(state: Mapping[str, Any], device: torch.device) -> tuple[ExecutionConfig, str]:
    """From a table that named blocks and losses apart; a run of before that was eager."""
    before = {"precision": state.get("config", {}).get("precision"), "batch_norm": False, "losses": "eager"}
    old = state.get("resolved", before)
    fused = old["batch_norm"] and old["losses"] == "fused"
    values = {name: old.get(name, False) for name in ("cuda_graph", "recompute", "channels_last")}
    found = {"precision": old["precision"], "fused": fused, **values, "recompute": fused and values["recompute"]}
    told = ""
    if not fused and (old["batch_norm"] or old["losses"] == "fused"):
        told = "the run began with a part of the fused kernels; it goes on eagerly, with the same numbers to rounding"
    elif old["losses"] == "eager" and device.type == "cpu":
        told = "the run began with eager losses; a CPU goes on in closed form, with the same numbers to rounding"
    return ExecutionConfig.from_json(found), told


def no_graph_reason(config: Config, ranks: Ranks, device: torch.device) -> str:
    """Why steps of this run cannot be captured as CUDA graphs, on a device that has them; "" if they can."""
    if device.type != "cuda":
        return ""
    if config.data == "shards":
        return "a graph gathers clips that lie on the GPU, and those of --data shards are streamed from disk"
    if ranks.can_be_recorded:
        return ""
    return f"statistics and gradients go over {ranks.backend}, by way of the host, and only NCCL can be in a CUDA graph"
