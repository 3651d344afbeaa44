"""The launches of an inference network: which convolution reads which maps, and what is done with its sums.

A map has the name of the launch that makes it; the network is given the maps `INPUTS`. A launch is named by the
convolution that it ends with, as in `kernels/convolution/recipe.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fastjepa.fused.match import BLOCKS_OF_ENCODER, is_identity

INPUTS = ("input", "second input")
# Limits of the kernels (`kernels/convolution/op.py` and `stem.py`, which need Triton): channels of a map, those before
# and after a head within a launch, and those of an image that is read as it lies.
MOST_CHANNELS, MOST_BEFORE_HEAD, MOST_OF_IMAGE = 512, 128, 4

LEVELS = (("up3", "bott", "dec3", "enc3"), ("up2", "dec3", "dec2", "enc2"), ("up1", "dec2", "dec1", "enc1"))


@dataclass(frozen=True)
class Layer:
    """head(relu(norm(conv(sources)) + shortcut_norm(shortcut_conv(shortcut)) + residual)), each but the first optional.

    sources, shortcut: names of maps, side by side in the channels. residual: name of a map.
    like: name of the map to whose size the result is resized where it differs.
    """

    name: str
    conv: Any
    norm: Any
    sources: tuple[str, ...]
    shortcut: tuple[str, ...] = ()
    shortcut_conv: Any = None
    shortcut_norm: Any = None
    residual: str | None = None
    relu: bool = True
    head: Any = None
    like: str | None = None

    @property
    def is_transposed(self) -> bool:
        """Whether it doubles the size."""
        return isinstance(self.conv, nn.ConvTranspose2d)

    @property
    def out_channels(self) -> int:
        """Channels of the map that it makes."""
        return int((self.conv if self.head is None else self.head).out_channels)

    @property
    def read(self) -> tuple[str, ...]:
        """Names of the maps that it reads."""
        return (*self.sources, *self.shortcut, *(() if self.residual is None else (self.residual,)))

    @property
    def modules(self) -> list[nn.Module]:
        """Its convolutions and BatchNorms."""
        parts = (self.conv, self.norm, self.shortcut_conv, self.shortcut_norm, self.head)
        return [part for part in parts if part is not None]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what it makes of sources of this size."""
        if self.is_transposed:
            return 2 * height, 2 * width
        stride = self.conv.stride[0]
        return -(-height // stride), -(-width // stride)


def encoder_layers(source: Any) -> tuple[Layer, ...]:
    """Of an encoder without `match.encoder_problem`. Raises ValueError: BatchNorm cannot be folded."""
    return tuple(_chain(source, INPUTS[:1], BLOCKS_OF_ENCODER))


def unet_layers(source: Any, inputs: int = 1) -> tuple[Layer, ...]:
    """Of a network without `match.unet_problem`, on so many maps. Raises ValueError: BatchNorm cannot be folded."""
    layers = _chain(source, INPUTS[:inputs], ("enc1", "enc2", "enc3", "bott"))
    for up, before, block, skip in LEVELS:
        conv, across = getattr(source, up), f"{skip}.conv2"
        _check_convolution(up, conv, nn.ConvTranspose2d, 2, (2,))
        layers.append(Layer(up, conv, None, (f"{before}.conv2",), relu=False, like=across))
        layers += _block(block, getattr(source, block), (up, across))
    head = source.head
    _check_convolution("head", head, nn.Conv2d, 1, (1,))
    if layers[-1].out_channels <= MOST_BEFORE_HEAD and head.out_channels <= MOST_BEFORE_HEAD:
        layers[-1] = replace(layers[-1], head=head)
    else:
        layers.append(Layer("head", head, None, (layers[-1].name,), relu=False))
    return tuple(layers)


def inputs_of(layers: Sequence[Layer]) -> dict[str, int]:
    """The maps that the network is given: name → channels."""
    names = layers[0].sources
    return dict.fromkeys(names, layers[0].conv.in_channels // len(names))


def channels_problem(layers: Sequence[Layer]) -> str | None:
    """Why kernels do not take maps of so many channels; None if they do."""
    channels = inputs_of(layers) | {layer.name: layer.out_channels for layer in layers}
    for layer in layers:
        most = max(layer.conv.out_channels, *(channels[name] for name in layer.read))
        if most > MOST_CHANNELS:
            return f"{layer.name} has maps of {most} channels; kernels take up to {MOST_CHANNELS}"
    return None


def sizes_of(layers: Sequence[Layer], height: int, width: int) -> dict[str, tuple[int, int]]:
    """Height and width of every map, given those of the inputs."""
    sizes = dict.fromkeys(INPUTS, (height, width))
    for layer in layers:
        sizes[layer.name] = layer.size(*sizes[layer.sources[0]]) if layer.like is None else sizes[layer.like]
    return sizes


def _chain(source: Any, inputs: tuple[str, ...], blocks: tuple[str, ...]) -> list[Layer]:
    """The first convolution, and blocks one after another."""
    layers = [_layer("conv1", source.conv1, source.bn1, inputs)]
    for name in blocks:
        layers += _block(name, getattr(source, name), (layers[-1].name,))
    return layers


def _block(name: str, block: Any, sources: tuple[str, ...]) -> list[Layer]:
    """The two launches of a residual block."""
    first = _layer(f"{name}.conv1", block.conv1, block.bn1, sources, strides=(1, 2))
    second = _layer(f"{name}.conv2", block.conv2, block.bn2, (first.name,))
    if is_identity(block.shortcut):
        if len(sources) > 1:
            raise ValueError(f"{name}: its shortcut is the identity of two maps; it must be a convolution")
        return [first, replace(second, residual=sources[0])]
    conv, norm = block.shortcut
    _check_convolution(f"{name}.shortcut.0", conv, nn.Conv2d, 1, first.conv.stride[:1])
    _check_norm(f"{name}.shortcut.1", norm)
    return [first, replace(second, shortcut=sources, shortcut_conv=conv, shortcut_norm=norm)]


def _layer(name: str, conv: Any, norm: Any, sources: tuple[str, ...], strides: tuple[int, ...] = (1,)) -> Layer:
    """A 3×3 convolution, BatchNorm and ReLU."""
    _check_convolution(name, conv, nn.Conv2d, 3, strides)
    _check_norm(f"the BatchNorm of {name}", norm)
    return Layer(name, conv, norm, sources)


def _check_convolution(name: str, conv: Any, kind: type[nn.Module], kernel_size: int, strides: tuple[int, ...]) -> None:
    if type(conv) is not kind or conv.padding_mode != "zeros":
        raise ValueError(f"{name} is not a plain {kind.__name__}, but {conv}")
    padding, stride = int(kernel_size == 3), conv.stride[0]  # type: ignore[index]
    found = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.output_padding)
    if stride not in strides or found != ((kernel_size,) * 2, (stride,) * 2, (padding,) * 2, (1, 1), 1, (0, 0)):
        raise ValueError(
            f"{name} is {conv}; it must be {kernel_size}×{kernel_size} with stride {' or '.join(map(str, strides))}, "
            f"padding {padding}, no dilation and one group"
        )


def _check_norm(name: str, norm: Any) -> None:
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"{name} has no running statistics, and normalises by those of each batch")
