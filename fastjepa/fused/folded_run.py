"""One run of a folded network: its launches one after another, by kernels or by torch, each into its place."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.fused.folded_layers import INPUT, FoldedLayer
from fastjepa.fused.folded_maps import Maps, resized
from fastjepa.fused.folded_weights import FoldedWeights, LayerWeights

Sources = tuple[Tensor, ...]


class FoldedRun:
    """A network that is ready to run on up to so many frames of one size.

    It holds memory that is kept: runs of one network follow each other on one stream.

    Args:
        layers: the launches, in order.
        by_kernels: names of those that kernels run; the others are torch's.
        weights: of the launches, as they were folded last.
        maps: memory for what lies between them.
        tf32: whether kernels multiply fp32 in TF32; torch asks its own settings.
    """

    def __init__(
        self, layers: Sequence[FoldedLayer], by_kernels: Collection[str], weights: FoldedWeights, maps: Maps, tf32: bool
    ) -> None:
        self.weights = weights
        self._layers = layers
        self._by_kernels = by_kernels
        self._maps = maps
        self._tf32 = tf32
        last_read = {name: i for i, layer in enumerate(layers) for name in layer.read}
        self._done = [[name for name, last in last_read.items() if last == i] for i in range(len(layers))]

    @torch.no_grad()
    def __call__(self, sources: Sources, out: Tensor) -> None:
        """Run it.

        Args:
            sources: one or two maps (N, C, H, W), channels-last, in the dtype of the weights.
            out: (N, D, H′, W′), channels-last, to write to.
        """
        device_type = out.device.type
        if torch.is_autocast_enabled(device_type):  # everything has its dtype
            with torch.autocast(device_type, enabled=False):
                self._run(sources, out)
        else:
            self._run(sources, out)

    def _run(self, sources: Sources, out: Tensor) -> None:
        places = self._maps.of(len(out))
        maps: dict[str, Sources] = {INPUT: sources}
        joined: dict[tuple[str, ...], Tensor] = {}
        last = self._layers[-1].name
        for layer, done in zip(self._layers, self._done, strict=True):
            weights = self.weights.of[layer.name]
            if layer.name in self._by_kernels:
                made = out if layer.name == last else places[layer.name]
                _by_kernel(layer, weights, maps, made, self._tf32)
            else:
                made = _by_torch(layer, weights, maps, joined)
                if layer.name == last:
                    out.copy_(made)
            if layer.like is not None and made.shape[-2:] != maps[layer.like][0].shape[-2:]:
                made = _resize(made, places[resized(layer.name)])
            maps[layer.name] = (made,)
            for name in done:  # what torch has made is let go of
                del maps[name]
            joined = {names: tensor for names, tensor in joined.items() if not set(names) & set(done)}


@torch.no_grad()
def run_layer(
    layer: FoldedLayer, weights: LayerWeights, maps: dict[str, Sources], out: Tensor, *, by_kernel: bool, tf32: bool
) -> Tensor:
    """One launch alone, as a run makes it, by a kernel into `out` or by torch into memory of its own; what it made.

    weights: as `FoldedWeights` has them for that way. maps: what it reads, by name.
    """
    if not by_kernel:
        return _by_torch(layer, weights, maps, {})
    _by_kernel(layer, weights, maps, out, tf32)
    return out


@functools.cache
def _kernels() -> Any:
    from fastjepa.kernels.convolution import fused  # only here: it needs Triton

    return fused


def _by_kernel(layer: FoldedLayer, weights: LayerWeights, maps: dict[str, Sources], out: Tensor, tf32: bool) -> None:
    sources = _of(layer.sources, maps)
    if layer.is_transposed:
        _kernels().transposed_convolution(*sources, weights.weight, weights.bias, tf32=tf32, out=out)
        return
    _kernels().convolution(
        sources, weights.weight, weights.bias, kernel_size=layer.kernel_size, stride=layer.stride,
        shortcut=_of(layer.shortcut, maps), shortcut_stride=layer.shortcut_stride,
        residual=None if layer.residual is None else maps[layer.residual][0], relu=layer.relu, head=weights.head,
        tf32=tf32, out=out,
    )  # fmt: skip


def _by_torch(
    layer: FoldedLayer, weights: LayerWeights, maps: dict[str, Sources], joined: dict[tuple[str, ...], Tensor]
) -> Tensor:
    """The same launch by torch's convolutions. `joined`: what was put side by side in this run already."""
    x = _side_by_side(layer.sources, maps, joined)
    if layer.is_transposed:
        out = F.conv_transpose2d(x, weights.weight, weights.bias, stride=2)
    else:
        out = F.conv2d(x, weights.weight, weights.bias, layer.stride, layer.kernel_size // 2)
    if weights.shortcut is not None:
        out += F.conv2d(_side_by_side(layer.shortcut, maps, joined), weights.shortcut, None, layer.shortcut_stride)
    if layer.residual is not None:
        out += maps[layer.residual][0]
    if layer.relu:
        out.relu_()
    if weights.head is not None:
        out = F.conv2d(out, *weights.head)
    return out.contiguous(memory_format=torch.channels_last)


def _of(names: tuple[str, ...], maps: dict[str, Sources]) -> Sources:
    return tuple(tensor for name in names for tensor in maps[name])


def _side_by_side(names: tuple[str, ...], maps: dict[str, Sources], joined: dict[tuple[str, ...], Tensor]) -> Tensor:
    if names not in joined:
        tensors = _of(names, maps)
        joined[names] = tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)
    return joined[names]


def _resize(x: Tensor, out: Tensor) -> Tensor:
    """`model.networks.resized` into memory that is there."""
    torch.ops.aten.upsample_bilinear2d.out(x, list(out.shape[-2:]), False, None, None, out=out)
    return out
