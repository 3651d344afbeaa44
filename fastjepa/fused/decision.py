"""Which parts of a JEPA are to be swapped, and why the others are not: before `swap` looks at what can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fastjepa.calibration.choice import EAGER, Choice
from fastjepa.calibration.setting import Purpose, Setting, ambient_precision, setting_of_jepa
from fastjepa.calibration.verdict import Verdict, resolve

Backend = Literal["auto", "eager", "fused"]
SwapPrecision = Literal["keep", "bf16"]
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
) -> Decision:
    """Which parts are wanted."""
    if choice is not None:
        return Decision(choice, dict.fromkeys(_OPS, f"it is not in the choice ({choice})"))
    if backend == "eager":
        return Decision(EAGER, dict.fromkeys(_OPS, "backend 'eager' was asked for"))
    if backend == "fused":
        return Decision(Choice(batch_norm=True, losses="fused", recompute=True), {})
    on_gpu = device.type == "cuda"
    setting: Setting | str = ""
    if on_gpu or example is not None:  # so that a wrong `example` fails everywhere
        arithmetic = "bf16" if precision == "bf16" else ambient_precision(device) if on_gpu else "fp32"
        setting = setting_of_jepa(jepa, device, example=example, purpose=purpose, precision=arithmetic)
    if device.type == "cpu":
        reason = "on a CPU, eager is fastest; fused kernels need a GPU"
        return Decision(Choice(losses="closed_form"), dict.fromkeys(_OPS, reason))
    if not on_gpu:
        reason = f"auto takes only what was measured, on a CPU or a CUDA device, and this model is on {device}"
        return Decision(EAGER, dict.fromkeys(_OPS, reason))
    if isinstance(setting, str):
        reason = f"auto takes only what was measured, and this model is not calibrated: {setting}"
        return Decision(EAGER, dict.fromkeys(_OPS, reason))
    torch.cuda.empty_cache()  # what this process has set aside and does not use, a child that measures cannot have
    verdict = resolve(setting, device)
    chosen = verdict.best(_without_graph)
    reasons = {
        "batch_norm": verdict.why_not(lambda c: c.batch_norm, _without_graph),
        "projected_losses": verdict.why_not(lambda c: c.losses != "eager", _without_graph)
        if purpose == "train" or not verdict.rows
        else "inference computes no losses",
    }
    return Decision(chosen, reasons, verdict.report(chosen) + _graph_hint(verdict, chosen))


def _without_graph(choice: Choice) -> bool:
    return not choice.cuda_graph


def _graph_hint(verdict: Verdict, chosen: Choice) -> str:
    """What a graph would give, which modules alone cannot: the caller makes it."""
    best = verdict.best()
    if not best.cuda_graph or best == chosen:
        return ""
    name = "GraphedTrainStep" if verdict.setting.purpose == "train" else "GraphedRollout"
    return f"\n  with fastjepa.graphs.{name}, {best} would be {verdict.gain(best)}"
