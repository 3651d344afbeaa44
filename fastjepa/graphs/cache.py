"""Which recording serves a call: one for each signature, made again when what it reads has been replaced."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sized
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

MAX_RECORDINGS = 16


class Watch:
    """Where everything lies that a recording reads, to notice that a replay would read something else.

    Args:
        modules: their parameters, buffers and submodules.
        tensors: further tensors, which must keep their memory.
        optimizer: its state and hyperparameters.
        modes: whether train or eval mode, and which parameters are frozen, makes a difference.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        tensors: Iterable[Tensor] = (),
        *,
        optimizer: torch.optim.Optimizer | None = None,
        modes: bool,
    ) -> None:
        self._sizes: list[tuple[Sized, int]] = []
        self._same: list[tuple[Mapping[Any, Any], Any, object]] = []
        self._equal: list[tuple[Mapping[Any, Any], Any, object]] = []
        self._memory: dict[int, tuple[Tensor, int, bool]] = {}
        self._modes: list[tuple[nn.Module, bool]] = []
        self._check_frozen = modes
        for module in {part: None for root in modules for part in root.modules()}:
            for mapping in (module._parameters, module._buffers, module._modules):
                self._objects(mapping)
            if modes:
                self._modes.append((module, module.training))
        for tensor in tensors:
            self._tensor(tensor)
        if optimizer is not None:
            self._optimizer(optimizer)

    def changed(self) -> bool:
        """Whether anything was replaced, moved, added or removed. Costs some 0.1 µs for each tensor."""
        return (
            any(len(container) != size for container, size in self._sizes)
            or any(mapping.get(key) is not value for mapping, key, value in self._same)
            or any(mapping.get(key) != value for mapping, key, value in self._equal)
            or any(tensor.data_ptr() != address for tensor, address, _ in self._memory.values())
            or any(module.training != mode for module, mode in self._modes)
            or (self._check_frozen and any(t.requires_grad != wanted for t, _, wanted in self._memory.values()))
        )

    def _objects(self, mapping: Mapping[Any, Any]) -> None:
        self._sizes.append((mapping, len(mapping)))
        for key, value in mapping.items():
            self._same.append((mapping, key, value))
            if isinstance(value, Tensor):
                self._tensor(value)

    def _tensor(self, tensor: Tensor) -> None:
        self._memory[id(tensor)] = (tensor, tensor.data_ptr(), tensor.requires_grad)

    def _optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        for name in ("state", "param_groups"):  # load_state_dict puts new ones there
            container = getattr(optimizer, name)
            self._same.append((vars(optimizer), name, container))
            self._sizes.append((container, len(container)))
        for state in optimizer.state.values():
            self._objects(state)
        for group in optimizer.param_groups:
            self._sizes.append((group["params"], len(group["params"])))
            for parameter in group["params"]:
                self._tensor(parameter)
            for key, value in group.items():
                if isinstance(value, Tensor):
                    self._same.append((group, key, value))
                    self._tensor(value)
                elif key != "params":
                    self._equal.append((group, key, value))


class Recorded(Protocol):
    """What a cache holds: a recording, or an object around one that can tell whether it is outdated."""

    def outdated(self) -> bool:
        """Whether a replay would read something else than the caller has now."""
        ...


R = TypeVar("R", bound=Recorded)


class RecordingCache(Generic[R]):
    """The recordings of one owner, by signature; the least recently used goes when there are more than `most`.

    Attributes:
        made: how many recordings were ever made; a number that grows in a loop is a bug in the loop.
    """

    def __init__(self, most: int = MAX_RECORDINGS) -> None:
        if most < 1:
            raise ValueError(f"max_recordings must be at least 1, got {most}")
        self.made = 0
        self._most = most
        self._entries: OrderedDict[Hashable, R] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, signature: Hashable, device: torch.device, make: Callable[[], R]) -> R:
        """The recording for this signature under the autocast of now; made if there is none, or it is outdated."""
        key = (signature, device, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))
        entry = self._entries.pop(key, None)
        if entry is not None and entry.outdated():
            # What one recording reads, its neighbours read too: let go of all outdated memory before making more.
            self._entries = OrderedDict((k, e) for k, e in self._entries.items() if not e.outdated())
            entry = None
        if entry is None:
            while len(self._entries) >= self._most:
                self._entries.popitem(last=False)
            entry = make()
            self.made += 1
        self._entries[key] = entry
        return entry

    def clear(self) -> None:
        """Let go of all recordings and their memory."""
        self._entries.clear()
