"""The plan of a swap: what becomes of each part of a JEPA, decided before anything is touched.

Modules are recognised by structure and attribute names, never by class, and then tried: the module against the
published one in float64, and its fused or folded form against the module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fastjepa.calibration.choice import Choice
from fastjepa.calibration.layers import LAYERS_OF
from fastjepa.fused.autocast import InBf16
from fastjepa.fused.decision import Decision
from fastjepa.fused.inference import InferenceEncoder, InferencePredictor
from fastjepa.fused.losses import ClosedFormSquareLoss, ClosedFormVCLoss
from fastjepa.fused.network_trial import example, network_trial_problem
from fastjepa.fused.recognition import difference, encoder_problem, predictor_problem, unet_problem
from fastjepa.model.loss_recognition import predcost_problem, regularizer_problem
from fastjepa.model.projected_losses import HiddenLayer, hidden_layer

LossKind = type[ClosedFormVCLoss] | type[ClosedFormSquareLoss]

# The fused or folded form may differ from the module by this much, relative to the largest output. Each is some ten
# roundings of the dtype (fp32: of tf32, in which a GPU may convolve), what ~40 layers may add up to.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1, torch.float16: 1e-2}


@dataclass(frozen=True)
class Part:
    """One part of the plan: `make` builds the replacement; None leaves the module as it is, for the reason."""

    name: str  # the path of the module in the JEPA
    module: nn.Module
    make: Callable[[], nn.Module] | None
    reason: str = ""
    wanted: bool = True  # whether it was to be replaced


def plan(jepa: nn.Module, decision: Decision, autocast_dtype: torch.dtype | None) -> list[Part]:
    """What to do with each part, decided before anything is touched."""
    source: Any = jepa
    wrapper = source.predictor
    parts = [_network(source.encoder, "encoder", encoder_problem, decision, autocast_dtype)]
    part = _network(wrapper, "predictor", predictor_problem, decision, autocast_dtype)
    inner = getattr(wrapper, "predictor", None)
    if part.make is None and decision.choice.batch_norm and isinstance(inner, nn.Module):
        # A wrapper of another kind, as one that reads actions, stays around a fused network; none is folded inside it.
        part = _network(inner, "predictor.predictor", unet_problem, decision, autocast_dtype)
    parts.append(part)
    for name, kind in (("regularizer", ClosedFormVCLoss), ("predcost", ClosedFormSquareLoss)):
        parts.append(_loss(getattr(jepa, name), name, kind, decision))
    return parts


def _network(
    module: nn.Module,
    name: str,
    problem_of: Callable[[nn.Module], str | None],
    decision: Decision,
    autocast_dtype: torch.dtype | None,
) -> Part:
    """The plan for a network: fused, folded, or left."""
    choice = decision.choice
    if not (choice.batch_norm or choice.convolutions):
        return Part(name, module, None, decision.reasons["batch_norm"], wanted=False)
    if (reason := problem_of(module)) is not None:
        return Part(name, module, None, reason)
    weight = module.get_parameter("predictor.conv1.weight" if name == "predictor" else "conv1.weight")
    if weight.dtype not in TOLERANCE:
        return Part(name, module, None, f"its weights are {weight.dtype}; kernels take fp32, bf16 and fp16")
    if (reason := network_trial_problem(module, name)) is not None:
        return Part(name, module, None, reason)
    form, make, told = _folded(module, name, choice) if choice.convolutions else _fused(module, name, choice)
    try:
        tried = make(None)  # in the caller's precision
    except ValueError as error:
        return Part(name, module, None, str(error))
    found = difference(tried, module, *example(module, name, batch=1, size=(8, 8)))
    if not found <= TOLERANCE[weight.dtype]:
        return Part(name, module, None, f"its {form} form computes something else ({found:.1e} off)")
    return Part(name, module, partial(make, autocast_dtype), told)


# What a network becomes, given the dtype of its own autocast; its name in words, and what a report says of it.
Form = tuple[str, Callable[[torch.dtype | None], nn.Module], str]


def _fused(module: nn.Module, name: str, choice: Choice) -> Form:
    """With fused blocks between torch's convolutions."""
    from fastjepa.fused import networks  # only here: it needs Triton

    kinds: dict[str, Any] = {
        "encoder": networks.FusedResNet5, "predictor": networks.FusedStateOnlyPredictor,
        "predictor.predictor": networks.FusedResUNet,
    }  # fmt: skip
    return "fused", lambda dtype: kinds[name].from_eager(module, dtype, choice.recompute), ""


def _folded(module: nn.Module, name: str, choice: Choice) -> Form:
    """With BatchNorm folded into convolutions, of which our kernels run those that the choice names."""
    kind: Any = {"encoder": InferenceEncoder, "predictor": InferencePredictor}[name]
    ours = [layer for layer in LAYERS_OF[name] if f"{name}.{layer}" in choice.own_layers]
    left = [layer for layer in LAYERS_OF[name] if layer not in ours]
    convolutions = "auto" if ours and left else "fused" if ours else "eager"
    return "inference", lambda dtype: kind.from_eager(module, dtype, convolutions), f"convolutions={convolutions}"


def in_bf16(part: Part) -> Part:
    """A network that stays eager, in an autocast of its own; fused ones have theirs, and losses are fp32."""
    if part.make is not None or part.name not in ("encoder", "predictor", "predictor.predictor"):
        return part
    name, module = part.name, part.module
    inner = getattr(module, "predictor", None)
    if name == "predictor" and isinstance(inner, nn.Module):
        name, module = "predictor.predictor", inner  # who asks for a predictor's attributes still finds them
    return Part(name, module, partial(InBf16, module), part.reason, part.wanted)


def _loss(module: nn.Module, name: str, kind: LossKind, decision: Decision) -> Part:
    path = decision.choice.losses
    needed = ("proj", "std_coeff", "cov_coeff") if kind is ClosedFormVCLoss else ("proj",)
    missing = [attribute for attribute in needed if not hasattr(module, attribute)]
    if path == "eager":
        return Part(name, module, None, decision.reasons["projected_losses"], wanted=False)
    if missing:
        return Part(name, module, None, f"{type(module).__name__} has no {', '.join(missing)}")
    proj: Any = module.proj
    layers = hidden_layer(proj, any_mode=True)
    if not isinstance(layers, HiddenLayer):
        return Part(name, module, None, layers)
    problem_of = regularizer_problem if kind is ClosedFormVCLoss else predcost_problem
    if (reason := problem_of(module)) is not None:
        return Part(name, module, None, reason)
    if path == "closed_form":
        on_cpu = layers.linear1.weight.device.type == "cpu"
        told = "closed form in plain torch" + (": faster on a CPU" if on_cpu else "")
        return Part(name, module, partial(kind, module, fused=False), told)
    if (reason := _too_large(layers)) is not None:
        return Part(name, module, None, reason)
    return Part(name, module, partial(kind, module, fused=True))


def _too_large(layers: HiddenLayer) -> str | None:
    from fastjepa.kernels.projected_losses.activations import MAX_D, MAX_HIDDEN  # only here: it needs Triton

    (hidden, channels), out = layers.linear1.weight.shape, layers.linear2.out_features
    if channels > MAX_D or hidden > MAX_HIDDEN or not 2 <= out <= MAX_HIDDEN:
        return (
            f"the projector is {channels}-{hidden}-{out}; kernels take up to {MAX_D}-{MAX_HIDDEN}-{MAX_HIDDEN}, "
            "and at least 2 outputs"
        )
    return None
