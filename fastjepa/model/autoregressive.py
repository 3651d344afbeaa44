"""The rollout that users call: from encoded frames to any horizon, one frame at a time.

Shapes: a video is (B, C, T, H, W), its states (B, D, T, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.profiling import span


@torch.no_grad()
def autoregressive_rollout(
    encode: Callable[[Tensor], Tensor],
    predictor: Any,
    video: Tensor | None,
    steps: int,
    *,
    states: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Predict `steps` frames beyond the given ones, each from the last c states (predicted ones included).

    Equals `unroll(..., unroll_mode="autoregressive", ctxt_window_time=c)`; the caller sees to eval mode.

    Args:
        encode: video → states.
        predictor: has `context_length` = c; predicts every next state. One with a method `roll_out(states, steps, out)`
            of its own, as a folded one has, does all steps in that (see `own_method`).
        video: (B, C, T, H, W), T ≥ c; encoded first.
        steps: how many frames to predict, ≥ 1.
        states: (B, D, T, H, W) instead of a video.
        chunk: encode and predict this many clips at a time, for less memory; default: all at once.

    Returns:
        The T given states followed by the predicted ones: (B, D, T + steps, H, W).

    Raises:
        ValueError: both or none of video and states, another rank, too few frames, `steps` or `chunk` < 1.
    """
    given = video if states is None else states
    if given is None or (video is not None and states is not None):
        raise ValueError("rollout takes either a video or states=..., not both and not neither")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 clip, got {chunk}")
    if given.dim() != 5:
        name, letter = ("video", "C") if states is None else ("states", "D")
        raise ValueError(f"{name} must be (B, {letter}, T, H, W), got shape {tuple(given.shape)}")
    context, frames = predictor.context_length, given.shape[2]
    if frames < context:
        raise ValueError(f"a rollout starts from at least {context} frames, got {frames}")
    roll_out = own_method(predictor, "roll_out") or partial(roll_out_plainly, predictor)
    out: Tensor | None = None
    first = 0
    for part in given.split(chunk or max(1, len(given))):
        if states is None:
            with span("encode"):
                part = encode(part)
        if out is None:
            out = part.new_empty(len(given), part.shape[1], frames + steps, *part.shape[3:])
        roll_out(part, steps, out[first : first + len(part)])
        first += len(part)
    assert out is not None, "split gives at least one part"
    return out


def roll_out_plainly(predictor: Any, states: Tensor, steps: int, out: Tensor) -> Tensor:
    """States (B, D, T, H, W) and `steps` predicted ones behind them, step by step, in `out` (B, D, T + steps, H, W)."""
    context, frames = predictor.context_length, states.shape[2]
    out[:, :, :frames] = states
    for step in range(steps):
        with span(f"rollout step {step + 1}"):
            at = frames + step
            out[:, :, at : at + 1] = predictor(out[:, :, at - context : at])[:, :, -1:]
    return out


def parallel_tails(predictor: Any, states: Tensor, steps: int) -> Iterator[Tensor]:
    """The frames of a parallel rollout in eval mode that each step computes anew.

    With frozen BatchNorm, prediction i of step k + 1 equals prediction i of step k for i < k: only the tail changes.
    For s = 0 … steps - 1 this yields the predictions of frames s + c … T - 1 after s + 1 steps, (B, D, T - c - s, H,
    W).
    """
    context, current = predictor.context_length, states
    for s in range(steps):
        # Predictions of frames s + c … T - 1 read the frames s … T - 2; what lies before them is final.
        with span(f"rollout step {s + 1}"):
            tail = predictor(current[:, :, s:-1], None)
        yield tail
        current = torch.cat((current[:, :, : s + context], tail), dim=2)


def own_method(module: Any, name: str) -> Callable[..., Any] | None:
    """A method of a module's class that does several calls' work at once; None if it has none, or where something
    waits for its calls: a hook, or what is wrapped around it (torch.compile).
    """
    # Asked of the class: a wrapper hands on what it is asked for itself.
    method = getattr(type(module), name, None)
    return None if method is None or _has_hooks(module) else partial(method, module)


def _has_hooks(module: nn.Module) -> bool:
    """Whether a call of this very module does more than its `forward`."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)
