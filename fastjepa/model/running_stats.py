"""BatchNorm's running buffers when repeated work is done once.

The original calls the encoder three times and the projector 1 + 2·steps times in one training step, and each call moves
the running buffers by `momentum` towards that call's batch statistics. One call for each input gives every number of
the step; with the momenta computed here, those calls leave the buffers where all the calls would have left them.
Nothing here syncs with the host, except for layers with `momentum=None`, whose own forward does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class BatchStatistics(NamedTuple):
    """What one call of one BatchNorm layer adds to its buffers: batch mean and unbiased variance, both (channels,)."""

    mean: Tensor
    var: Tensor


def step_order(predictions: int, *, with_vc: bool) -> list[int]:
    """The calls of a projector in a step of the original: [VC(z),] then z, p¹, z, p² …, where z is 0 and pᵏ is k."""
    order = [0] if with_vc else []
    for prediction in range(1, predictions + 1):
        order += [0, prediction]
    return order


def calls_in_order(
    module: torch.nn.Module, order: Sequence[int], calls: Sequence[Callable[[], Tensor]]
) -> list[Tensor]:
    """The results of `calls`, each made once, in turn; each calls `module`, which calls each of its layers once.

    The running buffers move as by the calls in `order`, whose entries are positions in `calls`.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and _moves(layer)]
    before = [layer.momentum for layer in layers]
    momenta = [_momenta(layer, order, len(calls)) for layer in layers]
    results = []
    try:
        for i, call in enumerate(calls):
            for layer, of_layer in zip(layers, momenta, strict=True):
                layer.momentum = of_layer[i]
            results.append(call())
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum
    _count(layers, len(order) - len(calls))
    return results


@torch.no_grad()
def advance_buffers(layer: _BatchNorm, order: Sequence[int], calls: Sequence[BatchStatistics]) -> None:
    """Move the buffers of `layer` as calls in `order` would, whose entries are positions in `calls`."""
    if not _moves(layer):
        return
    assert layer.running_mean is not None, "a layer that tracks running statistics has them"
    assert layer.running_var is not None
    # Past autograd, as BatchNorm itself does: an eager call before this one keeps the buffers, and its backward, which
    # does not read them in train mode, would refuse.
    buffers = [layer.running_mean.data, layer.running_var.data]
    for call, momentum in zip(calls, _momenta(layer, order, len(calls)), strict=True):
        torch._foreach_lerp_(buffers, [s.to(b.dtype) for s, b in zip(call, buffers, strict=True)], momentum)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(len(order))


def _count(layers: Sequence[_BatchNorm], calls: int) -> None:
    counts = [layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None]
    if counts:
        torch._foreach_add_(counts, calls)


def _moves(layer: _BatchNorm) -> bool:
    """Whether the layer's buffers move when it is called now."""
    return layer.training and layer.track_running_stats


def _momenta(layer: _BatchNorm, order: Sequence[int], calls: int) -> list[float]:
    """The momenta with which one call for each of 0 … calls - 1, in turn, moves the buffers as the calls in `order`.

    After n calls r = (1 - m)^n·r₀ + Σᵢ m·(1 - m)^(n - i)·sᵢ, and with momentum None (c + n)·r = c·r₀ + Σᵢ sᵢ.
    """
    n, momentum = len(order), layer.momentum
    if momentum is None:
        assert layer.num_batches_tracked is not None
        each = [1 / (int(layer.num_batches_tracked) + n)] * n
    else:
        each = [momentum * (1 - momentum) ** (n - i) for i in range(1, n + 1)]
    weights = [0.0] * calls
    for call, weight in zip(order, each, strict=True):
        weights[call] += weight
    momenta, left = [], 1.0  # what the calls after this one leave of the buffers
    for weight in reversed(weights):
        momenta.append(min(weight / left, 1.0) if left > 0 else 0.0)
        left -= weight
    return momenta[::-1]
