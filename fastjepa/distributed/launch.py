"""How this process was started: alone, or as one of several by torchrun, which says so in environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands that train in other processes read this, and their --help does without torch
    import torch

HOW = "start with torchrun, as in: torchrun --nproc_per_node 2 train.py ..."
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """One process among several.

    Attributes:
        rank, size: its number, from 0, and how many there are.
        local_rank: its number among those of its host, which is that of its GPU.
        local_size: how many its host has; 0 where that is not known.
        by_torchrun: whether torchrun started it, which hands signals on that a process may have had already.
        restarts: how often torchrun has started all of them again after one had failed.
        max_restarts: how often it would.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0
    max_restarts: int = 0
    local_size: int = 0
    by_torchrun: bool = False

    @property
    def command(self) -> str:
        """What starts as many processes, before the name of a script."""
        each = self.local_size or self.size
        hosts = -(-self.size // each)
        return (
            f"torchrun --nproc_per_node {each}"
            if hosts == 1
            else f"torchrun --nnodes {hosts} --nproc_per_node {each} ..."
        )

    @property
    def restartable(self) -> bool:
        """Whether torchrun starts all again when one fails, or has done so: hosts count that differently."""
        return self.restarts > 0 or self.max_restarts > 0


def read_launch(environ: Mapping[str, str] | None = None) -> Launch:
    """What the environment (default: this process's) says; without a word of it, a process alone.

    Raises:
        ValueError: some variables are there and others are not, or one is not what it should be.
    """
    environ = os.environ if environ is None else environ
    given = [name for name in _OF_A_RANK if name in environ]
    if not given:
        return Launch()
    wanted = (*_OF_A_RANK, *_RENDEZVOUS)
    if missing := [name for name in wanted if name not in environ]:
        there = ", ".join(f"{name}={environ[name]}" for name in wanted if name in environ)
        raise ValueError(
            f"the environment says that this is one of several processes ({there}), but lacks {', '.join(missing)}; "
            f"{HOW} (or unset {', '.join(given)} for a process alone)"
        )
    launch = Launch(
        rank=_number(environ, "RANK"),
        size=_number(environ, "WORLD_SIZE"),
        local_rank=_number(environ, "LOCAL_RANK"),
        restarts=_number(environ, "TORCHELASTIC_RESTART_COUNT", "0"),
        max_restarts=_number(environ, "TORCHELASTIC_MAX_RESTARTS", "0"),
        local_size=_number(environ, "LOCAL_WORLD_SIZE", "0"),
        by_torchrun="TORCHELASTIC_RUN_ID" in environ,
    )
    if not launch.rank < launch.size:
        raise ValueError(f"RANK must be less than WORLD_SIZE, got {launch.rank} of {launch.size}; {HOW}")
    return launch


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name, default)
    if text is None or not (text.isascii() and text.isdigit()):
        raise ValueError(f"the environment variable {name} must be a number of 0 or more, got {text!r}; {HOW}")
    return int(text)


def device_of(device: torch.device, launch: Launch) -> torch.device:
    """The device of one of several processes: of CUDA, that of its number on its host.

    Raises:
        ValueError: there are fewer GPUs than processes, or `device` is one GPU for all of them.
    """
    import torch

    if launch.size == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(f"--device {device} would be that of all {launch.size} processes; give cuda, for one each")
    there = torch.cuda.device_count()
    if launch.local_rank >= there:
        raise ValueError(
            f"this host has {there} GPU{'s' if there != 1 else ''}, and process {launch.local_rank} on it (from 0) has "
            f"none; start torchrun with --nproc_per_node {there}"
        )
    return torch.device("cuda", launch.local_rank)
