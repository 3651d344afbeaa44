"""The launches of a folded network, described: which convolution reads what, and everything that is done with its sums.

A map is known by the name of the launch that makes it, and what the network is given by `INPUT`. A launch is named as
in `kernels/convolution/recipe.py`: by the convolution that it ends with, and its BatchNorm, shortcut, residual, ReLU
and, at the end of the predictor, head belong to it. Modules are known by structure and names, never by class.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fastjepa.fused.match import BLOCKS_OF_ENCODER, is_identity
from fastjepa.fused.shared_parameters import is_plain_convolution

INPUT = "input"
# What kernels take, as `kernels/convolution/op.py` and `stem.py` say, which need Triton: channels of a source or a
# result, those before and behind a head that is part of a launch, and those of an image that is read as it lies.
MOST_CHANNELS, MOST_BEFORE_HEAD, MOST_OF_IMAGE = 512, 128, 4

LEVELS = (("up3", "bott", "dec3", "enc3"), ("up2", "dec3", "dec2", "enc2"), ("up1", "dec2", "dec1", "enc1"))


@dataclass(frozen=True)
class FoldedLayer:
    """head(relu(norm(conv(sources)) + shortcut_norm(shortcut_conv(shortcut)) + residual)), each but the first optional.

    sources, shortcut: names of maps, side by side in the channels.
    residual: name of a map.
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
    def kernel_size(self) -> int:
        """3 (padding 1), 1, or of a transposed convolution 2."""
        return int(self.conv.kernel_size[0])

    @property
    def stride(self) -> int:
        """1 or 2; of a transposed convolution 1, as its output has no pixel that is left out."""
        return 1 if self.is_transposed else int(self.conv.stride[0])

    @property
    def shortcut_stride(self) -> int:
        """1 or 2."""
        return 1 if self.shortcut_conv is None else int(self.shortcut_conv.stride[0])

    @property
    def out_channels(self) -> int:
        """Channels of the map that it makes."""
        return int((self.conv if self.head is None else self.head).out_channels)

    @property
    def read(self) -> tuple[str, ...]:
        """Names of the maps that it reads."""
        return (*self.sources, *self.shortcut, *(() if self.residual is None else (self.residual,)))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what it makes of sources of this size."""
        if self.is_transposed:
            return 2 * height, 2 * width
        return -(-height // self.stride), -(-width // self.stride)


def encoder_layers(network: nn.Module) -> tuple[FoldedLayer, ...]:
    """Of a network that `recognition.encoder_problem` has no objection to. Raises ValueError: it cannot be folded."""
    source: Any = network
    layers = [_layer("conv1", source.conv1, source.bn1, (INPUT,))]
    for name in BLOCKS_OF_ENCODER:
        layers += _block(name, getattr(source, name), (layers[-1].name,))
    return tuple(layers)


def unet_layers(network: nn.Module) -> tuple[FoldedLayer, ...]:
    """Of a network that `recognition.unet_problem` has no objection to. Raises ValueError: it cannot be folded."""
    source: Any = network
    layers = [_layer("conv1", source.conv1, source.bn1, (INPUT,))]
    for name in ("enc1", "enc2", "enc3", "bott"):
        layers += _block(name, getattr(source, name), (layers[-1].name,))
    for up, before, block, skip in LEVELS:
        conv = getattr(source, up)
        _check_convolution(up, conv, nn.ConvTranspose2d, 2, (2,))
        across = f"{skip}.conv2"
        layers.append(FoldedLayer(up, conv, None, (f"{before}.conv2",), relu=False, like=across))
        layers += _block(block, getattr(source, block), (up, across))
    head = source.head
    _check_convolution("head", head, nn.Conv2d, 1, (1,))
    if layers[-1].out_channels <= MOST_BEFORE_HEAD and head.out_channels <= MOST_BEFORE_HEAD:
        layers[-1] = replace(layers[-1], head=head)
    else:
        layers.append(FoldedLayer("head", head, None, (layers[-1].name,), relu=False))
    return tuple(layers)


def kernels_problem(layers: Sequence[FoldedLayer], by_kernels: Collection[str], input_channels: int) -> str | None:
    """Why kernels do not take those launches, given the channels of one source of the input; None if they do."""
    channels = {INPUT: input_channels} | {layer.name: layer.out_channels for layer in layers}
    for layer in layers:
        if layer.name not in by_kernels:
            continue
        most = max(layer.conv.out_channels, *(channels[name] for name in layer.read))
        if most > MOST_CHANNELS:
            return f"{layer.name} has maps of {most} channels; kernels take up to {MOST_CHANNELS}"
    return None


def sizes_of(layers: Sequence[FoldedLayer], height: int, width: int) -> dict[str, tuple[int, int]]:
    """Height and width of every map, and of the input, which has these."""
    sizes = {INPUT: (height, width)}
    for layer in layers:
        made = layer.size(*sizes[layer.sources[0]])
        sizes[layer.name] = made if layer.like is None else sizes[layer.like]
    return sizes


def norms_of(layers: Sequence[FoldedLayer]) -> list[nn.BatchNorm2d]:
    """Every BatchNorm that is folded."""
    return [norm for layer in layers for norm in (layer.norm, layer.shortcut_norm) if norm is not None]


def convolutions_of(layers: Sequence[FoldedLayer]) -> list[nn.Conv2d | nn.ConvTranspose2d]:
    """Every convolution that is run."""
    return [conv for layer in layers for conv in (layer.conv, layer.shortcut_conv, layer.head) if conv is not None]


def _block(name: str, block: Any, sources: tuple[str, ...]) -> list[FoldedLayer]:
    """The two launches of a residual block."""
    first = _layer(f"{name}.conv1", block.conv1, block.bn1, sources, strides=(1, 2))
    second = _layer(f"{name}.conv2", block.conv2, block.bn2, (first.name,))
    if is_identity(block.shortcut):
        if len(sources) > 1:
            raise ValueError(f"{name}: its shortcut is the identity of two maps; it must be a convolution")
        return [first, replace(second, residual=sources[0])]
    conv, norm = block.shortcut
    _check_convolution(f"{name}.shortcut.0", conv, nn.Conv2d, 1, (first.stride,))
    _check_norm(f"{name}.shortcut.1", norm)
    return [first, replace(second, shortcut=sources, shortcut_conv=conv, shortcut_norm=norm)]


def _layer(name: str, conv: Any, norm: Any, sources: tuple[str, ...], strides: tuple[int, ...] = (1,)) -> FoldedLayer:
    """A 3×3 convolution, BatchNorm and ReLU."""
    _check_convolution(name, conv, nn.Conv2d, 3, strides)
    _check_norm(f"the BatchNorm of {name}", norm)
    return FoldedLayer(name, conv, norm, sources)


def _check_convolution(name: str, conv: Any, kind: type[nn.Module], kernel_size: int, strides: tuple[int, ...]) -> None:
    if not (type(conv) is kind and is_plain_convolution(conv)):
        raise ValueError(f"{name} is not a plain {kind.__name__}, but {conv}")
    padding = 1 if kernel_size == 3 else 0
    source: Any = conv
    stride = source.stride[0]
    wanted = {
        "kernel_size": (kernel_size,) * 2, "stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (1, 1),
        "groups": 1, "output_padding": (0, 0),
    }  # fmt: skip
    if stride not in strides or any(getattr(source, key) != value for key, value in wanted.items()):
        raise ValueError(
            f"{name} is {conv}; it must be {kernel_size}×{kernel_size} with stride {' or '.join(map(str, strides))}, "
            f"padding {padding}, no dilation and one group"
        )


def _check_norm(name: str, norm: Any) -> None:
    if type(norm) is not nn.BatchNorm2d:
        raise ValueError(f"{name} is a {type(norm).__name__}, not a BatchNorm2d")
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            f"{name} has no running statistics, and normalises by those of each batch: it cannot be folded"
        )
