"""Checkpoints that survive: written whole or not at all, read without running code, put back exactly or not at all."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.files.safe_files import CheckpointError, write_atomic
from fastjepa.files.state_dicts import check_tensors, plain_state
from fastjepa.files.tensor_files import read_tensor_file
from fastjepa.storage.adam_state import plan_adam_load
from fastjepa.storage.rng_state import check_rng_snapshot, load_rng_snapshot, rng_snapshot

FORMAT = "fastjepa checkpoint"
VERSION = 1

_PLAIN_TYPES = (type(None), bool, int, float, str)
_SECTIONS = ("modules", "optimizer", "rng", "progress", "config")


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values, nested in dicts, lists and tuples, for `load_checkpoint`.

    Raises:
        CheckpointError: the system refused; the previous file is intact.
        TypeError: something in `state` could not be loaded again; it names the entry.
    """
    _check_plain(state, "state")
    # Serialised in memory first: torch.save turns a full disk into an exception that no longer says so.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, "state": state}, buffer)
    write_atomic(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """The dict that `save_checkpoint` wrote, loaded with `weights_only=True`.

    Raises:
        CheckpointError: missing, damaged, of another kind, or written by a newer version.
    """
    content = read_tensor_file(path, map_location)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is a file of torch.save, but not a {FORMAT}")
    version, state = content.get("version"), content.get("state")
    if type(version) is not int or version < 1 or not isinstance(state, dict):
        raise CheckpointError(f"{path} is damaged: it has no valid version or state")
    if version > VERSION:
        raise CheckpointError(f"{path} has format version {version}; this fastjepa reads up to {VERSION}: update it")
    return state


def _check_plain(value: Any, where: str) -> None:
    # Exact types: a numpy float is a float and a str-Enum a str, but neither loads with weights_only=True.
    if type(value) in _PLAIN_TYPES or type(value) in (Tensor, nn.Parameter):
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{where} has the key {key!r}; keys must be str or int")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    else:
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint takes tensors and plain Python values")


def snapshot(
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Adam,
    progress: Mapping[str, int | float],
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything a run needs to go on exactly: a copy on the CPU, so that training may continue before it is saved.

    `progress` is whatever the caller counts (epoch, step, ...); `config` is kept for `check_same_config`. The random
    number generators are recorded too.
    """
    return {
        "modules": {name: _copy(plain_state(module)) for name, module in modules.items()},
        "optimizer": _copy(optimizer.state_dict()),
        "rng": rng_snapshot(),
        "progress": dict(progress),
        "config": dict(config),
    }


def load_snapshot(
    state: Mapping[str, Any], modules: Mapping[str, nn.Module], optimizer: torch.optim.Adam
) -> dict[str, int | float]:
    """Put a snapshot back, in place, and return its `progress`. All or nothing.

    Parameters, buffers and existing optimizer state keep their memory (CUDA graphs and views stay valid). How Adam is
    computed (fused, foreach, capturable) is left as the optimizer has it. The random number generators come last.

    Raises:
        CheckpointError: a key, shape, dtype or value does not fit; then nothing at all has changed.
    """
    for name in _SECTIONS:
        if not isinstance(state.get(name), dict):
            raise CheckpointError(f"the checkpoint has no section {name!r}")
    for key, value in state["progress"].items():
        if type(value) not in (int, float):
            raise CheckpointError(f"progress[{key!r}] in the checkpoint is not a number")
    copies = _module_copies(state, modules)
    try:
        load_optimizer = plan_adam_load(optimizer, state["optimizer"])
    except ValueError as error:
        raise CheckpointError(f"the optimizer in the checkpoint does not fit: {error}") from error
    try:
        check_rng_snapshot(state["rng"])
    except Exception as error:  # each library complains in its own way
        raise CheckpointError(f"the random number generator state in the checkpoint is damaged: {error}") from error

    _copy_all(copies)
    load_optimizer()
    load_rng_snapshot(state["rng"])
    return dict(state["progress"])


def load_modules(state: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
    """Put only the modules of a snapshot back, in place, to evaluate them or look at them. All or nothing.

    Raises:
        CheckpointError: the modules or their tensors do not fit; then nothing has changed.
    """
    if not isinstance(state.get("modules"), dict):
        raise CheckpointError("the checkpoint has no section 'modules'")
    _copy_all(_module_copies(state, modules))


def _module_copies(state: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """(target, source) for every tensor of the modules, all checked to fit."""
    if state["modules"].keys() != modules.keys():
        raise CheckpointError(f"the checkpoint holds {sorted(state['modules'])}, expected {sorted(modules)}")
    copies = []
    for name, module in modules.items():
        targets, saved = plain_state(module), state["modules"][name]
        check_tensors(f"{name} in the checkpoint", targets, saved)
        copies += [(targets[key], saved[key]) for key in targets]
    return copies


@torch.no_grad()
def _copy_all(copies: list[tuple[Tensor, Tensor]]) -> None:
    for target, source in copies:
        target.copy_(source)


def _copy(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples with every tensor in new CPU memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return type(value)(_copy(item) for item in value) if isinstance(value, (list, tuple)) else value


def check_same_config(saved: Mapping[str, Any], current: Mapping[str, Any], may_differ: Collection[str]) -> None:
    """Raise CheckpointError listing every field that differs, with both values, except those in `may_differ`.

    Raises:
        ValueError: `may_differ` names a field that neither config has.
    """
    unknown = sorted(set(may_differ) - saved.keys() - current.keys())
    if unknown:
        raise ValueError(f"may_differ names fields that do not exist: {', '.join(unknown)}")
    lines = []
    for name in [*current, *(name for name in saved if name not in current)]:
        before, now = (repr(c[name]) if name in c else "(absent)" for c in (saved, current))
        if name not in may_differ and (name not in saved or name not in current or saved[name] != current[name]):
            lines.append(f"  {name}: {before} in the checkpoint, {now} now")
    if lines:
        raise CheckpointError("the checkpoint belongs to a run with another configuration:\n" + "\n".join(lines))
