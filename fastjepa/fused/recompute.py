"""Activations that are computed again in the backward pass instead of being kept for it.

What lies between two convolutions follows, in one cheap pass, from the raw output of the first: relu(BN(y) + r). The
second convolution's gradient needs it, and plain autograd keeps it. Inside `recompute_activations`, autograd keeps a
maker instead, for every tensor announced with `announce`: convolution outputs stay, everything else is made anew.
The maker runs the same kernel on the same numbers, so gradients are the same bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


class Maker:
    """How to make a tensor again. While several users in a backward pass wait for it, it is made once and shared."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._users = 0  # saved places that will ask for the tensor
        self._waiting = 0  # of these, how many have not yet asked since it was made
        self._tensor: Tensor | None = None

    def add_user(self) -> None:
        """Count one more place that will ask in each backward pass."""
        self._users += 1

    def take(self) -> Tensor:
        """The tensor, for one of the users; freed with the last of them."""
        if self._tensor is None:
            self._tensor, self._waiting = self._make(), self._users
        tensor = self._tensor
        self._waiting -= 1
        if self._waiting <= 0:
            self._tensor = None
        return tensor

    def once(self) -> Tensor:
        """The tensor as an ingredient of another: shared if it is there, otherwise made and not held on to."""
        return self._make() if self._tensor is None else self._tensor


class Recomputation:
    """The makers of one forward pass. A tensor without a maker is kept as autograd always does.

    `active=False` keeps no makers at all: everything is left to autograd.
    """

    def __init__(self, *, active: bool = True) -> None:
        self._active = active
        # By storage; the weak references tell whether the storage is still the announced tensors'.
        self._makers: dict[int, tuple[list[weakref.ref[Tensor]], Maker]] = {}

    def announce(self, tensors: tuple[Tensor, ...], make: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        """Say how `tensors`, one and the same memory, can be made again, with the same layout; returns them."""
        if torch.compiler.is_compiling() or not self._active:
            return tensors
        references = [weakref.ref(tensor) for tensor in tensors]
        self._makers[tensors[0].untyped_storage()._cdata] = (references, Maker(make))
        return tensors

    def remake(self, tensor: Tensor) -> Callable[[], Tensor]:
        """A function that gives `tensor` again: by its maker if it has one, else by keeping it."""
        if not self._active:  # nobody will ask
            return lambda: tensor
        maker = None if torch.compiler.is_compiling() else self.maker_of(tensor)
        if maker is None:
            kept = keep(tensor.detach())
            return lambda: kept
        return maker.once

    def maker_of(self, tensor: Tensor) -> Maker | None:
        """The maker of the announced tensor that shares the storage of `tensor`, or None."""
        announced, maker = self._makers.get(tensor.untyped_storage()._cdata, ([], None))
        return maker if any(reference() is not None for reference in announced) else None

    def pack(self, tensor: Tensor) -> Any:
        """What autograd keeps for `tensor`, which may be a view."""
        maker = self.maker_of(tensor)
        if maker is None:
            return keep(tensor)
        maker.add_user()
        return maker, tensor.size(), tensor.stride(), tensor.storage_offset()

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        """The tensor again."""
        if isinstance(packed, Tensor):
            return packed
        maker, size, stride, offset = packed
        return maker.take().as_strided(size, stride, offset)


def keep(tensor: Tensor) -> Tensor:
    """What is kept of a tensor without a maker: itself. A function of its own so that tests can count."""
    return tensor


def recompute_activations(active: bool = True) -> AbstractContextManager[Recomputation]:
    """Inside, autograd keeps makers for the tensors announced to the object that the context gives.

    Does nothing if it is not `active`, nor where nothing is kept (no gradients), nor under torch.compile, which plans
    its own memory.
    """
    if not active or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return nullcontext(Recomputation(active=False))
    return _recompute()


@contextmanager
def _recompute() -> Iterator[Recomputation]:
    recomputation = Recomputation()
    with torch.autograd.graph.saved_tensors_hooks(recomputation.pack, recomputation.unpack):
        yield recomputation
