"""A run of an inference network: its launches one after another, by kernels or by torch, on a list of buffers.

Of some twenty maps at most four or five are needed at a time, and each lies where one lay that is done with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.fused.inference.layers import Layer, sizes_of
from fastjepa.fused.inference.weights import LayerWeights


class Place(NamedTuple):
    """Where a map lies: which buffer, and what it is for one frame."""

    slot: int
    channels: int
    height: int
    width: int


class Run:
    """A network that is ready for up to `frames` frames of one size. Runs of one network follow each other on a stream.

    Args:
        layers: the launches, in order; the last writes where the caller says.
        weights: what each launch reads, in static memory.
        fused: by kernels, into buffers; or by torch's convolutions, which allocate.
        frames, size, dtype, device: of the maps.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        weights: dict[str, LayerWeights],
        fused: bool,
        frames: int,
        size: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.frames, self.weights, self.fused = frames, weights, fused
        self._layers = layers
        self._places, elements = places(layers, fused, *size)
        with torch.inference_mode(False):  # memory that is made in inference mode could not be written to outside
            self._buffers = [torch.empty(frames * count, dtype=dtype, device=device) for count in elements]
        self._views: dict[int, dict[str, Tensor]] = {}
        self._done = [[name for name, last in last_reads(layers).items() if last == i] for i in range(len(layers))]

    @torch.no_grad()
    def __call__(self, sources: Sequence[Tensor], out: Tensor) -> None:
        """Run it on one or two maps (N, C, H, W), into `out` (N, D, H′, W′); all channels-last, in one dtype."""
        if torch.is_autocast_enabled(out.device.type):  # everything has its dtype
            with torch.autocast(out.device.type, enabled=False):
                self._run(sources, out)
        else:
            self._run(sources, out)

    def _run(self, sources: Sequence[Tensor], out: Tensor) -> None:
        views, maps = self._views_of(len(out)), dict(zip(self._layers[0].sources, sources, strict=True))
        tf32 = out.device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
        for layer, done in zip(self._layers, self._done, strict=True):
            weights = self.weights[layer.name]
            if self.fused:
                made = out if layer is self._layers[-1] else views[layer.name]
                _by_kernel(layer, weights, maps, made, tf32)
            else:
                made = _by_torch(layer, weights, maps)
            if layer.like is not None and made.shape[-2:] != maps[layer.like].shape[-2:]:
                target = views[resized(layer.name)]
                torch.ops.aten.upsample_bilinear2d.out(made, list(target.shape[-2:]), False, None, None, out=target)
                made = target
            maps[layer.name] = made
            for name in done:  # what torch has made is let go of
                maps.pop(name, None)
        if not self.fused:
            out.copy_(made)

    def _views_of(self, frames: int) -> dict[str, Tensor]:
        """The maps (frames, C, H, W), channels-last, by name."""
        if frames not in self._views:
            with torch.inference_mode(False):
                self._views[frames] = {
                    name: self._buffers[slot][: frames * C * H * W].view(frames, H, W, C).permute(0, 3, 1, 2)
                    for name, (slot, C, H, W) in self._places.items()
                }
        return self._views[frames]


def resized(name: str) -> str:
    """What the map of a launch is called once it has the size of another."""
    return f"{name}, resized"


def joined(names: Sequence[str]) -> str:
    """What maps are called that are side by side in the channels of one."""
    return " + ".join(names)


def last_reads(layers: Sequence[Layer]) -> dict[str, int]:
    """The number of the last launch that reads each map, or what is joined of them."""
    return {
        name: i
        for i, layer in enumerate(layers)
        for name in (*layer.read, joined(layer.sources), joined(layer.shortcut))
    }


def places(layers: Sequence[Layer], fused: bool, height: int, width: int) -> tuple[dict[str, Place], list[int]]:
    """Where each map lies, and the elements of each buffer for one frame; of torch's maps only what is resized."""
    last_read, sizes = last_reads(layers), sizes_of(layers, height, width)
    found: dict[str, Place] = {}
    elements: list[int] = []
    busy_until: list[int] = []  # the last launch that reads what lies there
    for i, layer in enumerate(layers[:-1]):
        made, target = layer.size(*sizes[layer.sources[0]]), sizes[layer.name]
        wanted = [(layer.name, made, i if made != target else last_read[layer.name])] if fused else []
        if made != target:
            wanted.append((resized(layer.name), target, last_read[layer.name]))
        for name, (H, W), until in wanted:
            count = layer.out_channels * H * W
            # The smallest free buffer that is large enough; else the largest, made larger; else a new one.
            free = sorted((slot for slot, busy in enumerate(busy_until) if busy < i), key=lambda slot: elements[slot])
            slot = next((slot for slot in free if elements[slot] >= count), free[-1] if free else len(elements))
            if slot == len(elements):
                elements.append(count)
                busy_until.append(until)
            elements[slot], busy_until[slot] = max(elements[slot], count), until
            found[name] = Place(slot, layer.out_channels, H, W)
    return found, elements


def _by_kernel(layer: Layer, weights: LayerWeights, maps: Mapping[str, Tensor], out: Tensor, tf32: bool) -> None:
    from fastjepa.kernels.convolution import fused  # only here: it needs Triton

    sources, weight, bias = [maps[name] for name in layer.sources], weights["weight"], weights["bias"]
    assert weight is not None
    if layer.is_transposed:
        fused.transposed_convolution(sources[0], weight, bias, tf32=tf32, out=out)
        return
    head: Any = None if weights["head"] is None else (weights["head"], weights["head_bias"])
    fused.convolution(
        sources, weight, bias, kernel_size=layer.conv.kernel_size[0], stride=layer.conv.stride[0],
        shortcut=[maps[name] for name in layer.shortcut],
        shortcut_stride=1 if layer.shortcut_conv is None else layer.shortcut_conv.stride[0],
        residual=None if layer.residual is None else maps[layer.residual], relu=layer.relu, head=head, tf32=tf32,
        out=out,
    )  # fmt: skip


def _by_torch(layer: Layer, weights: LayerWeights, maps: dict[str, Tensor]) -> Tensor:
    """The same launch by torch's convolutions, which joins maps for itself and for later ones."""

    def read(names: Sequence[str]) -> Tensor:
        if joined(names) not in maps:
            maps[joined(names)] = torch.cat([maps[name] for name in names], 1)
        return maps[joined(names)]

    weight, shortcut, head = weights["weight"], weights["shortcut"], weights["head"]
    assert weight is not None
    if layer.is_transposed:
        out = F.conv_transpose2d(read(layer.sources), weight, weights["bias"], stride=2)
    else:
        out = F.conv2d(read(layer.sources), weight, weights["bias"], layer.conv.stride, layer.conv.padding)
    if shortcut is not None:
        out += F.conv2d(read(layer.shortcut), shortcut, None, layer.shortcut_conv.stride)
    if layer.residual is not None:
        out += maps[layer.residual]
    if layer.relu:
        out.relu_()
    if head is not None:
        out = F.conv2d(out, head, weights["head_bias"])
    return out.contiguous(memory_format=torch.channels_last)
