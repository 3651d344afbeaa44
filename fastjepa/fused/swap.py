"""`accelerate(jepa)`: swap fused modules into a JEPA, fastjepa's own or one built with `eb_jepa`; `restore` undoes it.

Modules are recognised by structure and attribute names, never by class, and then checked numerically.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from fastjepa.calibration.choice import Choice
from fastjepa.calibration.setting import Purpose
from fastjepa.fused.autocast import InBf16
from fastjepa.fused.decision import Backend, Decision, SwapPrecision, decide
from fastjepa.fused.losses import ClosedFormSquareLoss, ClosedFormVCLoss
from fastjepa.fused.recognition import difference, encoder_problem, predictor_problem, unet_problem
from fastjepa.kernels.checks import unavailable_reason
from fastjepa.model.projected_losses import HiddenLayer, hidden_layer

Jepa = TypeVar("Jepa", bound=nn.Module)

# A module with the structure of a published one must also compute the same: its fused form may differ by this much,
# relative to the largest output. Each is some ten roundings of the dtype (fp32: of tf32, in which a GPU may convolve),
# what ~40 layers may add up to, and far below what another activation or another order of layers would make.
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
    strict: bool = True,
    verbose: bool = True,
) -> Jepa:
    """Swap fused modules into `jepa`, in place; parameters, buffers and state_dict stay the same objects and names.

    Args:
        jepa: anything with `encoder`, `predictor.predictor`, `regularizer` and `predcost` of the published structure.
            Its device decides what can be done.
        backend: "fused" swaps Triton kernels in, on a GPU (or in Triton's interpreter). "eager" swaps nothing. "auto"
            swaps what is known to help: on a CPU the losses' closed form, in plain torch; on a GPU what was measured
            there to be exact and fastest. The first call on a GPU measures, for up to a minute, in child processes,
            and keeps what it found (`fastjepa.calibration`); the environment variable FASTJEPA_CALIBRATE=0 leaves that
            out and swaps nothing.
        precision: "bf16" runs the encoder and predictor in bf16 autocast, with inputs and outputs as before; "keep"
            leaves precision to the caller's own autocast (where "auto" measures, it does so in the one in force now).
        example: the shape (B, C, T, H, W) of a video at which "auto" measures on a GPU; default: that of the recipe.
        purpose: what "auto" measures there: "train", a training step, or "inference", a rollout.
        choice: these parts, as a calibration has chosen them before, in place of asking again; with backend "auto".
            Its CUDA graph is the caller's to make (`fastjepa.graphs`).
        strict: with backend "fused" or a `choice`, a part that cannot be swapped exactly is an error; False leaves it
            and says why.
        verbose: print the report. It is also kept as `jepa.acceleration`.

    Returns:
        The same object.

    Raises:
        ValueError: an unknown backend, precision or purpose; an `example` that is no such shape; a `choice` beside an
            explicit backend; a part missing; with `strict`, a part of another structure.
        RuntimeError: backend "fused", or kernels in `choice`, where kernels cannot run; `jepa` is accelerated already.
    """
    _check_choice("backend", backend, get_args(Backend))
    _check_choice("precision", precision, get_args(SwapPrecision))
    _check_choice("purpose", purpose, get_args(Purpose))
    if choice is not None and backend != "auto":
        raise ValueError(f"a choice says which parts are swapped, and so does backend={backend!r}; give one of them")
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

    decision = decide(jepa, device, backend, precision, example, purpose, choice)
    plan = _plan(jepa, decision, torch.bfloat16 if precision == "bf16" else None)
    problems = [f"{part.name}: {part.reason}" for part in plan if part.make is None and part.wanted]
    if (backend == "fused" or choice is not None) and strict and problems:
        raise ValueError("not everything can be swapped exactly (strict=False leaves it): " + "; ".join(problems))
    if precision == "bf16":
        plan = [_in_bf16(part) for part in plan]
    originals = {part.name: part.module for part in plan if part.make is not None}
    swaps = []
    for part in plan:
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


@dataclass(frozen=True)
class _Part:
    """One part of the plan: `make` builds the replacement; None leaves the module as it is, for the reason."""

    name: str  # the path of the module in the JEPA
    module: nn.Module
    make: Callable[[], nn.Module] | None
    reason: str = ""
    wanted: bool = True  # whether it was to be replaced


def _plan(jepa: nn.Module, decision: Decision, autocast_dtype: torch.dtype | None) -> list[_Part]:
    """What to do with each part, decided before anything is touched."""
    source: Any = jepa
    wrapper = source.predictor
    parts = [_network(source.encoder, "encoder", "FusedResNet5", encoder_problem, decision, autocast_dtype)]
    if predictor_problem(wrapper) is None:
        part = _network(wrapper, "predictor", "FusedStateOnlyPredictor", predictor_problem, decision, autocast_dtype)
    else:  # a wrapper of another kind stays, around a fused network
        inner = getattr(wrapper, "predictor", wrapper)
        part = _network(inner, "predictor.predictor", "FusedResUNet", unet_problem, decision, autocast_dtype)
    parts.append(part)
    for name, kind in (("regularizer", ClosedFormVCLoss), ("predcost", ClosedFormSquareLoss)):
        parts.append(_loss(getattr(jepa, name), name, kind, decision))
    return parts


def _network(
    module: nn.Module,
    name: str,
    kind: Literal["FusedResNet5", "FusedResUNet", "FusedStateOnlyPredictor"],
    problem_of: Callable[[nn.Module], str | None],
    decision: Decision,
    autocast_dtype: torch.dtype | None,
) -> _Part:
    """The plan for a network; `kind` is the class of `fused.networks` that would replace it."""
    if not decision.choice.batch_norm:
        return _Part(name, module, None, decision.reasons["batch_norm"], wanted=False)
    if (reason := problem_of(module)) is not None:
        return _Part(name, module, None, reason)
    weight = module.get_parameter("predictor.conv1.weight" if name == "predictor" else "conv1.weight")
    if weight.dtype not in TOLERANCE:
        return _Part(name, module, None, f"its weights are {weight.dtype}; kernels take fp32, bf16 and fp16")
    from fastjepa.fused import networks  # only here: it needs Triton

    from_eager: Callable[..., nn.Module] = getattr(networks, kind).from_eager
    channels, frames = weight.shape[1], 1
    if name == "predictor":  # which puts some frames into the channels
        context_length: Any = module.context_length
        channels, frames = channels // context_length, context_length + 1
    # The form that every variant accepts: (B, C, T, H, W).
    example = torch.rand(1, channels, frames, 8, 8, generator=torch.Generator().manual_seed(0))
    example = example.to(weight.device, weight.dtype)
    # A predictor is called with actions, here none.
    inputs = (example, None) if name == "predictor" else (example,)
    found = difference(from_eager(module), module, *inputs)  # in the caller's precision
    if not found <= TOLERANCE[weight.dtype]:
        return _Part(name, module, None, f"it has the published names but computes something else ({found:.1e} off)")
    return _Part(name, module, partial(from_eager, module, autocast_dtype, decision.choice.recompute))


def _in_bf16(part: _Part) -> _Part:
    """A network that stays eager, in an autocast of its own; fused ones have theirs, and losses are fp32."""
    if part.make is not None or part.name not in ("encoder", "predictor", "predictor.predictor"):
        return part
    name, module = part.name, part.module
    inner = getattr(module, "predictor", None)
    if name == "predictor" and isinstance(inner, nn.Module):
        name, module = "predictor.predictor", inner  # who asks for a predictor's attributes still finds them
    return _Part(name, module, partial(InBf16, module), part.reason, part.wanted)


def _loss(
    module: nn.Module, name: str, kind: type[ClosedFormVCLoss] | type[ClosedFormSquareLoss], decision: Decision
) -> _Part:
    path = decision.choice.losses
    needed = ("proj", "std_coeff", "cov_coeff") if kind is ClosedFormVCLoss else ("proj",)
    missing = [attribute for attribute in needed if not hasattr(module, attribute)]
    if path == "eager":
        return _Part(name, module, None, decision.reasons["projected_losses"], wanted=False)
    if missing:
        return _Part(name, module, None, f"{type(module).__name__} has no {', '.join(missing)}")
    proj: Any = module.proj
    layers = hidden_layer(proj, any_mode=True)
    if not isinstance(layers, HiddenLayer):
        return _Part(name, module, None, layers)
    if path == "closed_form":
        on_cpu = layers.linear1.weight.device.type == "cpu"
        told = "closed form in plain torch" + (": faster on a CPU" if on_cpu else "")
        return _Part(name, module, partial(kind, module, fused=False), told)
    if (reason := _too_large(layers)) is not None:
        return _Part(name, module, None, reason)
    return _Part(name, module, partial(kind, module, fused=True))


def _too_large(layers: HiddenLayer) -> str | None:
    from fastjepa.kernels.projected_losses.activations import MAX_D, MAX_HIDDEN  # only here: it needs Triton

    (hidden, channels), out = layers.linear1.weight.shape, layers.linear2.out_features
    if channels > MAX_D or hidden > MAX_HIDDEN or not 2 <= out <= MAX_HIDDEN:
        return (
            f"the projector is {channels}-{hidden}-{out}; kernels take up to {MAX_D}-{MAX_HIDDEN}-{MAX_HIDDEN}, "
            "and at least 2 outputs"
        )
    return None


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
