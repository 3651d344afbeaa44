"""BatchNorm on a CPU, channels-last, with sums that stay exact over many rows.

In train mode, torch's channels-last BatchNorm on a CPU adds all rows of a thread one after another in fp32: statistics
are 1e-5 from float64 where contiguous ones are 1e-7, and gradients 10 to 30 times further. Here the rows are taken in
blocks, each small enough for such a sum, and the blocks are merged in float64 (Chan, Golub and LeVeque 1983).

All passes over the rows are torch's own kernels: of memory (rows, C) seen as (rows / blocks, blocks·C), a kernel that
keeps one sum for each channel keeps one for each block and channel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_modules

ROWS_OF_A_BLOCK = 1024  # added one after another; more blocks than this needs would leave the caches
LEAST_SUMS = 2048  # kept at once: fewer would not fill the vector registers of some threads


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x); of a BatchNorm2d in train mode on a CPU, channels-last in fp32, with blocked sums.

    x (N, C, H, W) → the same shape and layout. The buffers move as by norm(x).
    """
    if not _is_inexact(norm, x):
        out: Tensor = norm(x)
        return out
    assert isinstance(norm, nn.BatchNorm2d)
    normalized, mean, var = _BlockedBatchNorm.apply(x, norm.weight, norm.bias, norm.eps)
    if norm.training and norm.track_running_stats:
        _move_buffers(norm, mean, var * (_rows(x) / (_rows(x) - 1)))
    return normalized


def _is_inexact(norm: nn.Module, x: Tensor) -> bool:
    """Whether norm(x) would run torch's channels-last kernel, and nothing waits for or stands in for that call."""
    return (
        type(x) is Tensor
        and not _is_intercepted()  # asked first: within vmap a tensor cannot tell its layout
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and type(norm) is nn.BatchNorm2d
        and (norm.training or norm.running_mean is None)
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
        and _rows(x) > 1
        and x.shape[1] == norm.num_features
        and not has_hooks(norm)
    )


def _is_intercepted() -> bool:
    """Whether something stands in for F.batch_norm, records it, or differentiates it as no Function can."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of this very module does more, or other things, than its class's `forward`: hooks of its own or of
    all modules, a `forward` set on the object or compiled. Children are not looked at.
    """
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    of_object = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return any(own) or of_object or torch_modules._has_any_global_hook()


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[1]


@torch.no_grad()
def _move_buffers(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> None:
    """As BatchNorm2d does; past autograd's counts of changes, because an earlier call may have kept the buffers."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:
        assert norm.num_batches_tracked is not None
        momentum = 1.0 / float(norm.num_batches_tracked)
    for buffer, value in ((norm.running_mean, mean), (norm.running_var, var)):
        if buffer is not None:
            buffer.data.mul_(1 - momentum).add_(value.to(buffer.dtype), alpha=momentum)


def _blocked(x: Tensor) -> tuple[Tensor, Tensor]:
    """A channels-last x (N, C, H, W) as (1, blocks·C, rows of a block, 1), channels-last, and the rows left (n, C)."""
    n_rows, channels = _rows(x), x.shape[1]
    rows = x.permute(0, 2, 3, 1).reshape(n_rows, channels)
    blocks = max(1, min(max(LEAST_SUMS // channels, n_rows // ROWS_OF_A_BLOCK), n_rows // 16))
    of_a_block = n_rows // blocks
    whole = rows[: blocks * of_a_block].view(1, of_a_block, 1, blocks * channels)
    return whole.permute(0, 3, 1, 2), rows[blocks * of_a_block :]


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, (C,) float64."""
    whole, left = _blocked(x)
    of_a_block = whole.shape[2]
    means, variances = (
        part.view(-1, x.shape[1]).double() for part in torch.batch_norm_update_stats(whole, None, None, 0.0)
    )
    left = left.double()
    mean = (of_a_block * means.sum(0) + left.sum(0)) / _rows(x)
    squares = of_a_block * (variances + (means - mean).square()).sum(0) + (left - mean).square().sum(0)
    return mean, squares / _rows(x)


def _gradient_sums(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Σ grad·x̂ and Σ grad of each channel, (C,) float64."""
    channels = x.shape[1]
    (whole, left), (grad_whole, grad_left) = _blocked(x), _blocked(grad)
    blocks = whole.shape[1] // channels
    of_blocks = [vector.repeat(blocks) for vector in (mean, rstd)]
    _, products, sums = torch.ops.aten.native_batch_norm_backward(
        grad_whole, whole, None, None, None, *of_blocks, True, 0.0, [False, True, True]
    )
    grad_left = grad_left.double()
    x_hat = (left.double() - mean) * rstd
    return (
        products.view(blocks, channels).double().sum(0) + (grad_left * x_hat).sum(0),
        sums.view(blocks, channels).double().sum(0) + grad_left.sum(0),
    )


class _BlockedBatchNorm(torch.autograd.Function):
    """x, weight and bias → x̂·weight + bias, and the mean and biased variance, which have no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact_mean, exact_var = _statistics(x)
        mean, var = exact_mean.float(), exact_var.float()
        ctx.save_for_backward(x, weight, mean, var, (exact_var + eps).rsqrt().float())
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradients are to be differentiated again: torch's own can
            given = (grad, x, weight, None, None, mean, rstd, True, ctx.eps, list(ctx.needs_input_grad[:3]))
            return *torch.ops.aten.native_batch_norm_backward(*given), None
        grad = grad.contiguous(memory_format=torch.channels_last)
        products, sums = _gradient_sums(grad, x, mean, rstd)
        grad_x = None
        if ctx.needs_input_grad[0]:
            scale = rstd.double() if weight is None else rstd.double() * weight
            # scale·(grad − Σgrad/n − x̂·Σgrad·x̂/n)
            slope, offset = (-scale * total / _rows(x) for total in (products, sums))
            correction = F.batch_norm(x, mean, var, slope.float(), offset.float(), training=False, eps=ctx.eps)
            grad_x = correction.addcmul_(grad, scale.float().view(1, -1, 1, 1))
        wanted = ctx.needs_input_grad[1:3]
        return grad_x, products.float() if wanted[0] else None, sums.float() if wanted[1] else None, None
