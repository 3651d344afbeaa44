"""Concatenations whose gradients are not taken apart by copies, nor added by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastjepa.model.networks import join_skip, resized


def join_forked(x: Tensor, skip: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """cat[x, skip] for two users: one memory, given out twice.

    Args:
        x: (N, C, h, w), resized to the skip's where odd sizes made it differ.
        skip: (N, C', H, W), twice, as `batch_norm_act_repeatable` gives a result for several users. Each gets the
            gradient of one user, as a view of it; that of x is their sum, channels-last.
    """
    if torch.compiler.is_compiling():
        joined = join_skip(x, skip[0])
        return joined, joined
    outs: tuple[Tensor, Tensor] = _Join.apply(resized(x, skip[0]), *skip)
    return outs


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor, same_skip: Tensor) -> tuple[Tensor, Tensor]:
        ctx.channels = x.shape[1]
        joined = torch.cat((x, skip), dim=1)
        return joined, joined.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, same_grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        C, grad_x = ctx.channels, None
        if ctx.needs_input_grad[0]:
            grad_x = (grad[:, :C] + same_grad[:, :C]).contiguous(memory_format=torch.channels_last)
        return grad_x, grad[:, C:], same_grad[:, C:]
