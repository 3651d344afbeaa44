"""Whether parameters and buffers have changed since something was made of them.

torch counts in-place changes of a tensor, with three exceptions, which are looked at here:

- its own BatchNorm moves the running statistics without counting that; `num_batches_tracked` it counts;
- fused optimizers, torch's and others', write to parameters without counting that: steps of optimizers are heard of;
- inference tensors count nothing, and are taken to have changed.

What is left is what is hidden from torch: writing through `.data`, or a CUDA graph (`GraphedTrainStep` counts its own).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class Stamp:
    """Which tensors some modules hold now, where they lie, and how often they were changed in place."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._tensors: list[tuple[Mapping[str, Any], str, Tensor, int, int]] = []
        self._absent: list[tuple[Mapping[str, Any], str]] = []
        self._eps: list[tuple[nn.BatchNorm2d, float]] = []
        self._changed = False
        for module in modules:
            for mapping in (module._parameters, module._buffers):
                for key, tensor in mapping.items():
                    if tensor is None:
                        self._absent.append((mapping, key))
                    elif tensor.is_inference():
                        self._changed = True
                    else:
                        self._tensors.append((mapping, key, tensor, tensor.data_ptr(), tensor._version))
            if isinstance(module, nn.BatchNorm2d):
                self._eps.append((module, module.eps))
                self._changed |= module.num_batches_tracked is None  # then nothing of its statistics is counted
        self._ids = {id(tensor) for _, _, tensor, _, _ in self._tensors}
        _hear_of_steps()
        _STAMPS.add(self)

    def changed(self) -> bool:
        """Whether anything was replaced, moved or changed, or nobody could tell. Costs some 0.2 µs for each tensor."""
        return (
            self._changed
            or any(
                mapping.get(key) is not tensor or tensor.data_ptr() != address or tensor._version != version
                for mapping, key, tensor, address, version in self._tensors
            )
            or any(mapping.get(key) is not None for mapping, key in self._absent)
            or any(module.eps != eps for module, eps in self._eps)
        )

    def stepped(self, tensors: set[int]) -> None:
        """An optimizer has made a step on the tensors with these ids."""
        self._changed |= not self._ids.isdisjoint(tensors)


_STAMPS: weakref.WeakSet[Stamp] = weakref.WeakSet()


@functools.cache
def _hear_of_steps() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():  # what is compiled copies into parameters, and counts that
        return
    tensors = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for stamp in tuple(_STAMPS):
        stamp.stepped(tensors)
