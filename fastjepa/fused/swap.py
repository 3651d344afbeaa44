"""`accelerate(jepa)`: swap fused modules into a JEPA, fastjepa's own or one built with `eb_jepa`; `restore` undoes it.

Modules are recognised by structure and attribute names, never by class, and then checked numerically.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from fastjepa.fused.losses import ClosedFormSquareLoss, ClosedFormVCLoss
from fastjepa.fused.recognition import difference, encoder_problem, predictor_problem, unet_problem
from fastjepa.kernels.checks import unavailable_reason
from fastjepa.measuring.wins import MEASURED_WINS
from fastjepa.model.projected_losses import HiddenLayer, hidden_layer

Backend = Literal["auto", "eager", "fused"]
SwapPrecision = Literal["keep", "bf16"]
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
        return "\n".join(lines)


def accelerate(
    jepa: Jepa,
    *,
    backend: Backend = "auto",
    precision: SwapPrecision = "keep",
    strict: bool = True,
    verbose: bool = True,
) -> Jepa:
    """Swap fused modules into `jepa`, in place; parameters, buffers and state_dict stay the same objects and names.

    Args:
        jepa: anything with `encoder`, `predictor.predictor`, `regularizer` and `predcost` of the published structure.
            Its device decides what can be done.
        backend: "fused" swaps Triton kernels in, on a GPU (or in Triton's interpreter). "eager" swaps nothing. "auto"
            swaps what is known to help: on a CPU the losses' closed form, in plain torch; on a GPU whatever
            `measuring.wins` names a measurement for.
        precision: "bf16" runs the fused encoder and predictor in bf16 autocast, with inputs and outputs as before;
            "keep" leaves precision to the caller's own autocast.
        strict: with backend "fused", a part that cannot be swapped exactly is an error; False leaves it and says why.
        verbose: print the report. It is also kept as `jepa.acceleration`.

    Returns:
        The same object.

    Raises:
        ValueError: an unknown backend or precision; a part missing; with `strict`, a part of another structure.
        RuntimeError: backend "fused" where kernels cannot run; `jepa` is accelerated already.
    """
    _check_choice("backend", backend, get_args(Backend))
    _check_choice("precision", precision, get_args(SwapPrecision))
    for name in ("encoder", "predictor", "regularizer", "predcost"):
        if not isinstance(getattr(jepa, name, None), nn.Module):
            raise ValueError(f"jepa has no module {name!r}; accelerate takes a JEPA of fastjepa or eb_jepa")
    if getattr(jepa, "acceleration", None) is not None:
        raise RuntimeError("this JEPA is accelerated already; fastjepa.restore(jepa) first")
    device = next(jepa.parameters()).device
    if backend == "fused" and (unavailable := unavailable_reason(device)) is not None:
        raise RuntimeError(f"backend 'fused' cannot be served: {unavailable}")
    if precision == "bf16" and backend != "fused":
        raise ValueError("precision 'bf16' belongs to the fused networks: ask for backend='fused' too")

    plan = _plan(jepa, backend, torch.bfloat16 if precision == "bf16" else None)
    problems = [f"{part.name}: {part.reason}" for part in plan if part.make is None]
    if backend == "fused" and strict and problems:
        raise ValueError("not everything can be swapped exactly (strict=False leaves it): " + "; ".join(problems))
    originals = {part.name: part.module for part in plan if part.make is not None}
    swaps = []
    for part in plan:
        new = None if part.make is None else part.make()
        if new is not None:
            _put(jepa, part.name, new)
        swaps.append(Swap(part.name, type(part.module).__name__, type(new).__name__ if new else None, part.reason))
    report = Report(backend, str(device), tuple(swaps))
    # Past nn.Module's __setattr__, which would register the originals as submodules a second time.
    object.__setattr__(jepa, "acceleration", report)
    object.__setattr__(jepa, "_before_acceleration", originals)
    if verbose:
        print(report)
    return jepa


def restore(jepa: Jepa) -> Jepa:
    """Put the modules back that `accelerate` replaced; weights and buffers are those of now. Returns the same object.

    Raises:
        RuntimeError: `jepa` is not accelerated.
    """
    if getattr(jepa, "acceleration", None) is None:
        raise RuntimeError("this JEPA is not accelerated")
    originals: dict[str, nn.Module] = jepa._before_acceleration  # type: ignore[assignment]
    for name, module in originals.items():
        _copy_modes(jepa.get_submodule(name), module)
        _put(jepa, name, module)
    object.__setattr__(jepa, "acceleration", None)
    object.__setattr__(jepa, "_before_acceleration", {})
    return jepa


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


def _plan(jepa: nn.Module, backend: Backend, autocast_dtype: torch.dtype | None) -> list[_Part]:
    """What to do with each part, decided before anything is touched."""
    source: Any = jepa
    wrapper = source.predictor
    parts = [_network(source.encoder, "encoder", "FusedResNet5", encoder_problem, backend, autocast_dtype)]
    if predictor_problem(wrapper) is None:
        part = _network(wrapper, "predictor", "FusedStateOnlyPredictor", predictor_problem, backend, autocast_dtype)
    else:  # a wrapper of another kind stays, around a fused network
        inner = getattr(wrapper, "predictor", wrapper)
        part = _network(inner, "predictor.predictor", "FusedResUNet", unet_problem, backend, autocast_dtype)
    parts.append(part)
    for name, kind in (("regularizer", ClosedFormVCLoss), ("predcost", ClosedFormSquareLoss)):
        parts.append(_loss(getattr(jepa, name), name, kind, backend))
    return parts


def _network(
    module: nn.Module,
    name: str,
    kind: Literal["FusedResNet5", "FusedResUNet", "FusedStateOnlyPredictor"],
    problem_of: Callable[[nn.Module], str | None],
    backend: Backend,
    autocast_dtype: torch.dtype | None,
) -> _Part:
    """The plan for a network; `kind` is the class of `fused.networks` that would replace it."""
    reason = _not_chosen(backend, "batch_norm", next(module.parameters()).device) or problem_of(module)
    if reason:
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
    return _Part(name, module, lambda: from_eager(module, autocast_dtype))


def _loss(
    module: nn.Module, name: str, kind: type[ClosedFormVCLoss] | type[ClosedFormSquareLoss], backend: Backend
) -> _Part:
    needed = ("proj", "std_coeff", "cov_coeff") if kind is ClosedFormVCLoss else ("proj",)
    missing = [attribute for attribute in needed if not hasattr(module, attribute)]
    if missing:
        return _Part(name, module, None, f"{type(module).__name__} has no {', '.join(missing)}")
    proj: Any = module.proj
    layers = hidden_layer(proj, any_mode=True)
    if not isinstance(layers, HiddenLayer):
        return _Part(name, module, None, layers)
    device = layers.linear1.weight.device
    if backend == "auto" and device.type == "cpu":
        return _Part(name, module, lambda: kind(module, fused=False), "closed form in plain torch: faster on a CPU")
    reason = _not_chosen(backend, "projected_losses", device) or _too_large(layers)
    if reason:
        return _Part(name, module, None, reason)
    return _Part(name, module, lambda: kind(module, fused=True))


def _not_chosen(backend: Backend, op: str, device: torch.device) -> str | None:
    if backend == "eager":
        return "backend 'eager' was asked for"
    if backend == "auto":
        if device.type == "cpu":
            return "on a CPU, eager is fastest; fused kernels need a GPU"
        if op not in MEASURED_WINS:
            return "no measurement on a GPU says yet that fused is faster; backend='fused' swaps it all the same"
        return unavailable_reason(device)
    return None


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
