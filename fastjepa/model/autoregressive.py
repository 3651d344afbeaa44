"""The rollout that users call: from encoded frames to any horizon, one frame at a time.

Shapes: a video is (B, C, T, H, W), its states (B, D, T, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
        predictor: has `context_length` = c; predicts every next state.
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
    out: Tensor | None = None
    first = 0
    for part in given.split(chunk or max(1, len(given))):
        if states is None:
            with span("encode"):
                part = encode(part)
        if out is None:
            out = part.new_empty(len(given), part.shape[1], frames + steps, *part.shape[3:])
        chunk_out = out[first : first + len(part)]
        chunk_out[:, :, :frames] = part
        for step in range(steps):
            with span(f"rollout step {step + 1}"):
                at = frames + step
                chunk_out[:, :, at : at + 1] = predictor(chunk_out[:, :, at - context : at])[:, :, -1:]
        first += len(part)
    assert out is not None, "split gives at least one part"
    return out
