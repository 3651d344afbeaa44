"""The maps between the launches of a folded network, in memory that is kept, each where one lay that is done with.

What a launch makes for the next stays near: of some twenty maps at most four or five are needed at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastjepa.fused.folded_layers import FoldedLayer, sizes_of

MOST_SIZES = 4  # sizes of frames whose memory is kept
_MOST_COUNTS = 64  # numbers of frames for which views are kept


class Place(NamedTuple):
    """Where a map lies: which piece of memory, and what it is for one frame."""

    slot: int
    channels: int
    height: int
    width: int


class Maps:
    """Memory for the maps of up to `frames` frames of one size.

    Args:
        layers: the launches; the last writes where the caller says.
        made: names of those whose maps lie here; the others' are made by torch, which allocates them.
        frames, height, width: sizes.
        dtype, device: of all maps.
    """

    def __init__(
        self,
        layers: Sequence[FoldedLayer],
        made: Collection[str],
        frames: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.frames = frames
        self._places, sizes = _places(layers, made, height, width)
        with torch.inference_mode(False):  # memory that is made in inference mode could not be written to outside
            self._memory = [torch.empty(frames * size, dtype=dtype, device=device) for size in sizes]
        self._views: dict[int, dict[str, Tensor]] = {}

    def of(self, frames: int) -> dict[str, Tensor]:
        """The maps (frames, C, H, W), channels-last, by name; behind `resized(name)` what is resized."""
        if frames not in self._views:
            if len(self._views) >= _MOST_COUNTS:
                self._views.clear()
            with torch.inference_mode(False):
                self._views[frames] = {name: self._view(place, frames) for name, place in self._places.items()}
        return self._views[frames]

    def _view(self, place: Place, frames: int) -> Tensor:
        slot, channels, height, width = place
        flat = self._memory[slot][: frames * channels * height * width]
        return flat.view(frames, height, width, channels).permute(0, 3, 1, 2)


class MapsCache:
    """Maps by size of a frame; the least recently used go."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[int, int, torch.dtype, torch.device], Maps] = OrderedDict()

    def get(
        self,
        layers: Sequence[FoldedLayer],
        made: Collection[str],
        frames: int,
        size: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Maps:
        """Maps for at least so many frames."""
        key = (*size, dtype, device)
        maps = self._entries.pop(key, None)
        if maps is None or maps.frames < frames:
            maps = None  # let go of it before more is made
            while len(self._entries) >= MOST_SIZES:
                self._entries.popitem(last=False)
            maps = Maps(layers, made, frames, *size, dtype, device)
        self._entries[key] = maps
        return maps


def resized(name: str) -> str:
    """What the map of a launch is called once it has the size of another."""
    return f"{name}, resized"


def _places(
    layers: Sequence[FoldedLayer], made: Collection[str], height: int, width: int
) -> tuple[dict[str, Place], list[int]]:
    """Where each map lies, and the elements that each piece of memory needs for one frame."""
    last_read = {name: i for i, layer in enumerate(layers) for name in layer.read}
    size_of = sizes_of(layers, height, width)
    places: dict[str, Place] = {}
    slots: list[int] = []  # elements for one frame
    busy_until: list[int] = []  # the last launch that reads what lies there

    def put(name: str, channels: int, size: tuple[int, int], now: int, until: int) -> None:
        elements = channels * size[0] * size[1]
        free = [slot for slot, busy in enumerate(busy_until) if busy < now]
        # The smallest that is large enough; else the largest, made larger; else a new one.
        fitting = [slot for slot in free if slots[slot] >= elements]
        if fitting:
            slot = min(fitting, key=lambda s: slots[s])
        elif free:
            slot = max(free, key=lambda s: slots[s])
            slots[slot] = elements
        else:
            slot = len(slots)
            slots.append(elements)
            busy_until.append(-1)
        busy_until[slot] = until
        places[name] = Place(slot, channels, *size)

    for i, layer in enumerate(layers):
        size = layer.size(*size_of[layer.sources[0]])
        target = size_of[layer.name]
        if i == len(layers) - 1:
            break
        until = last_read[layer.name]
        if layer.name in made:
            put(layer.name, layer.out_channels, size, i, i if target != size else until)
        if target != size:
            put(resized(layer.name), layer.out_channels, target, i, until)
    return places, slots
