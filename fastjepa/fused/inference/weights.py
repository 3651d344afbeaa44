"""BatchNorm folded into weights of convolutions, in static memory that is filled again when a parameter has changed.

w ← w·γ/σ and b = β + (b - μ)·γ/σ, in float64, rounded to the dtype of the computation; biases that kernels read stay
fp32. A block with a shortcut has one bias, the sum of both. The memory stays where it is: CUDA graphs see new weights.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastjepa.fused.inference.layers import Layer
from fastjepa.fused.watch import Watch
from fastjepa.kernels.convolution.weights import pack, pack_head, pack_transposed

LayerWeights = dict[str, Tensor | None]  # weight, bias, shortcut, head, head_bias: what one launch reads


class Weights:
    """The weights of all launches, for kernels ("fused": packed) or for torch's convolutions, in one dtype.

    Attributes:
        of: what each launch reads, by its name; the same tensors for good.
    """

    def __init__(self, layers: Sequence[Layer], fused: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self.of: dict[str, LayerWeights] = {layer.name: {} for layer in layers}
        self._layers, self._fused, self._dtype = layers, fused, dtype
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
            stamp = Stamp([module for layer in self._layers for module in layer.modules])
            for layer in self._layers:
                kept = self.of[layer.name]
                for key, fresh in (_packed if self._fused else _plain)(layer).items():
                    if fresh is not None and kept.get(key) is None:
                        kept[key] = self._allocate(fresh, is_bias=key.endswith("bias"))
                    if fresh is None:
                        kept[key] = None
                    else:
                        kept[key].copy_(fresh)  # type: ignore[union-attr]
        self._stamp = stamp  # only now: what was interrupted is not done

    def _allocate(self, source: Tensor, *, is_bias: bool) -> Tensor:
        dtype = torch.float32 if is_bias and self._fused else self._dtype
        layout = torch.channels_last if source.dim() == 4 else torch.contiguous_format
        return torch.empty(source.shape, dtype=dtype, device=self.device, memory_format=layout)


def fold(conv: Any, norm: Any) -> tuple[Tensor, Tensor | None]:
    """Weight, and bias if there is one, of a convolution and the BatchNorm after it, in float64."""
    weight, bias = conv.weight.double(), None if conv.bias is None else conv.bias.double()
    if norm is None:
        return weight, bias
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = ((0 if bias is None else bias) - norm.running_mean.double()) * scale
    return weight * scale[:, None, None, None], bias if norm.bias is None else bias + norm.bias.double()


def _plain(layer: Layer) -> LayerWeights:
    """As torch's convolutions read them."""
    weight, bias = fold(layer.conv, layer.norm)
    shortcut = head = head_bias = None
    if layer.shortcut_conv is not None:
        shortcut, more = fold(layer.shortcut_conv, layer.shortcut_norm)
        bias = more if bias is None else bias + more  # type: ignore[operator]
    if layer.head is not None:
        head, head_bias = fold(layer.head, None)
    return {"weight": weight, "bias": bias, "shortcut": shortcut, "head": head, "head_bias": head_bias}


def _packed(layer: Layer) -> LayerWeights:
    """As kernels read them: the shortcut's weight within the convolution's."""
    plain = _plain(layer)
    weight, shortcut, head = plain["weight"], plain["shortcut"], plain["head"]
    assert weight is not None
    packed = pack_transposed(weight) if layer.is_transposed else pack(weight, shortcut)
    return {**plain, "weight": packed, "shortcut": None, "head": None if head is None else pack_head(head)}


class Stamp(Watch):
    """What some convolutions and BatchNorms hold now, and how often it was changed in place.

    torch counts changes in place, but for three kinds, which are looked at here: its BatchNorm moves the running
    statistics without a count, and counts `num_batches_tracked`; fused optimizers do not count, so that steps of
    optimizers are listened to; inference tensors have no count, and are taken to have changed. What stays unseen is
    writing through `.data`, or by a CUDA graph (`GraphedTrainStep` counts its own).
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__(modules)
        norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            self.equal(vars(norm), "eps")
        tensors = [tensor for tensor, _ in self.memory.values()]
        self.unknown = any(tensor.is_inference() for tensor in tensors)  # whether something has changed
        self.unknown |= any(norm.num_batches_tracked is None for norm in norms)
        self._versions = [] if self.unknown else [(tensor, tensor._version) for tensor in tensors]
        _listen_to_optimizers()
        _STAMPS.add(self)

    def changed(self) -> bool:
        """Whether anything was replaced, moved or changed, or nobody could tell. Costs some 0.2 µs for each tensor."""
        return self.unknown or any(tensor._version != v for tensor, v in self._versions) or super().changed()


_STAMPS: weakref.WeakSet[Stamp] = weakref.WeakSet()


@functools.cache
def _listen_to_optimizers() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():  # what is compiled copies into parameters, and counts that
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for stamp in tuple(_STAMPS):
        stamp.unknown |= not stamp.memory.keys().isdisjoint(stepped)
