"""Activations that are computed again in the backward pass instead of being kept for it.

What lies between two convolutions follows, in one cheap pass, from the raw output of the first: relu(BN(y) + r). The
second convolution's gradient needs it, and plain autograd keeps it. Here autograd keeps a function instead, for every
tensor that was registered with one: convolution outputs stay, everything else is computed again, by the same kernel on
the same numbers, so gradients are the same bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# One result, given out once for each of its users: one memory, but each user's gradient goes its own way to the kernel
# that adds them. A tuple of these is what would be one tensor in eager code.
Fork = tuple[Tensor, ...]


class Registered:
    """A tensor that can be computed again. While several users in a backward pass wait for it, they share one."""

    def __init__(self, tensors: Fork, compute: Callable[[], Tensor]) -> None:
        self._compute = compute
        self._references = [weakref.ref(tensor) for tensor in tensors]
        self._users = 0  # saved places that will ask for the tensor
        self._waiting = 0  # of these, how many have not yet asked since it was computed
        self._tensor: Tensor | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the storage is still that of the registered tensors."""
        return any(reference() is not None for reference in self._references)

    def add_user(self) -> None:
        """Count one more place that will ask in each backward pass."""
        self._users += 1

    def take(self) -> Tensor:
        """The tensor, for one of the users; freed with the last of them."""
        if self._tensor is None:
            self._tensor, self._waiting = self._compute(), self._users
        tensor = self._tensor
        self._waiting -= 1
        if self._waiting <= 0:
            self._tensor = None
        return tensor

    def once(self) -> Tensor:
        """The tensor as an ingredient of another: shared if it is there, otherwise computed and not held on to."""
        return self._compute() if self._tensor is None else self._tensor


class Recomputation:
    """The registered tensors of one forward pass, by storage; others are kept as autograd always does.

    Registers nothing if it is not `wanted`, nor where nothing is kept (no gradients), nor under torch.compile, which
    plans its own memory.
    """

    def __init__(self, wanted: bool = True) -> None:
        self._active = wanted and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self._registered: dict[int, Registered] = {}

    def hooks(self) -> AbstractContextManager[object]:
        """Inside, autograd does not keep what is registered."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack) if self._active else nullcontext()

    def register(self, tensors: Fork, compute: Callable[[], Tensor]) -> Fork:
        """Say how `tensors`, one and the same memory, can be computed again, with the same layout; returns them."""
        if self._active:
            self._registered[tensors[0].untyped_storage()._cdata] = Registered(tensors, compute)
        return tensors

    def recompute(self, tensor: Tensor) -> Callable[[], Tensor]:
        """A function that gives `tensor` again: as it was registered, else by keeping it."""
        if not self._active:  # nobody will ask
            return lambda: tensor
        if (registered := self.registered(tensor)) is not None:
            return registered.once
        kept = keep(tensor.detach())
        return lambda: kept

    def registered(self, tensor: Tensor) -> Registered | None:
        """What was registered in the storage of `tensor`, or None."""
        found = self._registered.get(tensor.untyped_storage()._cdata)
        return found if found is not None and found.is_alive else None

    def pack(self, tensor: Tensor) -> Any:
        """What autograd keeps for `tensor`, which may be a view."""
        registered = self.registered(tensor)
        if registered is None:
            return keep(tensor)
        registered.add_user()
        return registered, tensor.size(), tensor.stride(), tensor.storage_offset()

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        """The tensor again."""
        if isinstance(packed, Tensor):
            return packed
        registered, size, stride, offset = packed
        return registered.take().as_strided(size, stride, offset)


def keep(tensor: Tensor) -> Tensor:
    """What is kept of a tensor that is not registered: itself. A function of its own, so that bytes can be counted."""
    return tensor
