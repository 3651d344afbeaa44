"""Concatenations whose gradients are not taken apart by copies, nor added by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastjepa.model.networks import join_skip, resized


def join_used_twice(x: Tensor, skip: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`join_skip` for two users of the result: one memory, given out twice.

    Args:
        x: (N, C, h, w), resized to the skip's where odd sizes made it differ.
        skip: (N, C', H, W), twice, as `batch_norm_act_repeatable` gives a result that has several uses. Each gets the
            gradient of one user, as a view of it; that of x is their sum, channels-last.

    Returns:
        cat[x, skip], twice.
    """
    if torch.compiler.is_compiling():
        joined = join_skip(x, skip[0])
        return joined, joined
    outs: tuple[Tensor, Tensor] = _Join.apply(resized(x, skip[0]), *skip)
    return outs


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor, same_skip: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.channels = x.shape[1]
        joined = torch.cat((x, skip), dim=1)
        return joined, joined.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, same_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        C = ctx.channels
        halves = [(g[:, :C], g[:, C:]) if g is not None else (None, None) for g in (grad, same_grad)]
        (first, to_skip), (second, to_same_skip) = halves
        grad_x = None
        if ctx.needs_input_grad[0]:
            given = [half for half in (first, second) if half is not None]
            if given:
                total = given[0] + given[1] if len(given) == 2 else given[0]
                grad_x = total.contiguous(memory_format=torch.channels_last)
        return grad_x, to_skip, to_same_skip
