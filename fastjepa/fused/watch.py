"""Whether modules still hold the tensors, in the same memory, that something was made of: a CUDA graph, say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import Any

from torch import Tensor, nn


class Watch:
    """Parameters, buffers and children of these modules, and what else it is told to watch."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.memory: dict[int, tuple[Tensor, int]] = {}  # id → tensor and address
        self._sizes: list[tuple[Sized, int]] = []
        self._same: list[tuple[Mapping[Any, Any], Any, object]] = []
        self._equal: list[tuple[Mapping[Any, Any], Any, object]] = []
        for module in {part: None for root in modules for part in root.modules()}:
            for mapping in (module._parameters, module._buffers, module._modules):
                self.objects(mapping)

    def changed(self) -> bool:
        """Whether anything was replaced, moved, added or removed. Costs some 0.1 µs for each tensor."""
        return (
            any(len(container) != size for container, size in self._sizes)
            or any(mapping.get(key) is not value for mapping, key, value in self._same)
            or any(mapping.get(key) != value for mapping, key, value in self._equal)
            or any(tensor.data_ptr() != address for tensor, address in self.memory.values())
        )

    def objects(self, mapping: Mapping[Any, Any]) -> None:
        """Watch what is in `mapping`: the same objects, no more and no fewer."""
        self.size(mapping)
        for key in mapping:
            self.same(mapping, key)

    def same(self, mapping: Mapping[Any, Any], key: Any) -> None:
        """Watch the object behind a key, and where it lies if it is a tensor."""
        self._same.append((mapping, key, mapping[key]))
        if isinstance(mapping[key], Tensor):
            self.tensor(mapping[key])

    def equal(self, mapping: Mapping[Any, Any], key: Any) -> None:
        """Watch the value behind a key."""
        self._equal.append((mapping, key, mapping[key]))

    def size(self, container: Sized) -> None:
        """Watch how many things are in `container`."""
        self._sizes.append((container, len(container)))

    def tensor(self, tensor: Tensor) -> None:
        """Watch where a tensor lies."""
        self.memory[id(tensor)] = (tensor, tensor.data_ptr())
