"""Windows of states in plain torch, for any dtype and device, without Triton."""

from __future__ import annotations

import torch
from torch import Tensor


def frame_windows(states: Tensor, context: int) -> Tensor:
    """States (B, D, T, H, W) → windows (B, context·D, T - context + 1, H, W)."""
    count = states.shape[2] - context + 1
    return torch.cat([states[:, :, i : i + count] for i in range(context)], dim=1)


def first_windows(states: Tensor, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """(windows, the states, the first `context` of them): arguments and results of `fused.first_windows`."""
    return frame_windows(states, context), states, states[:, :, :context]


def sequence(head: Tensor, predicted: Tensor) -> Tensor:
    """The first states (B, D, c, H, W), and what was predicted of the others, (B, D, T - c + 1, H, W) without its last,
    → (B, D, T, H, W).
    """
    return torch.cat((head, predicted[:, :, :-1]), dim=2)


def next_windows(head: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """(windows, the sequence): arguments and results of `fused.next_windows`."""
    states = sequence(head, predicted)
    return frame_windows(states, head.shape[2]), states
