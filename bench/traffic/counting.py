"""Counting operators, kernels and bytes while a computation is traced, on real tensors or fake ones.

Two counts of the same work:

- **operators**: each one's distinct input and output tensors once, an op of ours as one;
- **kernels**: each launch of ours with the tensors that it is given, once each; any other operator as one kernel.

A view launches nothing and moves nothing, and neither does an allocation. Of a tensor that repeats itself (`expand`),
what lies in memory counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMESPACE = "fastjepa"
# They allocate, or look at what a tensor is, and run nothing.
_NO_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "sym_size", "sym_stride", "sym_numel",
    "is_same_size", "_has_compatible_shallow_copy_type", "_local_scalar_dense", "set_", "resize_",
}  # fmt: skip


@dataclass(frozen=True)
class Event:
    """One operator, or one launch inside one of ours.

    part: whose work it is, as the counter's `part_of` says.
    name: of the operator ("aten.cat", "fastjepa::batch_norm_forward") or of the kernel.
    moved: bytes read and written.
    is_kernel, is_operator: in which of the two counts it counts; an operator that is not ours counts in both.
    """

    part: str
    name: str
    moved: int
    is_operator: bool
    is_kernel: bool


def bytes_of(tensors: Iterable[Any]) -> int:
    """Bytes of the distinct tensors among these: the same memory seen with the same shape counts once."""
    distinct = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            key = (
                tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(),
                tensor.dtype,
            )  # fmt: skip
            distinct[key] = _bytes_in_memory(tensor)
    return sum(distinct.values())


def _bytes_in_memory(tensor: Tensor) -> int:
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
    return math.prod(sizes) * tensor.element_size()


class TrafficCounter(TorchDispatchMode):
    """Inside, everything that runs becomes an `Event`.

    Args:
        part_of: (name of the operator, its arguments, its result) → the part that it belongs to.

    Attributes:
        events: in order.
    """

    def __init__(self, part_of: Callable[[str, tuple[Any, ...], Any], str]) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._part_of = part_of
        self._inside = ""  # the part of the op of ours that is being opened

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and note it."""
        kwargs = kwargs or {}
        if func.namespace == "prim" or func.overloadpacket.__name__ in _NO_KERNEL:
            return func(*args, **kwargs)
        if func.namespace == NAMESPACE:
            return self._ours(func, args, kwargs)
        with self:  # what an operator is made of, where that is how torch defines it
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and "convolution" in name:
            out = _as_cudnn_lays_it(out, args)
        if not (name in _NO_KERNEL or _is_view(func, args, out)):
            part = self._inside or self._part_of(f"aten.{name}", args, out)
            moved = bytes_of(tree_leaves((args, kwargs, out)))
            self.events.append(Event(part, f"aten.{name}", moved, is_operator=not self._inside, is_kernel=True))
        return out

    def _ours(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An op of ours: its own code is run, with launches that are noted instead."""
        from fastjepa.kernels.launch import KERNEL_OPS

        name = f"{NAMESPACE}::{func.overloadpacket.__name__}"
        part = self._part_of(name, args, None)
        place = len(self.events)
        with self._opened(part), self:
            out = KERNEL_OPS[name](*args, **kwargs)
        moved = bytes_of(tree_leaves((args, kwargs, out)))
        self.events.insert(place, Event(part, name, moved, is_operator=True, is_kernel=False))
        return out

    @contextmanager
    def _opened(self, part: str) -> Iterator[None]:
        def note(kernel: Any, arguments: dict[str, Any]) -> None:
            name = getattr(kernel, "fn", kernel).__name__
            self.events.append(Event(part, name, launch_bytes(arguments), is_operator=False, is_kernel=True))

        outer, self._inside = self._inside, part
        try:
            with noted_launches(note):
                yield
        finally:
            self._inside = outer


@contextmanager
def noted_launches(note: Callable[[Any, dict[str, Any]], None]) -> Iterator[None]:
    """Inside, no kernel runs: `note` is called with the kernel and the arguments, by name, of every launch of ours."""
    from fastjepa.kernels import launch

    with patch.object(launch, "wrap", lambda kernel: _Grid(partial(note, kernel))):
        yield


class _Grid:
    """Takes a launch's place: `kernel[grid](**arguments)`."""

    def __init__(self, note: Callable[[dict[str, Any]], None]) -> None:
        self._note = note

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: self._note(arguments)


def launch_bytes(arguments: dict[str, Any]) -> int:
    """What a launch reads and writes: every tensor that it is given, as often as it is given.

    A tensor that is read and written is given twice, under two names; one that is not touched is not given.
    """
    return sum(_bytes_in_memory(value) for value in arguments.values() if isinstance(value, Tensor))


def _is_view(func: Any, args: tuple[Any, ...], out: Any) -> bool:
    """Whether an operator only looks at its input in another way."""
    if func._schema.is_mutable:
        return False
    if any(result.alias_info is not None for result in func._schema.returns):
        return True  # says torch; a real weight beside fake data would seem to be copied
    outs = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
    ins = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
    return bool(outs) and all(tensor.untyped_storage()._cdata in ins for tensor in outs)


def _as_cudnn_lays_it(out: Any, args: tuple[Any, ...]) -> Any:
    """The results of a convolution, channels-last where its input or its weight is: what cuDNN does.

    On a CPU the layout depends on the instructions that the machine has.
    """
    four = [tensor for tensor in args if isinstance(tensor, Tensor) and tensor.dim() == 4]
    if not any(_is_channels_last(tensor) for tensor in four):
        return out

    def laid(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or tensor.dim() != 4:
            return tensor
        return torch.empty_like(tensor, memory_format=torch.channels_last)

    return tuple(laid(tensor) for tensor in out) if isinstance(out, tuple | list) else laid(out)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
