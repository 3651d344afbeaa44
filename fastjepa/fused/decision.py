"""Which parts of a JEPA are to be swapped, and why the others are not: before `swap` looks at what can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fastjepa.calibration.choice import EAGER, Choice
from fastjepa.calibration.memory import Memory, recompute_first
from fastjepa.calibration.setting import Purpose, Setting, ambient_precision, setting_of_jepa
from fastjepa.calibration.verdict import Allowed, Verdict, resolve, switched_off
from fastjepa.fused.step_memory import memory_on

Backend = Literal["auto", "eager", "fused"]
SwapPrecision = Literal["keep", "bf16"]
Recompute = Literal["auto", "on", "off"]
_OPS = ("batch_norm", "projected_losses")


@dataclass(frozen=True)
class Decision:
    """What is wanted, and why the rest is not: op → reason."""

    choice: Choice
    reasons: dict[str, str]
    calibration: str = ""


def decide(
    jepa: nn.Module,
    device: torch.device,
    backend: Backend,
    precision: SwapPrecision,
    example: Sequence[int] | None,
    purpose: Purpose,
    choice: Choice | None,
    recompute: Recompute = "auto",
) -> Decision:
    """Which parts are wanted.

    Raises:
        ValueError: `recompute` "on" where there will be no fused networks, or no training; a `choice` of training with
            own convolutions; a wrong `example`.
        RuntimeError: it was measured here that no choice with recomputation works.
    """
    if purpose == "inference":
        _refuse(recompute, "a rollout keeps nothing that could be computed again")
    elif choice is not None and choice.convolutions:
        raise ValueError(f"own convolutions are for inference, and the choice ({choice}) is to serve {purpose!r}")
    if choice is not None:
        return Decision(choice, dict.fromkeys(_OPS, f"it is not in the choice ({choice})"))
    if backend == "eager":
        _refuse(recompute, "backend='eager' has none")
        return Decision(EAGER, dict.fromkeys(_OPS, "backend 'eager' was asked for"))
    on_gpu = device.type == "cuda"
    setting: Setting | str = ""
    if on_gpu or example is not None:  # so that a wrong `example` fails everywhere
        arithmetic = "bf16" if precision == "bf16" else ambient_precision(device) if on_gpu else "fp32"
        setting = setting_of_jepa(jepa, device, example=example, purpose=purpose, precision=arithmetic)
    if backend == "fused" and purpose == "inference":
        return Decision(Choice(losses="fused", convolutions="all"), {})
    if backend == "fused":
        memory = _count_memory(setting, device, recompute)
        wanted = _wanted(recompute, memory, purpose)
        return Decision(Choice(batch_norm=True, losses="fused", recompute=wanted), {}, str(memory))
    if device.type == "cpu":
        _refuse(recompute, "auto takes none on a CPU")
        reason = "on a CPU, eager is fastest; fused kernels need a GPU"
        return Decision(Choice(losses="closed_form"), dict.fromkeys(_OPS, reason))
    if not on_gpu:
        reason = f"auto takes only what was measured, on a CPU or a CUDA device, and this model is on {device}"
        _refuse(recompute, reason)
        return Decision(EAGER, dict.fromkeys(_OPS, reason))
    if isinstance(setting, str):
        reason = f"auto takes only what was measured, and this model is not calibrated: {setting}"
        _refuse(recompute, reason)
        return Decision(EAGER, dict.fromkeys(_OPS, reason))
    return _measured(setting, device, recompute)


def _measured(setting: Setting, device: torch.device, recompute: Recompute) -> Decision:
    """What "auto" takes on a GPU."""
    torch.cuda.empty_cache()  # what this process has set aside and does not use, a child that measures cannot have
    memory = "" if switched_off() else _count_memory(setting, device, recompute)
    wanted = _wanted(recompute, memory, setting.purpose)

    def tried(choice: Choice) -> bool:
        of_flag = recompute in ("auto", "on" if choice.recompute else "off")
        return of_flag and (isinstance(memory, str) or memory.allows(choice))

    def allowed(choice: Choice) -> bool:
        return tried(choice) and not choice.cuda_graph

    verdict = resolve(setting, device, allowed=tried, recompute=wanted)
    if recompute == "on" and (problem := verdict.broken(allowed)) is not None:
        raise RuntimeError(f"recompute='on' cannot be served: nothing with it works here, for example {problem}")
    usual = Choice(batch_norm=True, losses="fused", recompute=True) if recompute == "on" else EAGER
    chosen = verdict.best(allowed, usual)
    reasons = {
        "batch_norm": verdict.why_not(lambda c: c.batch_norm or bool(c.convolutions), allowed),
        "projected_losses": verdict.why_not(lambda c: c.losses != "eager", allowed)
        if setting.purpose == "train" or not verdict.rows
        else "inference computes no losses",
    }
    told = verdict.report(chosen) + _graph_hint(verdict, chosen, tried) + (f"\n  {memory}" if str(memory) else "")
    return Decision(chosen, reasons, told)


def _count_memory(setting: Setting | str, device: torch.device, recompute: Recompute) -> Memory | str:
    """What a step of training needs with and without recomputation; or why that is not known, "" where it does not
    matter.
    """
    if device.type != "cuda" or recompute != "auto":
        return ""
    if isinstance(setting, str):
        return f"the memory of a step is not known ({setting}): recomputation"
    return memory_on(setting, device)


def _wanted(recompute: Recompute, memory: Memory | str, purpose: Purpose) -> bool:
    """Whether fused networks compute activations again, unless something else was measured to be faster."""
    if recompute != "auto":
        return recompute == "on"
    return purpose == "train" and recompute_first(memory)  # who rolls out keeps nothing


def _refuse(recompute: Recompute, why: str) -> None:
    if recompute == "on":
        raise ValueError(f"recompute='on' is for fused networks in training: {why}; use 'auto' or 'off'")


def _graph_hint(verdict: Verdict, chosen: Choice, allowed: Allowed) -> str:
    """What a graph would give, which modules alone cannot: the caller makes it."""
    best = verdict.best(allowed)
    if not best.cuda_graph or best == chosen:
        return ""
    name = "GraphedTrainStep" if verdict.setting.purpose == "train" else "GraphedRollout"
    return f"\n  with fastjepa.graphs.{name}, {best} would be {verdict.gain(best)}"
