"""BatchNorm over a batch that lies on several ranks, in plain torch: any dtype and device, one collective each way.

PyTorch's own SyncBatchNorm takes CUDA tensors only, and is another module in each one's place. Here the modules stay
what they are: inside `global_statistics`, every call of `F.batch_norm` that would use its batch's statistics uses those
of all ranks. A fused network asks for `kernels.shares.current_shares` and does the same in its kernels.

Everything is computed on x − pivot, a value of each rank's own for each channel: exact for values near each other, so
that a mean far from zero costs no precision.

    n = Σ nᵢ,   mean = Σ nᵢ·meanᵢ / n,   M2 = Σ M2ᵢ + Σ nᵢ·(meanᵢ − mean)²       over ranks i, in their order
    ∂x = weight·rstd·(g − Σg/n − x̂·Σg·x̂/n)                                    both sums over all ranks

(Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance"; Ioffe and Szegedy 2015, section 3.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from fastjepa.kernels.shares import Shares, refuse_compiled, sharing


@contextmanager
def global_statistics(shares: Shares | None) -> Iterator[None]:
    """Inside, BatchNorm in train mode normalises by, and moves its buffers to, the statistics of all ranks' rows.

    It is for the forward pass; the backward pass knows. None changes nothing; once more the same changes nothing.
    """
    if shares is None:
        yield
        return
    with sharing(shares), _GlobalBatchNorm(shares):
        yield


class _GlobalBatchNorm(TorchFunctionMode):
    """Stands in for `F.batch_norm`, whoever calls it."""

    def __init__(self, shares: Shares) -> None:
        super().__init__()
        self._shares = shares

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return global_batch_norm(
            input, running_mean, running_var, weight, bias, momentum=momentum, eps=eps, shares=self._shares
        )


def global_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    momentum: float,
    eps: float,
    shares: Shares,
) -> Tensor:
    """`F.batch_norm(..., training=True)` of rows that lie on several ranks.

    Args:
        x: (N, C, ...), this rank's rows; statistics are taken in fp32 or better.
        running_mean, running_var: (C,), moved in place with the mean and unbiased variance of all rows; or None.
        weight, bias: (C,), or None. Their gradients are this rank's part of the whole.
        momentum: of the buffers.
        eps: added to the variance.
        shares: which part of the rows is whose.

    Returns:
        Shape and dtype of x.

    Raises:
        RuntimeError: under torch.compile.
        ValueError: all ranks together have one value per channel.
    """
    refuse_compiled(shares, "BatchNorm")
    n_rows = sum(shares.rows(x.numel() // x.shape[1]))
    if n_rows < 2:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape} on {shares.counts}"
        )
    out, mean, var = _Function.apply(x, weight, bias, eps, shares)
    with torch.no_grad():
        for buffer, value in ((running_mean, mean), (running_var, var * (n_rows / (n_rows - 1)))):
            if buffer is not None:
                buffer.mul_(1 - momentum).add_(value.to(buffer.dtype), alpha=momentum)
    return out


def _merge(parts: Tensor, rows: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Mean (C,), relative to the first part's pivot, and M2 (C,) of all rows, from P parts of `rows` (P,) each.

    parts: (P, 3, C), of each its pivot, its mean relative to that, and its M2.
    """
    pivot, mean, m2 = parts.unbind(1)
    rows = rows.unsqueeze(1)
    mean = mean + (pivot - pivot[0])
    offset = mean - mean[0]
    shift = (offset * (rows / n_rows)).sum(0)
    return mean[0] + shift, (m2 + rows * (offset - shift).square()).sum(0)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, shares: Shares
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        dims = [d for d in range(x.dim()) if d != 1]
        pivot = x.movedim(1, -1)[(0,) * (x.dim() - 1)].to(wide)
        out = x.to(wide) - _of_channels(pivot, x)
        var, mean = torch.var_mean(out, dim=dims, correction=0)
        own = x.numel() // x.shape[1]
        n_rows = sum(shares.rows(own))
        parts = shares.filled(shares.gather(torch.stack((pivot, mean, var * own))))
        first_pivot = parts[0, 0]
        mean, m2 = _merge(parts, shares.filled(shares.weights(own, mean)), n_rows)
        of_own = mean + (first_pivot - pivot)
        var = m2 / n_rows
        rstd = torch.rsqrt(var + eps)
        scale = rstd if weight is None else rstd * weight.to(wide)
        out.sub_(_of_channels(of_own, x)).mul_(_of_channels(scale, x))
        if bias is not None:
            out += _of_channels(bias.to(wide), x)
        ctx.save_for_backward(x, weight, pivot, of_own, rstd)
        mean = first_pivot + mean
        ctx.shares, ctx.n_rows = shares, n_rows
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(mean, var)
        return out.to(x.dtype), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, pivot, mean, rstd = ctx.saved_tensors
        wide, dims = rstd.dtype, [d for d in range(x.dim()) if d != 1]
        g = grad.to(wide)
        x_hat = x.to(wide) - _of_channels(pivot, x)
        x_hat.sub_(_of_channels(mean, x)).mul_(_of_channels(rstd, x))
        own = torch.stack((g.sum(dims), (g * x_hat).sum(dims)))
        mean_g, mean_gx = ctx.shares.sum(own) / ctx.n_rows
        scale = rstd if weight is None else rstd * weight.to(wide)
        grad_x = (g - _of_channels(mean_g, x) - x_hat * _of_channels(mean_gx, x)) * _of_channels(scale, x)
        return (
            grad_x.to(x.dtype),
            None if weight is None else own[1].to(weight.dtype),
            None if ctx.bias_dtype is None else own[0].to(ctx.bias_dtype),
            None,
            None,
        )


def _of_channels(vector: Tensor, like: Tensor) -> Tensor:
    """(C,) so that it broadcasts over (N, C, ...)."""
    return vector.view(-1, *(1,) * (like.dim() - 2))
