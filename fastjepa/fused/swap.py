"""`accelerate` swaps faster modules into a JEPA, fastjepa's own or one built with `eb_jepa`; `restore` undoes it.

Modules are recognised by structure and names, never by class, and then tried: the module against the published one in
float64, and what replaces it against the module. Nothing is touched before all of that is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from fastjepa.execution import ExecutionConfig, ambient_precision
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
LossKind = type[ClosedFormVCLoss] | type[ClosedFormSquareLoss]

LOSSES = ("regularizer", "predcost")
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
    """The plan for one part: `make(autocast_dtype)` builds the replacement; None leaves the module, for the reason."""

    name: str  # the path of the module in the JEPA
    module: nn.Module
    make: Callable[[torch.dtype | None], nn.Module] | None
    reason: str = ""
    wanted: bool = True  # whether it was to be replaced


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
    reason = "" if demanded else _why_not_fused(jepa, device, backend, precision, execution)
    if demanded and (unavailable := unavailable_reason(device)) is not None:
        raise RuntimeError(f"fused kernels are not supported here: {unavailable}")
    if execution is None:
        arithmetic = "bf16" if precision == "bf16" else ambient_precision(device)
        laid = not reason and device.type == "cuda"  # the layout of the tensor cores
        execution = ExecutionConfig(arithmetic, fused=not reason, recompute=recompute == "on", channels_last=laid)
    closed_form = device.type == "cpu" and backend != "eager" and not execution.fused
    parts = _plan(jepa, execution, purpose, reason, closed_form, exact_kernels=backend == "fused")
    problems = [f"{part.name}: {part.reason}" for part in parts if part.make is None and part.wanted]
    if demanded and strict and problems:
        raise ValueError("these parts cannot be swapped exactly: " + "; ".join(problems))
    if precision == "bf16":
        parts = [_in_bf16(part) for part in parts]
    return _swap(jepa, parts, execution, torch.bfloat16 if precision == "bf16" else None, verbose)


def restore(jepa: Jepa) -> Jepa:
    """Put the modules back that `accelerate` replaced, and the memory layout of their weights; weights and buffers are
    those of now. Returns the same object.

    Raises:
        RuntimeError: `jepa` is not accelerated.
    """
    if getattr(jepa, "acceleration", None) is None:
        raise RuntimeError("this JEPA is not accelerated")
    originals: dict[str, nn.Module] = jepa._before_acceleration  # type: ignore[assignment]
    for name, module in originals.items():
        _copy_modes(jepa.get_submodule(name), module)
        _put(jepa, name, module)
    strides: dict[str, tuple[int, ...]] = jepa._strides_before  # type: ignore[assignment]
    for name, stride in strides.items():
        parameter = jepa.get_parameter(name)
        parameter.data = torch.empty_strided(
            parameter.shape, stride, dtype=parameter.dtype, device=parameter.device
        ).copy_(parameter.data)
    _remember(jepa, None, {}, {})
    return jepa


def _check_arguments(
    jepa: nn.Module, backend: str, precision: str, purpose: str, recompute: str, execution: ExecutionConfig | None
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
    for name in ("encoder", "predictor", *(LOSSES if purpose == "train" else ())):
        if not isinstance(getattr(jepa, name, None), nn.Module):
            hint = "; purpose='inference' needs encoder and predictor only" if name in LOSSES else ""
            raise ValueError(f"jepa has no module {name!r}; accelerate takes a JEPA of fastjepa or eb_jepa{hint}")
    if getattr(jepa, "acceleration", None) is not None:
        raise RuntimeError("this JEPA is accelerated already; fastjepa.restore(jepa) first")


def _why_not_fused(
    jepa: nn.Module, device: torch.device, backend: str, precision: str, execution: ExecutionConfig | None
) -> str:
    """Why networks and losses stay as they are; "" if they are to be swapped."""
    if execution is not None:
        return f"the run computes with: {execution}"
    if backend == "eager":
        return "backend 'eager' was asked for"
    arithmetic = "bf16" if precision == "bf16" else ambient_precision(device)
    return auto_problem(device, arithmetic, widths_of(jepa) if device.type == "cuda" else None) or ""


def _plan(
    jepa: nn.Module,
    execution: ExecutionConfig,
    purpose: Purpose,
    reason: str,
    closed_form: bool,
    *,
    exact_kernels: bool,
) -> list[Part]:
    """What to do with each part."""
    source: Any = jepa
    if execution.fused:
        form = partial(_inference_form, exact_kernels) if purpose == "inference" else partial(_fused_form, execution)
        parts = [_network(source.encoder, "encoder", encoder_problem, form)]
        part = _network(source.predictor, "predictor", predictor_problem, form)
        inner = getattr(source.predictor, "predictor", None)
        if part.make is None and purpose == "train" and isinstance(inner, nn.Module):
            # A wrapper of another kind, as one that reads actions, stays around a fused network.
            part = _network(inner, "predictor.predictor", unet_problem, form)
        parts.append(part)
    else:
        parts = [Part(name, getattr(jepa, name), None, reason, wanted=False) for name in ("encoder", "predictor")]
    kinds: tuple[LossKind, ...] = (ClosedFormVCLoss, ClosedFormSquareLoss)
    for name, kind in zip(LOSSES, kinds, strict=True):
        module = getattr(jepa, name, None)
        if purpose == "train" and (execution.fused or closed_form):
            parts.append(_loss(getattr(jepa, name), name, kind, fused=execution.fused))
        elif isinstance(module, nn.Module):
            told = "inference computes no losses" if purpose == "inference" else reason
            parts.append(Part(name, module, None, told, wanted=False))
    return parts


# What replaces a network, given its name: the word for it, and what makes it in an autocast of its own.
Form = Callable[[nn.Module, str], tuple[str, Callable[[torch.dtype | None], nn.Module]]]


def _fused_form(
    execution: ExecutionConfig, module: nn.Module, name: str
) -> tuple[str, Callable[[torch.dtype | None], nn.Module]]:
    """Fused blocks between torch's convolutions."""
    from fastjepa.fused import networks  # only here: it needs Triton

    kinds: dict[str, Any] = {
        "encoder": networks.FusedResNet5, "predictor": networks.FusedStateOnlyPredictor,
        "predictor.predictor": networks.FusedResUNet,
    }  # fmt: skip
    return "fused", lambda dtype: kinds[name].from_eager(module, dtype, execution.recompute)


def _inference_form(
    exact_kernels: bool, module: nn.Module, name: str
) -> tuple[str, Callable[[torch.dtype | None], nn.Module]]:
    """BatchNorm folded into convolutions: our kernels, or, unless they were asked for, whichever are faster."""
    kind: Any = {"encoder": InferenceEncoder, "predictor": InferencePredictor}[name]
    return "inference", lambda dtype: kind.from_eager(module, dtype, "fused" if exact_kernels else "auto")


def _network(module: nn.Module, name: str, problem_of: Callable[[nn.Module], str | None], form: Form) -> Part:
    """The plan for a network: replaced if it is the published one, and its replacement computes the same."""
    if (reason := problem_of(module)) is not None:
        return Part(name, module, None, reason)
    weight = module.get_parameter("predictor.conv1.weight" if name == "predictor" else "conv1.weight")
    if weight.dtype not in TOLERANCE:
        return Part(name, module, None, f"its weights are {weight.dtype}; kernels take fp32, bf16 and fp16")
    if (reason := network_trial_problem(module, name)) is not None:
        return Part(name, module, None, reason)
    word, make = form(module, name)
    try:
        tried = make(None)  # in the caller's precision
    except ValueError as error:
        return Part(name, module, None, str(error))
    found = difference(tried, module, *example(module, name, batch=1, size=(8, 8)))
    if not found <= TOLERANCE[weight.dtype]:
        return Part(name, module, None, f"its {word} form computes something else ({found:.1e} off)")
    return Part(name, module, make)


def _loss(module: nn.Module, name: str, kind: LossKind, *, fused: bool) -> Part:
    needed = ("proj", "std_coeff", "cov_coeff") if kind is ClosedFormVCLoss else ("proj",)
    if missing := [attribute for attribute in needed if not hasattr(module, attribute)]:
        return Part(name, module, None, f"{type(module).__name__} has no {', '.join(missing)}")
    proj: Any = module.proj
    layers = hidden_layer(proj, any_mode=True)
    if not isinstance(layers, HiddenLayer):
        return Part(name, module, None, layers)
    problem_of = regularizer_problem if kind is ClosedFormVCLoss else predcost_problem
    reason = problem_of(module) or (_too_large(layers) if fused else None)
    if reason is not None:
        return Part(name, module, None, reason)
    told = "" if fused else "closed form in plain torch"
    return Part(name, module, lambda _: kind(module, fused=fused), told)


def _too_large(layers: HiddenLayer) -> str | None:
    from fastjepa.kernels.projected_losses.activations import MAX_D, MAX_HIDDEN  # only here: it needs Triton

    (hidden, channels), out = layers.linear1.weight.shape, layers.linear2.out_features
    if channels > MAX_D or hidden > MAX_HIDDEN or not 2 <= out <= MAX_HIDDEN:
        most = f"{MAX_D}-{MAX_HIDDEN}-{MAX_HIDDEN}"
        return f"the projector is {channels}-{hidden}-{out}; kernels take up to {most}, and at least 2 outputs"
    return None


def _in_bf16(part: Part) -> Part:
    """A network that stays eager, in an autocast of its own; fused ones have theirs, and losses are fp32."""
    if part.make is not None or part.name in LOSSES:
        return part
    name, module = part.name, part.module
    inner = getattr(module, "predictor", None)
    if name == "predictor" and isinstance(inner, nn.Module):
        name, module = "predictor.predictor", inner  # who asks for a predictor's attributes still finds them
    return Part(name, module, lambda _: InBf16(module), part.reason, part.wanted)


def _swap(
    jepa: Jepa, parts: list[Part], execution: ExecutionConfig, autocast_dtype: torch.dtype | None, verbose: bool
) -> Jepa:
    originals = {part.name: part.module for part in parts if part.make is not None}
    swaps = []
    for part in parts:
        new = None if part.make is None else part.make(autocast_dtype)
        if new is not None:
            _put(jepa, part.name, new)
        swaps.append(Swap(part.name, type(part.module).__name__, type(new).__name__ if new else None, part.reason))
    strides = _lay_channels_last(jepa) if execution.channels_last else {}
    device = next(jepa.parameters()).device
    report = Report(execution, str(device), tuple(swaps))
    _remember(jepa, report, originals, strides)
    if verbose:
        print(report)
    return jepa


def _remember(
    jepa: nn.Module, report: Report | None, originals: dict[str, nn.Module], strides: dict[str, tuple[int, ...]]
) -> None:
    # Past nn.Module's __setattr__, which would register the originals as submodules a second time.
    object.__setattr__(jepa, "acceleration", report)
    object.__setattr__(jepa, "_before_acceleration", originals)
    object.__setattr__(jepa, "_strides_before", strides)


def _lay_channels_last(jepa: nn.Module) -> dict[str, tuple[int, ...]]:
    """Lay the networks' weights out channels-last, in place; the strides before of those that this changed, by name."""
    source: Any = jepa
    before = {name: parameter.stride() for name, parameter in jepa.named_parameters()}
    for network in (source.encoder, source.predictor):
        network.to(memory_format=torch.channels_last)
    return {name: before[name] for name, parameter in jepa.named_parameters() if parameter.stride() != before[name]}


def _copy_modes(source: nn.Module, target: nn.Module) -> None:
    """Give the modules that were replaced the train or eval mode that their replacements have now."""
    target.training = source.training
    for name, child in target.named_children():
        other = getattr(source, name, None)
        if other is None:
            child.train(source.training)  # an activation, which the replacement does without
        elif other is not child:
            _copy_modes(other, child)


def _put(jepa: nn.Module, name: str, new: nn.Module) -> None:
    """Set the submodule called `name`; one encoder that also encodes actions stays one module."""
    path, _, attribute = name.rpartition(".")
    owner = jepa.get_submodule(path)
    old = getattr(owner, attribute)
    setattr(owner, attribute, new)
    if name == "encoder" and getattr(jepa, "action_encoder", None) is old:
        jepa.action_encoder = new
