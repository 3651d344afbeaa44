"""Which recording serves a call: one for each signature, made again when what it reads has been replaced."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

import torch

MAX_RECORDINGS = 16


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
