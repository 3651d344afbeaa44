"""`accelerate` swaps fused or folded modules into a JEPA, fastjepa's own or one built with `eb_jepa`; `restore` undoes
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import torch
from torch import nn

from fastjepa.calibration.choice import Choice
from fastjepa.calibration.setting import Purpose
from fastjepa.fused.decision import Backend, Recompute, SwapPrecision, decide
from fastjepa.fused.plan import in_bf16, plan
from fastjepa.kernels.checks import unavailable_reason

Jepa = TypeVar("Jepa", bound=nn.Module)


@dataclass(frozen=True)
class Swap:
    """What became of one part: `by` is the new module's class, or None with the `reason` it was left as it is; of a
    folded network, `reason` names the layers that torch's convolutions run.
    """

    part: str
    was: str
    by: str | None
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What `accelerate` did, as data and, printed, as a table."""

    backend: str
    device: str
    swaps: tuple[Swap, ...]
    channels_last: bool = False
    """Whether the networks' weights were laid out channels-last."""
    calibration: str = ""
    """What was measured on this GPU, or why nothing was; "" where it was not asked."""

    @property
    def swapped(self) -> tuple[str, ...]:
        """The parts that were replaced."""
        return tuple(swap.part for swap in self.swaps if swap.by is not None)

    def __str__(self) -> str:
        width = max(len(swap.part) for swap in self.swaps)
        lines = [f"fastjepa.accelerate: backend {self.backend} on {self.device}"]
        for swap in self.swaps:
            done = f"{swap.was} → {swap.by}" if swap.by else f"{swap.was} left as it is"
            lines.append(f"  {swap.part:<{width}}  {done}" + (f": {swap.reason}" if swap.reason else ""))
        if self.channels_last:
            lines.append("  weights are channels-last in memory")
        lines += [f"  {line}" for line in self.calibration.splitlines()]
        return "\n".join(lines)


def accelerate(
    jepa: Jepa,
    *,
    backend: Backend = "auto",
    precision: SwapPrecision = "keep",
    example: Sequence[int] | None = None,
    purpose: Purpose = "train",
    choice: Choice | None = None,
    recompute: Recompute = "auto",
    strict: bool = True,
    verbose: bool = True,
) -> Jepa:
    """Swap faster modules into `jepa`, in place; parameters, buffers and state_dict stay the same objects and names.

    Args:
        jepa: anything with `encoder`, `predictor.predictor`, `regularizer` and `predcost` of the published structure.
            Its device decides what can be done.
        backend: "fused" swaps Triton kernels in, on a GPU (or in Triton's interpreter): fused losses and, for training,
            fused blocks between torch's convolutions; for inference, networks with BatchNorm folded, all of whose
            layers run by convolutions of our own. "eager" swaps nothing. "auto" swaps what is known to help: on a CPU
            the losses' closed form, in plain torch; on a GPU what was measured there to be exact and fastest. The first
            call on a GPU measures, for up to a minute (two for inference), in child processes, and keeps what it
            found (`fastjepa.calibration`); the environment variable FASTJEPA_CALIBRATE=0 leaves that out and swaps
            nothing.
        precision: "bf16" runs the encoder and predictor in bf16 autocast, with inputs and outputs as before; "keep"
            leaves precision to the caller's own autocast (where "auto" measures, it does so in the one in force now).
        example: the shape (B, C, T, H, W) of a video at which "auto" measures, and counts memory, on a GPU; default:
            that of the recipe.
        purpose: "train", a training step, or "inference", a rollout: what "auto" measures there, and "fused" serves.
            Folded networks are for inference: in train mode, or where gradients are wanted, they run as they were.
        choice: these parts, as a calibration has chosen them before, in place of asking again; with backend "auto".
            Its CUDA graph is the caller's to make (`fastjepa.graphs`).
        recompute: whether fused networks compute activations again in the backward pass, for less memory and more time,
            with the same numbers bit for bit. "auto" does so on a GPU where the bytes that a step of the recipe's
            prediction steps keeps at `example`, counted before anything runs, leave no other way, or where it was
            measured to be faster; and where nothing can be counted: for a model that is not of the published form, and
            in Triton's interpreter. "on" and "off" are served or fail.
        strict: with backend "fused", a `choice` or recompute "on", a part that cannot be swapped exactly is an error;
            False leaves it and says why.
        verbose: print the report. It is also kept as `jepa.acceleration`.

    Returns:
        The same object.

    Raises:
        ValueError: an unknown backend, precision, purpose or recompute; an `example` that is no such shape; a `choice`
            beside an explicit backend or recompute, or one with own convolutions that is not for inference; recompute
            "on" where there are no fused networks; a part missing; with `strict`, a part of another structure.
        RuntimeError: backend "fused", recompute "on", or kernels in `choice`, where kernels cannot run, or were found
            not to work; `jepa` is accelerated already.
    """
    _check_choice("backend", backend, get_args(Backend))
    _check_choice("precision", precision, get_args(SwapPrecision))
    _check_choice("purpose", purpose, get_args(Purpose))
    _check_choice("recompute", recompute, get_args(Recompute))
    for name, value in (("backend", backend), ("recompute", recompute)):
        if choice is not None and value != "auto":
            raise ValueError(f"a choice says which parts are swapped, and so does {name}={value!r}; give one of them")
    for name in ("encoder", "predictor", "regularizer", "predcost"):
        if not isinstance(getattr(jepa, name, None), nn.Module):
            raise ValueError(f"jepa has no module {name!r}; accelerate takes a JEPA of fastjepa or eb_jepa")
    if getattr(jepa, "acceleration", None) is not None:
        raise RuntimeError("this JEPA is accelerated already; fastjepa.restore(jepa) first")
    device = next(jepa.parameters()).device
    demanded = "backend 'fused'" if choice is None else f"the choice ({choice})"
    needs_kernels = backend == "fused" if choice is None else choice.needs_kernels
    if needs_kernels and (unavailable := unavailable_reason(device)) is not None:
        raise RuntimeError(f"{demanded} cannot be served: {unavailable}")

    decision = decide(jepa, device, backend, precision, example, purpose, choice, recompute)
    parts = plan(jepa, decision, torch.bfloat16 if precision == "bf16" else None)
    problems = [f"{part.name}: {part.reason}" for part in parts if part.make is None and part.wanted]
    if (backend == "fused" or choice is not None or recompute == "on") and strict and problems:
        raise ValueError("not everything can be swapped exactly (strict=False leaves it): " + "; ".join(problems))
    if precision == "bf16":
        parts = [in_bf16(part) for part in parts]
    originals = {part.name: part.module for part in parts if part.make is not None}
    swaps = []
    for part in parts:
        new = None if part.make is None else part.make()
        if new is not None:
            _put(jepa, part.name, new)
        swaps.append(Swap(part.name, type(part.module).__name__, type(new).__name__ if new else None, part.reason))
    strides = _lay_channels_last(jepa) if decision.choice.channels_last else {}
    report = Report(backend, str(device), tuple(swaps), decision.choice.channels_last, decision.calibration)
    # Past nn.Module's __setattr__, which would register the originals as submodules a second time.
    object.__setattr__(jepa, "acceleration", report)
    object.__setattr__(jepa, "_before_acceleration", originals)
    object.__setattr__(jepa, "_strides_before", strides)
    if verbose:
        print(report)
    return jepa


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
    object.__setattr__(jepa, "acceleration", None)
    object.__setattr__(jepa, "_before_acceleration", {})
    object.__setattr__(jepa, "_strides_before", {})
    return jepa


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


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
