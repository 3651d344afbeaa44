"""The functions to call: windows of states whose gradients are gathered in one pass, channels-last.

An unroll reads the encoded states as windows, and then, K - 1 times, the first states followed by what was predicted.
Each of these uses has a gradient of its own, which the kernel adds, so that autograd has nothing to add or to pad.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastjepa.kernels.frame_windows import reference
from fastjepa.kernels.frame_windows.gather import gather_frames


def first_windows(states: Tensor, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """What an unroll reads of the states.

    Args:
        states: (B, D, T, H, W), T ≥ context; any layout, best channels-last (`torch.channels_last_3d`).
        context: c, how many states a window has.

    Returns:
        windows (B, c·D, T - c + 1, H, W); the states again, and the first c of them, (B, D, c, H, W), both in the same
        memory: use those, not the argument, and their gradients are added in the kernel.

    Raises:
        RuntimeError: in the backward pass, if the kernels cannot run on this device.
    """
    if torch.compiler.is_compiling():
        return reference.first_windows(states, context)
    outs: tuple[Tensor, Tensor, Tensor] = _FirstWindows.apply(states, context)
    return outs


def next_windows(head: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """What an unroll reads after a step.

    Args:
        head: the first c states (B, D, c, H, W).
        predicted: of the states c, …, T: (B, D, T - c + 1, H, W); the last, beyond the sequence, is dropped.

    Returns:
        windows (B, c·D, T - c + 1, H, W) of the sequence, and the sequence (B, D, T, H, W).

    Raises:
        RuntimeError: in the backward pass, if the kernels cannot run on this device.
    """
    if torch.compiler.is_compiling():
        return reference.next_windows(head, predicted)
    outs: tuple[Tensor, Tensor] = _Sequence.apply(head, predicted, True)
    return outs


def last_sequence(head: Tensor, predicted: Tensor) -> Tensor:
    """The sequence that `next_windows` gives, where no step follows that reads windows of it."""
    if torch.compiler.is_compiling():
        return reference.sequence(head, predicted)
    out: Tensor = _Sequence.apply(head, predicted, False)[1]
    return out


class _FirstWindows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, context: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.context, ctx.shape = context, states.shape
        states = states.detach()
        return reference.first_windows(states, context)

    @staticmethod
    def backward(ctx: Any, windows: Tensor | None, states: Tensor | None, head: Tensor | None) -> Any:
        _, _, T, H, W = ctx.shape
        if windows is None and states is None:
            if head is None:
                return None, None
            states = head.new_zeros(ctx.shape)
        _, grad = gather_frames(_rows(windows), _rows(states), _rows(head), T, ctx.context, False)
        return _frames(grad, H, W), None


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: Tensor, predicted: Tensor, with_windows: bool) -> tuple[Tensor | None, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.context, ctx.shape = head.shape[2], predicted.shape
        if with_windows:
            return reference.next_windows(head, predicted)
        return None, reference.sequence(head, predicted)

    @staticmethod
    def backward(ctx: Any, windows: Tensor | None, sequence: Tensor | None) -> Any:
        if windows is None and sequence is None:
            return None, None, None
        _, _, n_windows, H, W = ctx.shape
        T = n_windows + ctx.context - 1
        grad_head, grad = gather_frames(_rows(windows), _rows(sequence), None, T, ctx.context, True)
        return _frames(grad_head, H, W), _frames(grad, H, W), None


def _rows(x: Tensor | None) -> Tensor | None:
    """(B, D, T, H, W) → (B, T, H·W, D), contiguous; no copy of a channels-last tensor."""
    return None if x is None else x.permute(0, 2, 3, 4, 1).contiguous().flatten(2, 3)


def _frames(rows: Tensor, H: int, W: int) -> Tensor:
    """The inverse of `_rows`."""
    return rows.unflatten(2, (H, W)).permute(0, 4, 1, 2, 3)
