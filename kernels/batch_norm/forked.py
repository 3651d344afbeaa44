"""`batch_norm_forward` as one node of autograd with several outputs: one result, each of whose uses has its gradient.

An op of torch.library has one gradient for each output, and its outputs may not share memory. An autograd.Function may
give one tensor out several times; the gradients come back one by one, and the kernel of the backward pass adds them
(`reduce`). Shapes: (N, C, H, W) in torch.channels_last, or (M, C).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastjepa.kernels.batch_norm.backward import batch_norm_backward, both_passes
from fastjepa.kernels.batch_norm.channel_vectors import ChannelVectors
from fastjepa.kernels.batch_norm.forward import batch_norm_forward, parameter_gradients
from fastjepa.kernels.shares import Shares


def as_rows(tensor: Tensor) -> Tensor:
    """(N, C, H, W) or (M, C) as rows (M, C): a view where rows are evenly spaced in memory, else a copy."""
    return tensor if tensor.dim() == 2 else tensor.permute(0, 2, 3, 1).reshape(-1, tensor.shape[1])


def as_images(rows: Tensor, shape: torch.Size) -> Tensor:
    """Rows (M, C) as a tensor of this shape."""
    if len(shape) == 2:
        return rows
    N, C, H, W = shape
    return rows.view(N, H, W, C).permute(0, 3, 1, 2)


def forked(
    x: Tensor,
    residual: Tensor | None,
    vectors: ChannelVectors,
    options: tuple[Any, ...],
    uses: int,
    shares: Shares | None,
) -> tuple[Tensor, ...]:
    """The result of `batch_norm_forward`, `uses` times; x and residual are channels-last, `options` its scalars.

    shares: of which rows the batch's statistics are, if not of these alone.
    """
    outs: tuple[Tensor, ...] = _Forked.apply(x, residual, *vectors, options, uses, shares)
    return outs


class _Forked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
        *rest, options, uses, shares = arguments
        vectors = ChannelVectors(*rest)
        rows = None if residual is None else as_rows(residual)
        out = as_images(batch_norm_forward(as_rows(x), rows, *vectors, *options), x.shape)
        relu = options[-1]
        ctx.has_residual = residual is not None
        # A final residual is needed for the ReLU's mask, and for the sum of gradients, which is its own.
        needed = relu or uses > 1 or vectors.residual_mean is not None
        ctx.save_for_backward(x, residual if needed else None, *vectors)
        ctx.options, ctx.shares = options, shares
        ctx.set_materialize_grads(False)
        return (out, *(out.detach() for _ in range(uses - 1)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, residual, *rest = ctx.saved_tensors
        vectors, shape = ChannelVectors(*rest), x.shape
        nothing = (None,) * (2 + len(vectors) + 3)
        given = [_gradient_rows(grad) for grad in grads if grad is not None]
        if not given:
            return nothing
        rows = None if residual is None else as_rows(residual)
        grad_residual: Tensor | None
        if ctx.shares is None:
            grad_x, grad_residual, sums = batch_norm_backward(given, as_rows(x), rows, *vectors, *ctx.options)
        else:  # not an op: ranks talk between its passes
            grad_x, grad_residual, sums = both_passes(given, as_rows(x), rows, vectors, ctx.options, ctx.shares)
        found: Tensor | None = None
        if ctx.has_residual:  # without a ReLU, the one gradient of a final residual is that of the output
            found = given[0] if residual is None else grad_residual
            assert found is not None
            found = as_images(found, shape)
        return (as_images(grad_x, shape), found, *parameter_gradients(vectors, sums), None, None, None)


def _gradient_rows(grad: Tensor) -> Tensor:
    rows = as_rows(grad)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
