"""The functions to call: BatchNorm (+ residual) (+ ReLU) of `nn.BatchNorm` modules, fused."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastjepa.kernels.batch_norm.channel_vectors import ChannelVectors
from fastjepa.kernels.batch_norm.forward import batch_norm_forward
from fastjepa.kernels.batch_norm.statistics import (
    batch_norm_statistics,
    check_more_than_one_value,
    update_running_statistics,
)
from fastjepa.kernels.checks import check_tensor, require_available


def batch_norm_act(
    x: Tensor,
    bn: nn.BatchNorm1d | nn.BatchNorm2d,
    residual: Tensor | None = None,
    residual_bn: nn.BatchNorm1d | nn.BatchNorm2d | None = None,
    relu: bool = True,
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

    Returns:
        Shape and dtype of x; channels-last if 4-D. Its gradient cannot be differentiated again.

    Raises:
        RuntimeError: the kernels cannot run on x's device.
        ValueError: one value per channel in training (nn.BatchNorm's own error), or an argument's shape, channels or
            device does not fit.
        TypeError: an argument's type or dtype is not accepted.
    """
    return batch_norm_act_repeatable(x, bn, residual, residual_bn, relu)[0]


def batch_norm_act_repeatable(
    x: Tensor,
    bn: nn.BatchNorm1d | nn.BatchNorm2d,
    residual: Tensor | None = None,
    residual_bn: nn.BatchNorm1d | nn.BatchNorm2d | None = None,
    relu: bool = True,
) -> tuple[Tensor, Callable[[Tensor | None], Tensor]]:
    """`batch_norm_act`, and a function that computes its result again, bit for bit, in one pass and without gradient.

    The function takes the residual (None if there is none) and keeps only x and the statistics alive, so that the
    result itself need not be kept for a backward pass. It moves no buffers. It is valid until a parameter changes.
    """
    op = "batch_norm_act"
    require_available(op, x.device)
    _check_module_inputs(op, x, bn, residual, residual_bn)
    x_rows = _as_rows(op, "x", x)
    residual_rows = None if residual is None else _as_rows(op, "residual", residual)
    mean, var, batch_statistics = _statistics_of(bn, x_rows)
    vectors = ChannelVectors(mean, var, bn.weight, bn.bias)
    residual_eps, residual_batch_statistics = 0.0, False
    if residual_bn is not None and residual_rows is not None:
        residual_mean, residual_var, residual_batch_statistics = _statistics_of(residual_bn, residual_rows)
        vectors = vectors._replace(
            residual_mean=residual_mean,
            residual_var=residual_var,
            residual_weight=residual_bn.weight,
            residual_bias=residual_bn.bias,
        )
        residual_eps = residual_bn.eps
    options = (bn.eps, residual_eps, batch_statistics, residual_batch_statistics, relu)
    shape = x.shape

    def as_input(rows: Tensor) -> Tensor:
        if len(shape) == 2:
            return rows
        N, C, H, W = shape
        return rows.view(N, H, W, C).permute(0, 3, 1, 2)

    kept_rows = x_rows.detach()

    @torch.no_grad()
    def again(residual: Tensor | None) -> Tensor:
        rows = None if residual is None else _as_rows(op, "residual", residual)
        return as_input(batch_norm_forward(kept_rows, rows, *vectors, *options))

    return as_input(batch_norm_forward(x_rows, residual_rows, *vectors, *options)), again


def _uses_batch_statistics(bn: nn.BatchNorm1d | nn.BatchNorm2d) -> bool:
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def _statistics_of(bn: nn.BatchNorm1d | nn.BatchNorm2d, rows: Tensor) -> tuple[Tensor, Tensor, bool]:
    """(mean, var, whether they are the batch's); moves the buffers of `bn` if it is training."""
    if not _uses_batch_statistics(bn):
        assert bn.running_mean is not None
        assert bn.running_var is not None
        return bn.running_mean, bn.running_var, False
    mean, var, unbiased_var = batch_norm_statistics(rows.detach())
    if bn.training:
        update_running_statistics(bn, mean, unbiased_var)
    return mean, var, True


def _check_module_inputs(
    op: str, x: Tensor, bn: nn.Module, residual: Tensor | None, residual_bn: nn.Module | None
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
            check_more_than_one_value(x.shape)


def _as_rows(op: str, name: str, tensor: Tensor) -> Tensor:
    """(N, C, H, W) or (M, C) as contiguous rows (M, C): a view of a channels-last tensor, a copy of any other."""
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
    return tensor.permute(0, 2, 3, 1).reshape(-1, tensor.shape[1])
