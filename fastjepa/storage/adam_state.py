"""Putting Adam's state back in place: checked completely first, and into the memory that it already uses."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastjepa.files.tensor_files import shown

# How Adam is computed, not what: these suit the machine that runs now, and are not taken from a checkpoint.
_EXECUTION_KEYS = {"foreach", "fused", "capturable", "differentiable"}

# Settings that Adam got later (torch 1.11 and 2.8), with what it did before: a file from then lacks them.
_ADDED_LATER = {"maximize": False, "decoupled_weight_decay": False}


def plan_adam_load(optimizer: torch.optim.Adam, saved: Mapping[str, Any]) -> Callable[[], None]:
    """Check a state_dict of Adam against an optimizer and return what will put it back; nothing is changed yet.

    `torch.optim.Optimizer.load_state_dict` neither checks the shapes nor keeps the memory of the state, which a
    captured CUDA graph goes on writing to. Saved tensors may be on any device.

    Raises:
        ValueError: groups, parameters, hyperparameters or state do not fit; it names what.
    """
    groups, saved_groups = optimizer.param_groups, saved.get("param_groups")
    if not isinstance(saved_groups, list) or len(saved_groups) != len(groups):
        found = len(saved_groups) if isinstance(saved_groups, list) else "no"
        raise ValueError(f"the optimizer has {len(groups)} parameter groups, the saved one {found}")
    saved_state = saved.get("state")
    if not isinstance(saved_state, Mapping):
        raise ValueError("the saved optimizer has no state")

    copies: list[tuple[Tensor, Tensor]] = []
    settings: list[tuple[dict[str, Any], str, Any]] = []
    created: dict[Tensor, dict[str, Tensor]] = {}
    index = 0  # state_dict numbers the parameters through all groups
    for number, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        where = f"optimizer group {number}"
        count = len(group["params"])
        if not isinstance(saved_group, Mapping) or saved_group.get("params") != list(range(index, index + count)):
            raise ValueError(f"{where} has {count} parameters; the saved one has others")
        saved_group = {**_ADDED_LATER, **saved_group}
        _plan_settings(where, group, saved_group, copies, settings)
        for param in group["params"]:
            state = saved_state.get(index, {})
            target = _plan_param(f"{where}, parameter {index}", optimizer, group, param, state, saved_group, copies)
            if target is not None:
                created[param] = target
            index += 1
    unknown = [key for key in saved_state if key not in range(index)]
    if unknown:
        raise ValueError(f"the saved optimizer has state of parameters that do not exist: {unknown[:5]}")

    @torch.no_grad()
    def apply() -> None:
        for target, source in copies:
            target.copy_(source)
        for group, key, value in settings:
            group[key] = value
        optimizer.state.update(created)

    return apply


def _plan_settings(
    where: str,
    group: dict[str, Any],
    saved: Mapping[str, Any],
    copies: list[tuple[Tensor, Tensor]],
    settings: list[tuple[dict[str, Any], str, Any]],
) -> None:
    # A learning rate schedule adds initial_lr; whether it is made before or after loading does not matter.
    differing = (group.keys() ^ saved.keys()) - {"initial_lr"} - _EXECUTION_KEYS
    if differing:
        raise ValueError(f"{where} and the saved one do not have the same settings: {', '.join(sorted(differing))}")
    for key, value in saved.items():
        if key == "params" or key in _EXECUTION_KEYS:
            continue
        current = group.get(key, value)
        if isinstance(current, Tensor) and _is_number(value):
            copies.append((current, torch.as_tensor(value)))  # in place: a captured graph reads the rate from there
        elif _is_number(current) and _is_number(value):
            settings.append((group, key, value.item() if isinstance(value, Tensor) else value))
        elif type(current) is type(value) and (not isinstance(value, tuple) or len(current) == len(value)):
            settings.append((group, key, value))
        else:
            raise ValueError(f"{where}: {key} is saved as {shown(value)}, here it is {current!r}")
    _check_values(where, saved)


def _check_values(where: str, saved: Mapping[str, Any]) -> None:
    """Refuse numbers that Adam's constructor would refuse, or that would make every parameter NaN."""
    for key in ("lr", "initial_lr", "eps", "weight_decay"):
        value = saved.get(key, 0.0)
        if not (_is_number(value) and 0 <= value <= sys.float_info.max):  # an int can be beyond every float
            raise ValueError(f"{where}: {key} is saved as {shown(value)}, expected a number ≥ 0")
    for beta in saved["betas"]:
        if not (_is_number(beta) and 0 <= beta < 1):
            raise ValueError(f"{where}: betas are saved with {shown(beta)}, expected numbers from 0 to below 1")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) or (isinstance(value, Tensor) and value.dim() == 0)


def _plan_param(
    where: str,
    optimizer: torch.optim.Adam,
    group: Mapping[str, Any],
    param: Tensor,
    saved: Any,
    saved_group: Mapping[str, Any],
    copies: list[tuple[Tensor, Tensor]],
) -> dict[str, Tensor] | None:
    """Append the copies for one parameter; return the state that they fill if the parameter has none yet."""
    moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if saved_group["amsgrad"] else ("exp_avg", "exp_avg_sq")
    names = {"step", *moments}
    current = optimizer.state.get(param) or None
    if current is not None and current.keys() != names:
        raise ValueError(f"{where}: the optimizer has {sorted(current)}, expected {sorted(names)}")
    if not saved:  # it had never been stepped
        # All zeros is what Adam starts from, and the memory stays.
        copies += [(tensor, torch.zeros_like(tensor)) for tensor in (current or {}).values()]
        return None
    if not isinstance(saved, Mapping) or saved.keys() != names:
        raise ValueError(f"{where}: the saved state is not {sorted(names)}")
    for name, value in saved.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{where}: {name} is not a tensor")
        fits = value.dim() == 0 if name == "step" else (value.shape, value.dtype) == (param.shape, param.dtype)
        if not fits or not value.is_floating_point():
            raise ValueError(
                f"{where}: {name} is {tuple(value.shape)} {value.dtype}, for a parameter of {tuple(param.shape)} "
                f"{param.dtype}"
            )
    count = float(saved["step"])
    if saved["step"].dtype not in (torch.float32, torch.float64) or not 0 <= count < math.inf or count % 1:
        raise ValueError(f"{where}: step is {count} in {saved['step'].dtype}, expected a whole number ≥ 0 in float32")
    created = None
    if current is None:
        # As Adam makes them: moments laid out like the parameter, the step count beside it only if a kernel reads it.
        step_device = param.device if group["capturable"] or group["fused"] else torch.device("cpu")
        current = created = {name: torch.zeros_like(param, memory_format=torch.preserve_format) for name in moments}
        created["step"] = torch.zeros((), dtype=saved["step"].dtype, device=step_device)
    copies += [(current[name], saved[name]) for name in names]
    return created


def plain_execution(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict of Adam with everything in CPU memory, contiguous, and computed in the usual way (no `fused`, no
    `capturable`; learning rates are numbers): so that it loads anywhere. Moments keep their dtype.
    """
    usual = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
    groups = [
        {
            key: usual.get(key, _plain_number(value) if isinstance(value, Tensor) else value)
            for key, value in group.items()
        }
        for group in saved["param_groups"]
    ]
    state = {
        index: {name: plain_tensor(value) for name, value in moments.items()}
        for index, moments in saved["state"].items()
    }
    return {"state": state, "param_groups": groups}


def _plain_number(value: Tensor) -> float:
    # A learning rate of 1e-3 that a CUDA graph reads as float32 is 1e-3 again, not 0.0010000000474974513.
    return float(str(value.cpu().numpy()[()]))


def plain_tensor(value: Tensor) -> Tensor:
    """A contiguous copy on the CPU, of its own memory."""
    return value.detach().to("cpu", copy=True).contiguous()
