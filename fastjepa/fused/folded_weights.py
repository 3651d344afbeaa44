"""BatchNorm folded into the weights of convolutions, in static memory that is filled again when a parameter changes.

w ← w·γ/σ and b = β + (b − μ)·γ/σ, in float64, rounded to the dtype in which is computed; biases that kernels read stay
fp32. Of a block with a shortcut the two biases are one. The memory stays where it is, so that a CUDA graph that reads
it sees new weights.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastjepa.fused.folded_layers import FoldedLayer, convolutions_of, norms_of
from fastjepa.fused.folded_stamp import Stamp
from fastjepa.kernels.convolution.weights import pack, pack_head, pack_transposed

Head = tuple[Tensor, Tensor | None]


class LayerWeights(NamedTuple):
    """What one launch reads.

    weight: for kernels packed, with the shortcut's in it; for torch as a convolution has it, channels-last.
    shortcut: for torch alone.
    head: weight and bias of the convolution behind the ReLU.
    """

    weight: Tensor
    bias: Tensor | None
    shortcut: Tensor | None
    head: Head | None


class FoldedWeights:
    """The weights of all launches for one dtype on one device.

    Args:
        layers: the launches.
        by_kernels: names of those that kernels run.
        dtype: in which is computed.
        device: where the weights lie.

    Attributes:
        of: what each launch reads, by its name; the same tensors for good.
    """

    def __init__(
        self, layers: Sequence[FoldedLayer], by_kernels: Collection[str], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.of: dict[str, LayerWeights] = {}
        self._layers = tuple(layers)
        self._by_kernels = by_kernels
        self._modules: list[nn.Module] = [*convolutions_of(self._layers), *norms_of(self._layers)]
        self.fill()

    def update(self) -> None:
        """Fill them again if a parameter or buffer has changed, as far as torch can see."""
        if self._stamp.changed():
            self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        """Fold the parameters and buffers of now."""
        # Memory that is made in inference mode could not be filled again outside.
        with torch.inference_mode(False), torch.autocast(self.device.type, enabled=False):
            stamp = Stamp(self._modules)
            for layer in self._layers:
                fresh = (_packed if layer.name in self._by_kernels else _plain)(layer)
                if layer.name not in self.of:
                    self.of[layer.name] = _map(self._allocate, layer.name in self._by_kernels, fresh)
                for target, source in zip(_tensors(self.of[layer.name]), _tensors(fresh), strict=True):
                    target.copy_(source)
        self._stamp = stamp  # only now: what was interrupted is not done

    def _allocate(self, source: Tensor, *, keeps_fp32: bool) -> Tensor:
        """Memory for one of them: as it is laid out, for torch channels-last."""
        dtype = torch.float32 if keeps_fp32 else self.dtype
        layout = torch.channels_last if source.dim() == 4 else torch.contiguous_format
        return torch.empty(source.shape, dtype=dtype, device=self.device, memory_format=layout)


def fold(conv: nn.Module, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor | None]:
    """Weight, and bias if there is one, of a convolution and the BatchNorm behind it, in float64."""
    source: Any = conv
    weight = source.weight.detach().double()
    bias = None if source.bias is None else source.bias.detach().double()
    if norm is None:
        return weight, bias
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() if bias is None else bias - norm.running_mean.double()
    bias = shift * scale
    if norm.bias is not None:
        bias = bias + norm.bias.detach().double()
    return weight * scale[:, None, None, None], bias


def _folded(layer: FoldedLayer) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, bias and shortcut of a launch."""
    weight, bias = fold(layer.conv, layer.norm)
    if layer.shortcut_conv is None:
        return weight, bias, None
    shortcut, more = fold(layer.shortcut_conv, layer.shortcut_norm)
    assert bias is not None
    assert more is not None
    return weight, bias + more, shortcut


def _packed(layer: FoldedLayer) -> LayerWeights:
    weight, bias, shortcut = _folded(layer)
    head: Head | None = None
    if layer.head is not None:
        of_head, bias_of_head = fold(layer.head, None)
        head = (pack_head(of_head), bias_of_head)
    packed = pack_transposed(weight) if layer.is_transposed else pack(weight, shortcut)
    return LayerWeights(packed, bias, None, head)


def _plain(layer: FoldedLayer) -> LayerWeights:
    return LayerWeights(*_folded(layer), None if layer.head is None else fold(layer.head, None))


def _map(allocate: Any, keeps_fp32: bool, weights: LayerWeights) -> LayerWeights:
    """The same with memory for each tensor; `keeps_fp32`: for the biases."""

    def of(tensor: Tensor | None, *, is_bias: bool) -> Tensor | None:
        return None if tensor is None else allocate(tensor, keeps_fp32=is_bias and keeps_fp32)

    weight, bias, shortcut, head = weights
    made = of(weight, is_bias=False)
    assert made is not None
    made_head: Head | None = None
    if head is not None:
        of_head = of(head[0], is_bias=False)
        assert of_head is not None
        made_head = (of_head, of(head[1], is_bias=True))
    return LayerWeights(made, of(bias, is_bias=True), of(shortcut, is_bias=False), made_head)


def _tensors(weights: LayerWeights) -> list[Tensor]:
    """In a fixed order."""
    all_of_it = (weights.weight, weights.bias, weights.shortcut, *(weights.head or ()))
    return [tensor for tensor in all_of_it if tensor is not None]
