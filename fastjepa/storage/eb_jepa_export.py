"""Writing checkpoints that the original's `load_checkpoint` reads: `latest.pth.tar` of eb_jepa."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.files.safe_files import CheckpointError, write_atomic
from fastjepa.files.state_dicts import plain_state, strip_compile_prefix
from fastjepa.storage.adam_state import plain_execution, plain_tensor, reorder_adam_state
from fastjepa.storage.eb_jepa_checkpoint import is_state_dict, jepa_of_state
from fastjepa.storage.eb_jepa_run import check_finite, parameter_names, run_of_content


def save_eb_jepa_checkpoint(
    path: str | os.PathLike[str],
    jepa: nn.Module,
    optimizer: torch.optim.Adam | None = None,
    *,
    epoch: int,
    step: int,
    image_decoder: nn.Module | None = None,
    detection_head: nn.Module | None = None,
) -> None:
    """Write a checkpoint that the original loads: `load_checkpoint(path, jepa, optimizer)`, which returns `epoch`.

    The model is written as the original has it, under both names of the encoder and of the projector, whatever
    `accelerate` or torch.compile did to it. Adam's state is put into the order of the original's parameters, which that
    of an accelerated model is not, and says nothing of how Adam was computed (fused, capturable). The heads, if given,
    are further entries, `image_decoder_state_dict` and `detection_head_state_dict`, which `load_checkpoint` returns.

    Args:
        path: a file, replaced atomically.
        jepa: a Video JEPA of the published form, this project's or the original's.
        optimizer: over the JEPA, the image decoder and the detection head, as `fastjepa.model.step.build_optimizer`
            and the original's script make it; None writes no Adam state.
        epoch: epochs done, ≥ 0; the number (from 0) of the next one.
        step: optimiser steps done, ≥ 0.
        image_decoder, detection_head: the heads alone, without the JEPA that a probe has.

    Raises:
        ValueError: `epoch` or `step` is no such number, or the optimizer is over other parameters.
        CheckpointError: the model is not of the published form, something is NaN or infinite, or the system refused;
            what was at `path` is intact.
    """
    for name, value in (("epoch", epoch), ("step", step)):
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} must be a whole number ≥ 0, got {value!r}")
    heads = {"image_decoder": image_decoder, "detection_head": detection_head}
    modules = {name: plain_state(module) for name, module in heads.items() if module is not None}
    modules["jepa"] = plain_state(jepa)
    if optimizer is None:
        _write(path, modules, None, [], epoch=epoch, step=step)
    else:
        order = _order(optimizer, {"jepa": jepa, **heads})
        _write(path, modules, optimizer.state_dict(), order, epoch=epoch, step=step)


def write_run_for_eb_jepa(path: str | os.PathLike[str], state: Mapping[str, Any], *, epoch: int, step: int) -> None:
    """`save_eb_jepa_checkpoint` with what the checkpoint of a run holds (see `fastjepa.storage.checkpoint.snapshot`).

    Raises:
        CheckpointError: `state` is not of a run, or as `save_eb_jepa_checkpoint`.
    """
    modules, optimizer = state.get("modules"), state.get("optimizer")
    names = {"jepa", "image_decoder", "detection_head"}
    if not isinstance(modules, dict) or modules.keys() != names or not all(map(is_state_dict, modules.values())):
        raise CheckpointError("it does not have the modules of a run")
    if not isinstance(optimizer, dict):
        raise CheckpointError("it has no optimizer")
    # A state_dict has the parameters in the order in which the run's optimizer got them, whatever the networks were.
    _write(path, modules, optimizer, list(modules["jepa"]), epoch=epoch, step=step)


def _write(
    path: str | os.PathLike[str],
    modules: Mapping[str, Mapping[str, Tensor]],
    optimizer: Mapping[str, Any] | None,
    order: Sequence[str],
    *,
    epoch: int,
    step: int,
) -> None:
    """Write state_dicts. `order` has the names of the JEPA's parameters, among others, as the optimizer has them.

    Nothing is written that `load_eb_jepa_run` would refuse.
    """
    jepa = jepa_of_state(modules["jepa"], std_coeff=0.0, cov_coeff=0.0)  # in memory of its own, contiguous
    content: dict[str, Any] = {"model_state_dict": dict(jepa.state_dict())}
    if type(epoch) is int:
        content["epoch"] = epoch - 1  # the original counts the last one that it finished
    content["step"] = step
    for name in sorted(modules.keys() - {"jepa"}):
        content[f"{name}_state_dict"] = {key: plain_tensor(value) for key, value in modules[name].items()}
    if optimizer is None:
        check_finite("the JEPA", jepa.state_dict())
    else:
        names = parameter_names(jepa)
        try:
            rest = [[str(index) for index in group["params"]] for group in optimizer["param_groups"][1:]]
            ordered = reorder_adam_state(optimizer, [[n for n in order if n in names], *rest], [names, *rest])
            content["optimizer_state_dict"] = plain_execution(ordered)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"the optimizer is not Adam over a JEPA and its heads: {error!r}") from error
        run_of_content(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(path, lambda file: file.write(buffer.getbuffer()))


def _order(optimizer: torch.optim.Adam, modules: Mapping[str, nn.Module | None]) -> list[str]:
    """The names of the JEPA's parameters as the optimizer has them, after a look at what else it has."""
    if not isinstance(optimizer, torch.optim.Adam) or len(optimizer.param_groups) != len(modules):
        raise ValueError("optimizer must be Adam with three groups: the JEPA, the image decoder, the detection head")
    names: dict[str, dict[Tensor, str]] = {}
    for group, (what, module) in zip(optimizer.param_groups, modules.items(), strict=True):
        if module is None:
            continue
        names[what] = {parameter: strip_compile_prefix(name) for name, parameter in module.named_parameters()}
        if set(group["params"]) != names[what].keys():
            raise ValueError(f"the optimizer's group for {what} has other parameters than the {what} given")
    return [names["jepa"][parameter] for parameter in optimizer.param_groups[0]["params"]]
