"""BatchNorm's running buffers when repeated work is done once.

The original calls the encoder three times and the projector 1 + 2·steps times in one training step, and each call moves
the running buffers by `momentum` towards that call's batch statistics. One call each gives every number of the step;
the functions here make the buffers end where all the calls would have left them. Nothing here syncs with the
host, except for layers with `momentum=None`, whose own forward does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BatchStatistics(NamedTuple):
    """What one call of one BatchNorm layer adds to its buffers: batch mean and unbiased variance, both (channels,)."""

    mean: Tensor
    var: Tensor


def updating_batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers in `module` whose buffers move when it is called now, in order of definition."""
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, _BatchNorm) and layer.training and layer.track_running_stats
    ]


def _buffers(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None, "a layer that tracks running statistics has them"
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


@contextmanager
def repeated_updates(module: nn.Module, times: int) -> Iterator[None]:
    """Inside, one call of `module` moves every running buffer as `times` calls with the same input would, if a call of
    `module` calls each layer once (`batch_norm_calls`).

    n updates r ← (1 - m)·r + m·s with one s are a single update with momentum 1 - (1 - m)^n.
    """
    layers = updating_batch_norms(module)
    momenta = [layer.momentum for layer in layers]
    try:
        for layer, momentum in zip(layers, momenta, strict=True):
            if momentum is None:  # a cumulative average; c calls so far: (c·r + n·s) / (c + n)
                assert layer.num_batches_tracked is not None
                layer.momentum = times / (int(layer.num_batches_tracked) + times)
            else:
                layer.momentum = 1 - (1 - momentum) ** times
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    counts = [layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None]
    if counts:
        torch._foreach_add_(counts, times - 1)


class BatchStatisticsRecorder:
    """Lets a module be called without moving its running buffers, and keeps the batch statistics of each call.

    Used as a context manager: inside, each call gets scratch buffers of its own, and at the end the layers have their
    own buffers back, to be moved by `advance_buffers`. (Restoring values in place would not do: autograd keeps the
    buffers of each call and rejects a backward once they have changed.)

    Attributes:
        layers: those whose buffers moved when this was made, in order of definition. torch.compile cannot look for them
            again after their buffers were exchanged.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers = updating_batch_norms(module)
        self._saved: list[tuple[float | None, Tensor, Tensor, Tensor | None]] = []

    def __enter__(self) -> BatchStatisticsRecorder:
        for layer in self.layers:
            self._saved.append((layer.momentum, *_buffers(layer), layer.num_batches_tracked))
            layer.momentum = 1.0  # the scratch buffers then *are* the statistics of the call
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked = layer.num_batches_tracked.clone()
        return self

    def __exit__(self, *_: object) -> None:
        for layer, (momentum, mean, var, count) in zip(self.layers, self._saved, strict=True):
            layer.momentum = momentum
            layer.running_mean, layer.running_var, layer.num_batches_tracked = mean, var, count

    def call(self, function: Callable[[], Tensor]) -> tuple[Tensor, list[BatchStatistics]]:
        """What `function`, which calls the module once, returns; and that call's statistics, one for each layer."""
        statistics = []
        for layer, (_, mean, var, _) in zip(self.layers, self._saved, strict=True):
            layer.running_mean, layer.running_var = torch.zeros_like(mean), torch.zeros_like(var)
            statistics.append(BatchStatistics(layer.running_mean, layer.running_var))
        return function(), statistics


def batch_norm_calls(module: nn.Module, x: Tensor) -> int:
    """How often module(x) calls that of its updating BatchNorm layers which it calls most; 0 if none is called as a
    module, as in a fused network.

    It is called once more for that, without gradients; buffers and random numbers are as before.
    """
    module = getattr(module, "_orig_mod", module)  # compiled, it would be compiled anew for the hooks
    calls: Counter[nn.Module] = Counter()
    hooks = [
        layer.register_forward_pre_hook(lambda called, _: calls.update([called]))
        for layer in updating_batch_norms(module)
    ]
    devices = [x.device] if x.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices), BatchStatisticsRecorder(module) as recorder:
            recorder.call(lambda: module(x))
    finally:
        for hook in hooks:
            hook.remove()
    return max(calls.values(), default=0)


@torch.no_grad()
def advance_buffers(layer: _BatchNorm, calls: Sequence[BatchStatistics]) -> None:
    """Move the buffers of `layer` as the given calls would, in this order; equal calls may be the same object.

    After n calls r = (1 - m)^n·r₀ + Σᵢ m·(1 - m)^(n - i)·sᵢ, and with momentum None (c + n)·r = c·r₀ + Σᵢ sᵢ.
    """
    if not layer.training or not layer.track_running_stats or not calls:
        return
    n, m = len(calls), layer.momentum
    keep: float | Tensor
    divisor: Tensor | None = None
    if m is None:
        assert layer.num_batches_tracked is not None
        keep, weights = layer.num_batches_tracked.to(calls[0].mean.dtype), [1.0] * n
        divisor = keep + n
    else:
        keep, weights = (1 - m) ** n, [m * (1 - m) ** (n - i) for i in range(1, n + 1)]
    summed: dict[int, float] = {}  # a call that is repeated is added once, with the sum of its weights
    for call, weight in zip(calls, weights, strict=True):
        summed[id(call)] = summed.get(id(call), 0.0) + weight
    distinct = {id(call): call for call in calls}
    # Both buffers in one kernel each time. Past autograd, as BatchNorm itself does: an eager call before this one keeps
    # the buffers, and its backward, which does not read them in train mode, would refuse.
    buffers = [buffer.data for buffer in _buffers(layer)]
    torch._foreach_mul_(buffers, keep)
    for key, weight in summed.items():
        torch._foreach_add_(buffers, [s.to(b.dtype) for s, b in zip(distinct[key], buffers, strict=True)], alpha=weight)
    if divisor is not None:
        torch._foreach_div_(buffers, divisor)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(n)
