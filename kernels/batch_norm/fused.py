"""The functions to call: BatchNorm (+ residual) (+ ReLU) of `nn.BatchNorm` modules, fused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastjepa.kernels.batch_norm.across_ranks import statistics_across_ranks
from fastjepa.kernels.batch_norm.channel_vectors import ChannelVectors
from fastjepa.kernels.batch_norm.forked import as_images, as_rows, forked
from fastjepa.kernels.batch_norm.forward import batch_norm_forward
from fastjepa.kernels.batch_norm.merge import RunningStatistics
from fastjepa.kernels.batch_norm.statistics import batch_norm_statistics, check_more_than_one_value
from fastjepa.kernels.checks import check_tensor, require_available
from fastjepa.kernels.shares import Shares, refuse_compiled

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


def batch_norm_act(
    x: Tensor,
    bn: BatchNorm,
    residual: Tensor | None = None,
    residual_bn: BatchNorm | None = None,
    relu: bool = True,
    *,
    shares: Shares | None = None,
) -> Tensor:
    """relu?( bn(x) [+ residual] [+ residual_bn(residual)] ) as fused kernels, with nn.BatchNorm's semantics.

    Each module's mode is its own: in training (or without running buffers) it uses the batch's statistics, and in
    training it moves its buffers as nn.BatchNorm does; in eval it uses its buffers.

    Args:
        x: (N, C, H, W), best in torch.channels_last (another layout is copied, with a warning), or (M, C); fp32, bf16
            or fp16; C ≤ 1024.
        bn: the BatchNorm of x; its weight, bias and buffers in fp32 or x's dtype.
        residual: None, or shape and dtype of x.
        residual_bn: the BatchNorm of a raw residual; None adds the residual as it is.
        relu: apply the ReLU.
        shares: where x is one rank's part of a batch on several: statistics are those of the whole batch, gathered in
            one collective each way. The gradients of parameters are parts, whose sum over the ranks is the whole.

    Returns:
        Shape and dtype of x; channels-last if 4-D. Its gradient cannot be differentiated again.

    Raises:
        RuntimeError: the kernels cannot run on x's device, or shares under torch.compile.
        ValueError: one value per channel in training (nn.BatchNorm's own error), or an argument's shape, channels or
            device does not fit.
        TypeError: an argument's type or dtype is not accepted.
    """
    return batch_norm_act_repeatable(x, bn, residual, residual_bn, relu, shares=shares).outs[0]


class Repeatable(NamedTuple):
    """A result, once for each use, and how to compute it again."""

    outs: tuple[Tensor, ...]
    again: Callable[[Tensor | None], Tensor]


def _own(parameter: Tensor | None) -> Tensor | None:
    return parameter


def batch_norm_act_repeatable(
    x: Tensor,
    bn: BatchNorm,
    residual: Tensor | None = None,
    residual_bn: BatchNorm | None = None,
    relu: bool = True,
    *,
    uses: int = 1,
    parameter_of: Callable[[Tensor | None], Tensor | None] = _own,
    shares: Shares | None = None,
) -> Repeatable:
    """`batch_norm_act`, for a result that is used several times, and that need not be kept for a backward pass.

    Args:
        uses: how many tensors to give for the one result, 1 to 4: one memory, but each has a gradient of its own, and
            the kernel adds these. (Autograd would add them before, two at a time, each time reading and writing.)
        parameter_of: the tensor to use for a parameter of the modules.

    Returns:
        outs: `uses` tensors.
        again: a function that computes the result again, bit for bit, in one pass and without gradient. It takes the
            residual (None if there is none) and keeps only x and the statistics alive. It moves no buffers, and gathers
            nothing. It is valid until a parameter changes.
    """
    op = "batch_norm_act"
    require_available(op, x.device)
    refuse_compiled(shares, op)
    _check_module_inputs(op, x, bn, residual, residual_bn, shares)
    x = _channels_last(op, "x", x)
    residual = None if residual is None else _channels_last(op, "residual", residual)
    normalised = [(bn, as_rows(x))]
    if residual_bn is not None and residual is not None:
        normalised.append((residual_bn, as_rows(residual)))
    statistics = _statistics_of(op, normalised, shares)
    mean, var, batch_statistics = statistics[0]
    vectors = ChannelVectors(mean, var, parameter_of(bn.weight), parameter_of(bn.bias))
    residual_eps, residual_batch_statistics = 0.0, False
    if residual_bn is not None and residual is not None:
        residual_mean, residual_var, residual_batch_statistics = statistics[1]
        vectors = ChannelVectors(
            *vectors[:4], residual_mean, residual_var, parameter_of(residual_bn.weight), parameter_of(residual_bn.bias)
        )
        residual_eps = residual_bn.eps
    options = (bn.eps, residual_eps, batch_statistics, residual_batch_statistics, relu)
    kept, shape = x.detach(), x.shape

    @torch.no_grad()
    def again(residual: Tensor | None) -> Tensor:
        rows = None if residual is None else as_rows(_channels_last(op, "residual", residual))
        return as_images(batch_norm_forward(as_rows(kept), rows, *vectors, *options), shape)

    if torch.compiler.is_compiling():  # which adds gradients itself, in kernels that it fuses
        rows = None if residual is None else as_rows(residual)
        out = as_images(batch_norm_forward(as_rows(x), rows, *vectors, *options), shape)
        return Repeatable((out,) * uses, again)
    return Repeatable(forked(x, residual, vectors, options, uses, shares), again)


def _uses_batch_statistics(bn: BatchNorm) -> bool:
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def _statistics_of(
    op: str, normalised: Sequence[tuple[BatchNorm, Tensor]], shares: Shares | None
) -> list[tuple[Tensor, Tensor, bool]]:
    """(mean, var, whether they are the batch's) of each BatchNorm's rows; moves the buffers of those in training."""
    of_batch = [(rows.detach(), _moved_buffers(bn)) for bn, rows in normalised if _uses_batch_statistics(bn)]
    if shares is None:
        found = iter([batch_norm_statistics(rows, *buffers) for rows, buffers in of_batch])
    else:
        found = iter(statistics_across_ranks(op, of_batch, shares) if of_batch else [])
    statistics = []
    for bn, _ in normalised:
        if _uses_batch_statistics(bn):
            statistics.append((*next(found), True))
        else:
            assert bn.running_mean is not None
            assert bn.running_var is not None
            statistics.append((bn.running_mean, bn.running_var, False))
    return statistics


def _moved_buffers(bn: BatchNorm) -> RunningStatistics:
    """Those that a batch moves: none in eval mode, or where there are none."""
    if bn.training and bn.track_running_stats:
        return RunningStatistics(bn.running_mean, bn.running_var, bn.num_batches_tracked, bn.momentum)
    return RunningStatistics()


def _check_module_inputs(
    op: str,
    x: Tensor,
    bn: nn.Module,
    residual: Tensor | None,
    residual_bn: nn.Module | None,
    shares: Shares | None,
) -> None:
    """All checks that need the original tensors or modules, before anything is computed or moved."""
    check_tensor(op, "x", x)
    if x.dim() not in (2, 4):
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; accepted: (N, C, H, W) or (M, C)")
    if residual is not None:
        check_tensor(op, "residual", residual, shape=tuple(x.shape), dtypes=(x.dtype,), device=x.device)
    elif residual_bn is not None:
        raise ValueError(f"{op}: residual_bn is given, but residual is None")
    for name, module in (("bn", bn), ("residual_bn", residual_bn)):
        if module is None and name == "residual_bn":
            continue
        if not isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            raise TypeError(f"{op}: {name} is a {type(module).__name__}; accepted: nn.BatchNorm1d, nn.BatchNorm2d")
        if module.num_features != x.shape[1]:
            raise ValueError(f"{op}: {name} has {module.num_features} channels, but x has shape {tuple(x.shape)}")
        if _uses_batch_statistics(module):
            check_more_than_one_value(x.shape, shares)


def _channels_last(op: str, name: str, tensor: Tensor) -> Tensor:
    """`tensor` itself if its rows are contiguous, else a copy, with a warning."""
    if tensor.dim() == 2:
        return tensor.contiguous()
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"{op}: {name} is not channels-last, so it is copied on every call; "
                "convert the model and its input with .to(memory_format=torch.channels_last)",
                stacklevel=4,  # the caller of batch_norm_act
            )
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor
