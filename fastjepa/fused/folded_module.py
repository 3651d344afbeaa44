"""What a folded encoder and predictor have in common: what they share, when they fold, and what they keep."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastjepa.execution import ambient_tf32
from fastjepa.fused.autocast import InBf16
from fastjepa.fused.folded_layers import FoldedLayer, kernels_problem, norms_of
from fastjepa.fused.folded_maps import MapsCache
from fastjepa.fused.folded_run import FoldedRun
from fastjepa.fused.folded_weights import FoldedWeights
from fastjepa.fused.match import require
from fastjepa.kernels.checks import require_available

Layers = Literal["all"] | Collection[str]

_AUTOCAST_DTYPES = (torch.bfloat16, torch.float16)


class Folding:
    """What a folded module keeps: its launches, weights for each dtype, and memory for maps.

    Args:
        owner: the folded module, in which it is noticed that modules are replaced.
        described: the launches.
        layers: which of them kernels run.
        input_channels: of one source of the input.

    Raises:
        ValueError: names of no launches, or launches that kernels do not take.
        RuntimeError: kernels cannot run where the weights are.
    """

    def __init__(
        self, owner: nn.Module, described: tuple[FoldedLayer, ...], layers: Layers, input_channels: int
    ) -> None:
        self.layers = described
        self.norms = norms_of(self.layers)
        names = [layer.name for layer in self.layers]
        asked = names if layers == "all" else [layers] if isinstance(layers, str) else list(layers)
        if unknown := [str(name) for name in asked if name not in names]:
            raise ValueError(f"layers names no launch: {', '.join(unknown)}; there are {', '.join(names)}")
        self.by_kernels = frozenset(asked)
        require(kernels_problem(self.layers, self.by_kernels, input_channels))
        if self.by_kernels:
            require_available("convolution", self.device)
            from fastjepa.kernels.convolution.op import architecture  # only here: it needs Triton

            architecture(self.device)
        self._children = [(module._modules, dict(module._modules)) for module in owner.modules()]
        self._weights: dict[torch.dtype, FoldedWeights] = {}
        self._maps = MapsCache()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.layers[0].conv.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, in which is computed without autocast."""
        dtype: torch.dtype = self.layers[0].conv.weight.dtype
        return dtype

    def outdated(self) -> bool:
        """Whether modules were replaced."""
        return any(children != before for children, before in self._children)

    def refresh(self) -> None:
        """Fold the weights of now, for every dtype."""
        for weights in self._weights.values():
            weights.fill()

    def ready(self, frames: int, size: tuple[int, int], dtype: torch.dtype) -> FoldedRun:
        """To run on up to so many frames of that size, with the weights of now."""
        device = self.device
        weights = self._weights.get(dtype)
        if weights is None or weights.device != device:
            self._weights[dtype] = weights = FoldedWeights(self.layers, self.by_kernels, dtype, device)
        else:
            weights.update()
        maps = self._maps.get(self.layers, self.by_kernels, frames, size, dtype, device)
        return FoldedRun(self.layers, self.by_kernels, weights, maps, device.type == "cuda" and ambient_tf32()[1])


class FoldedModule(nn.Module):
    """What a folded encoder and predictor have in common.

    Attributes:
        autocast_dtype: the dtype in which it computes; None: that of the autocast around a call, or of the weights.
        layer_names: its launches, in order.
        kernel_layers: those that kernels run; torch's own convolutions run the others.
    """

    is_folded = True  # for whoever asks what a network is

    def __init__(self, source: nn.Module, autocast_dtype: torch.dtype | None, layers: Layers) -> None:
        super().__init__()
        if autocast_dtype not in (None, *_AUTOCAST_DTYPES):
            told = ", ".join(map(str, _AUTOCAST_DTYPES))
            raise ValueError(f"autocast_dtype is {autocast_dtype}; accepted: None, {told}")
        for name, child in source.named_children():  # in the order of its parameters
            self.add_module(name, child)
        # In a tuple, so that it is not a submodule, whose parameters would count twice.
        self._source = (source,)
        self.autocast_dtype = _own_autocast(source) if autocast_dtype is None else autocast_dtype
        self.training = source.training
        self._asked: Layers = layers if isinstance(layers, str) else tuple(layers)
        self._kept: Folding | None = None
        folding = self._folding()
        self.layer_names = tuple(layer.name for layer in folding.layers)
        self.kernel_layers = tuple(name for name in self.layer_names if name in folding.by_kernels)

    @property
    def source(self) -> nn.Module:
        """The module that this one replaces, in its mode, with the submodules of now."""
        (source,) = self._source
        for name, child in self.named_children():
            if source._modules.get(name) is not child:
                setattr(source, name, child)
        source.training = self.training
        return source

    def folds_now(self) -> bool:
        """Whether a call would run folded now: in eval mode, and without gradients."""
        if torch.is_grad_enabled() or self.training:
            return False
        return not any(norm.training for norm in self._folding().norms)

    def refresh(self) -> None:
        """Fold the weights of now. Needed only after changes that torch does not see: through `.data`, or by a CUDA
        graph that is not of `fastjepa.graphs`.
        """
        self._folding().refresh()

    def compute_dtype(self) -> torch.dtype:
        """In which a call would compute now. As in autocast, float64 stays float64."""
        folding = self._folding(follow=False)
        kind = folding.device.type
        if folding.dtype == torch.float64:
            return folding.dtype
        if self.autocast_dtype is not None:
            return self.autocast_dtype
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else folding.dtype

    def extra_repr(self) -> str:
        """What is folded, and how."""
        own = "" if self.autocast_dtype is None else f", {self.autocast_dtype}"
        return f"{type(self._source[0]).__name__}{own}, {len(self.kernel_layers)} of {len(self.layer_names)} by kernels"

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be made again: for copies and pickles."""
        return {**self.__dict__, "_kept": None}

    def _folding(self, *, follow: bool = True) -> Folding:
        """Made again if modules were replaced; `follow`: look for that, as each call does once."""
        if self._kept is None or (follow and self._kept.outdated()):
            self._kept = self._fold(self._asked)
        return self._kept

    def _fold(self, layers: Layers) -> Folding:
        raise NotImplementedError

    def _run_source(self, x: Tensor, *arguments: Any) -> Tensor:
        """What was replaced, in the precision of this one."""
        with self._autocast(x.device.type):
            out: Tensor = self.source(x, *arguments)
        return out if self.autocast_dtype is None else out.to(x.dtype)

    def _autocast(self, device_type: str) -> AbstractContextManager[Any]:
        return nullcontext() if self.autocast_dtype is None else torch.autocast(device_type, dtype=self.autocast_dtype)

    def _check_input(self, name: str, x: Tensor) -> None:
        folding = self._folding(follow=False)
        if x.device != folding.device:
            raise ValueError(f"{name} is on {x.device}, the weights are on {folding.device}")
        if not x.is_floating_point():
            raise TypeError(f"expected a floating point tensor, got {x.dtype}; scale uint8 video to [0, 1] first")
        cast = self.autocast_dtype is not None or torch.is_autocast_enabled(x.device.type)
        if x.dtype != folding.dtype and (torch.float64 in (x.dtype, folding.dtype) or not cast):
            raise TypeError(
                f"{name} has dtype {x.dtype}, the weights have {folding.dtype}, which autocast does not mend"
            )


def _own_autocast(source: Any) -> torch.dtype | None:
    """The dtype of a network that computes in an autocast of its own."""
    for network in (source, getattr(source, "predictor", None)):
        if isinstance(network, InBf16):
            return torch.bfloat16
        dtype = getattr(network, "autocast_dtype", None)
        if isinstance(dtype, torch.dtype):
            return dtype
    return None
