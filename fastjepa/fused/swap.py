"""`accelerate` swaps faster modules into a JEPA, fastjepa's own or one built with `eb_jepa`; `restore` undoes it.

Modules are recognised by structure and names, never by class, and then tried: the module against the published one in
float64, and what replaces it against the module. Nothing is touched before all of that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from fastjepa.execution import ExecutionConfig, RunPrecision, ambient_precision
from fastjepa.fused.auto import Backend, auto_problem, widths_of
from fastjepa.fused.autocast import InBf16
from fastjepa.fused.inference import InferenceEncoder, InferencePredictor
from fastjepa.fused.losses import ClosedFormSquareLoss, ClosedFormVCLoss
from fastjepa.fused.match import (
    difference,
    encoder_problem,
    example,
    network_trial_problem,
    predcost_problem,
    predictor_problem,
    regularizer_problem,
    unet_problem,
)
from fastjepa.kernels.checks import unavailable_reason
from fastjepa.model.losses import HiddenLayer, hidden_layer

Jepa = TypeVar("Jepa", bound=nn.Module)
Purpose = Literal["train", "inference"]
SwapPrecision = Literal["keep", "bf16"]
Recompute = Literal["on", "off"]
Make = Callable[..., nn.Module]  # of a network and its name: what replaces it

NETWORKS, LOSSES = ("encoder", "predictor"), ("regularizer", "predcost")
PARTS: dict[Purpose, tuple[str, ...]] = {"train": NETWORKS + LOSSES, "inference": NETWORKS}
# What replaces a network may differ from it by this much, relative to the largest output. Each is some ten roundings of
# the dtype (fp32: of tf32, in which a GPU may convolve), what ~40 layers may add up to.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-2}


@dataclass(frozen=True)
class Swap:
    """What became of one part: `by` is the new module's class, or None with the `reason` it was left as it is."""

    part: str
    was: str
    by: str | None
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What `accelerate` did, as data and, printed, as a table."""

    execution: ExecutionConfig
    device: str
    swaps: tuple[Swap, ...]

    @property
    def swapped(self) -> tuple[str, ...]:
        """The parts that were replaced."""
        return tuple(swap.part for swap in self.swaps if swap.by is not None)

    def __str__(self) -> str:
        width = max(len(swap.part) for swap in self.swaps)
        lines = [f"fastjepa.accelerate: {self.execution} on {self.device}"]
        for swap in self.swaps:
            done = f"{swap.was} → {swap.by}" if swap.by else f"{swap.was} left as it is"
            lines.append(f"  {swap.part:<{width}}  {done}" + (f": {swap.reason}" if swap.reason else ""))
        return "\n".join(lines)


@dataclass(frozen=True)
class Part:
    """The plan for one part: what replaces it, or None with the reason."""

    name: str  # the path of the module in the JEPA
    module: nn.Module
    new: nn.Module | None
    reason: str = ""


def accelerate(
    jepa: Jepa,
    *,
    backend: Backend = "auto",
    precision: SwapPrecision = "keep",
    purpose: Purpose = "train",
    recompute: Recompute = "off",
    execution: ExecutionConfig | None = None,
    strict: bool = True,
    verbose: bool = True,
) -> Jepa:
    """Swap faster modules into `jepa`, in place; parameters, buffers and state_dict stay the same objects and names.

    Args:
        jepa: anything with `encoder` and `predictor` of the published structure, and, to train it, `regularizer` and
            `predcost`. Its device decides what can be done.
        backend: "fused" swaps Triton kernels in, on a GPU (or in Triton's interpreter); "eager" swaps nothing. "auto"
            on a CPU swaps the losses' closed form in, in plain torch; on a GPU from sm_80 all that "fused" does, after
            a self-check in seconds that is remembered in the user's cache (`fastjepa.autotune`; FASTJEPA_SELF_CHECK=0
            skips it); elsewhere nothing.
        precision: "bf16" runs encoder and predictor in bf16 autocast, with inputs and outputs as before; "keep" leaves
            precision to the caller's own autocast.
        purpose: "train": fused blocks between torch's convolutions, and the losses without their projections.
            "inference": networks with BatchNorm folded into convolutions; in train mode, or where gradients are wanted,
            they run the modules that they replaced.
        recompute: "on": fused networks compute activations again in the backward pass, for less memory and more time,
            with the same numbers bit for bit.
        execution: what a run has resolved, in place of `backend` and `recompute`; CUDA graphs are the caller's to make.
        strict: with backend "fused", `execution` or recompute "on", a part that cannot be swapped exactly is an error;
            False leaves it and says why.
        verbose: print the report. It is also kept as `jepa.acceleration`.

    Returns:
        The same object.

    Raises:
        ValueError: an unknown word; `execution` beside `backend` or `recompute`; recompute "on" where there are no
            fused networks, or no training; a part missing; with `strict`, a part of another structure.
        RuntimeError: kernels are asked for where they cannot run; `jepa` is accelerated already.
    """
    _check_arguments(jepa, backend, precision, purpose, recompute, execution)
    device = next(jepa.parameters()).device
    demanded = backend == "fused" or recompute == "on" or (execution is not None and execution.fused)
    if demanded and (unavailable := unavailable_reason(device)) is not None:
        raise RuntimeError(f"fused kernels are not supported here: {unavailable}")
    reason = ""  # why networks and losses stay as they are
    if execution is None:
        arithmetic: RunPrecision = "bf16" if precision == "bf16" else ambient_precision(device)
        if backend == "eager":
            reason = "backend 'eager' was asked for"
        elif not demanded:
            reason = auto_problem(device, arithmetic, widths_of(jepa)) or ""
        laid = not reason and device.type == "cuda"  # the layout of the tensor cores
        execution = ExecutionConfig(arithmetic, fused=not reason, recompute=recompute == "on", channels_last=laid)
    elif not execution.fused:
        reason = f"the run computes with: {execution}"
    make = partial(_make_network, purpose, execution.recompute, "fused" if backend == "fused" else "auto")
    dtype = torch.bfloat16 if precision == "bf16" else None
    closed_form = not execution.fused and device.type == "cpu" and backend != "eager"
    parts = _plan(jepa, purpose, partial(make, dtype=dtype), reason, closed_form=closed_form)
    problems = [f"{part.name}: {part.reason}" for part in parts if part.new is None]
    if demanded and strict and problems:
        raise ValueError("these parts cannot be swapped exactly: " + "; ".join(problems))
    _swap(jepa, [_in_bf16(part) for part in parts] if dtype else parts, execution)
    if verbose:
        print(jepa.acceleration)
    return jepa


def restore(jepa: Jepa) -> Jepa:
    """Put the modules back that `accelerate` replaced, and the memory layout of their weights; weights and buffers are
    those of now. Returns the same object.

    Raises:
        RuntimeError: `jepa` is not accelerated.
    """
    source: Any = jepa
    if getattr(jepa, "acceleration", None) is None:
        raise RuntimeError("this JEPA is not accelerated")
    for name, module in source._before_acceleration.items():
        _copy_modes(jepa.get_submodule(name), module)
        put(jepa, name, module)
    for name, stride in source._strides_before.items():
        if (parameter := jepa.get_parameter(name)).stride() != stride:
            laid = torch.empty_strided(parameter.shape, stride, dtype=parameter.dtype, device=parameter.device)
            parameter.data = laid.copy_(parameter.data)
    source.acceleration, source._before_acceleration, source._strides_before = None, {}, {}
    return jepa


def check_parts(jepa: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError if `jepa` lacks a module of these."""
    for name in names:
        if not isinstance(getattr(jepa, name, None), nn.Module):
            hint = "; accelerate(jepa, purpose='inference') needs none" if name in LOSSES else ""
            raise ValueError(f"jepa has no module {name!r}, as those of fastjepa and eb_jepa have{hint}")


def put(jepa: nn.Module, name: str, new: nn.Module) -> None:
    """Set the submodule called `name`; one encoder that also encodes actions stays one module."""
    old = jepa.get_submodule(name)
    jepa.set_submodule(name, new)
    if name == "encoder" and getattr(jepa, "action_encoder", None) is old:
        jepa.action_encoder = new


def _check_arguments(
    jepa: nn.Module, backend: str, precision: str, purpose: Purpose, recompute: str, execution: ExecutionConfig | None
) -> None:
    for name, value, words in (
        ("backend", backend, Backend), ("precision", precision, SwapPrecision), ("purpose", purpose, Purpose),
        ("recompute", recompute, Recompute),
    ):  # fmt: skip
        if value not in get_args(words):
            raise ValueError(f"{name} must be one of {', '.join(get_args(words))}; got {value!r}")
    if execution is not None and (backend != "auto" or recompute != "off"):
        raise ValueError("execution says which parts are swapped, and so do backend and recompute; give one of them")
    if recompute == "on" and (backend == "eager" or purpose == "inference"):
        raise ValueError(f"recompute='on' is for fused networks in training; got {backend=}, {purpose=}")
    check_parts(jepa, PARTS[purpose])
    if getattr(jepa, "acceleration", None) is not None:
        raise RuntimeError("this JEPA is accelerated already; fastjepa.restore(jepa) first")


def _plan(jepa: nn.Module, purpose: Purpose, make: Make, reason: str, *, closed_form: bool) -> list[Part]:
    """What to do with each part; `reason`: why kernels replace none, "" if they are to replace all."""
    parts = []
    for name in PARTS[purpose]:
        module = jepa.get_submodule(name)
        if name in LOSSES and (closed_form or not reason):
            parts.append(_loss(module, name, fused=not closed_form))
        elif reason:
            parts.append(Part(name, module, None, reason))
        else:
            part = _network(module, name, make)
            inner = getattr(module, "predictor", None) if name == "predictor" else None
            if part.new is None and purpose == "train" and isinstance(inner, nn.Module):
                # A wrapper of another kind, as one that reads actions, stays around a fused network.
                part = _network(inner, "predictor.predictor", make)
            parts.append(part)
    return parts


def _network(module: nn.Module, name: str, make: Make) -> Part:
    """The plan for a network: replaced if it is the published one, and its replacement computes the same."""
    problem_of = {"encoder": encoder_problem, "predictor": predictor_problem, "predictor.predictor": unet_problem}
    if (reason := problem_of[name](module)) is not None:
        return Part(name, module, None, reason)
    weight = module.get_parameter("predictor.conv1.weight" if name == "predictor" else "conv1.weight")
    if weight.dtype not in TOLERANCE:
        return Part(name, module, None, f"its weights are {weight.dtype}; kernels take fp32, bf16 and fp16")
    if (reason := network_trial_problem(module, name)) is not None:
        return Part(name, module, None, reason)
    try:
        tried, new = make(module, name, dtype=None), make(module, name)
    except ValueError as error:
        return Part(name, module, None, str(error))
    found = difference(tried, module, *example(module, name, batch=1, size=(8, 8)))
    if not found <= TOLERANCE[weight.dtype]:
        return Part(name, module, None, f"{type(tried).__name__} computes something else ({found:.1e} off)")
    return Part(name, module, new)


def _make_network(
    purpose: Purpose, recompute: bool, kernels: str, module: nn.Module, name: str, dtype: torch.dtype | None
) -> nn.Module:
    """Fused blocks between torch's convolutions, or BatchNorm folded into convolutions by these `kernels`."""
    kinds: dict[str, Any]
    if purpose == "inference":
        kinds = {"encoder": InferenceEncoder, "predictor": InferencePredictor}
        return kinds[name].from_eager(module, dtype, kernels)
    from fastjepa.fused import networks  # only here: it needs Triton

    kinds = {
        "encoder": networks.FusedResNet5, "predictor": networks.FusedStateOnlyPredictor,
        "predictor.predictor": networks.FusedResUNet,
    }  # fmt: skip
    return kinds[name].from_eager(module, dtype, recompute)


def _loss(module: nn.Module, name: str, *, fused: bool) -> Part:
    kind, problem_of = {
        "regularizer": (ClosedFormVCLoss, regularizer_problem), "predcost": (ClosedFormSquareLoss, predcost_problem)
    }[name]  # fmt: skip
    proj: Any = getattr(module, "proj", None)
    layers = f"{type(module).__name__} has no proj" if proj is None else hidden_layer(proj, any_mode=True)
    if isinstance(layers, str):
        return Part(name, module, None, layers)
    reason = (_too_large(layers) if fused else None) or problem_of(module)
    if reason is not None:
        return Part(name, module, None, reason)
    return Part(name, module, kind(module, fused=fused), "" if fused else "closed form in plain torch")


def _too_large(layers: HiddenLayer) -> str | None:
    from fastjepa.kernels.projected_losses.activations import MAX_D, MAX_HIDDEN  # only here: it needs Triton

    (hidden, channels), out = layers.linear1.weight.shape, layers.linear2.out_features
    if channels <= MAX_D and max(hidden, out) <= MAX_HIDDEN:
        return None
    return f"the projector is {channels}-{hidden}-{out}; kernels take up to {MAX_D}-{MAX_HIDDEN}-{MAX_HIDDEN}"


def _in_bf16(part: Part) -> Part:
    """A network that stays eager, in an autocast of its own; fused ones have theirs, and losses are fp32."""
    if part.new is not None or part.name in LOSSES:
        return part
    name, module = part.name, part.module
    inner = getattr(module, "predictor", None)
    if name == "predictor" and isinstance(inner, nn.Module):
        name, module = "predictor.predictor", inner  # who asks for a predictor's attributes still finds them
    return Part(name, module, InBf16(module), part.reason)


def _swap(jepa: Any, parts: list[Part], execution: ExecutionConfig) -> None:
    jepa._before_acceleration = {part.name: part.module for part in parts if part.new is not None}
    swaps = []
    for part in parts:
        if part.new is not None:
            put(jepa, part.name, part.new)
        by = None if part.new is None else type(part.new).__name__
        swaps.append(Swap(part.name, type(part.module).__name__, by, part.reason))
    jepa._strides_before = {}
    if execution.channels_last:
        jepa._strides_before = {name: parameter.stride() for name, parameter in jepa.named_parameters()}
        for name in NETWORKS:
            jepa.get_submodule(name).to(memory_format=torch.channels_last)
    jepa.acceleration = Report(execution, str(next(jepa.parameters()).device), tuple(swaps))


def _copy_modes(source: nn.Module, target: nn.Module) -> None:
    """Give the modules that were replaced the train or eval mode that their replacements have now."""
    target.training = source.training
    for name, child in target.named_children():
        other = getattr(source, name, None)
        if other is None:
            child.train(source.training)  # an activation, which the replacement does without
        elif other is not child:
            _copy_modes(other, child)
