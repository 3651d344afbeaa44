"""Folded networks: the published ones for inference, in which a launch has a convolution and everything around it.

In eval mode and without gradients, BatchNorm is folded into static weights (`folded_weights`), frames and maps are read
where they lie and written where they are read next, and nothing is copied, joined or allocated between two launches.
In training mode, or where gradients are wanted, the network that was given runs as it was.

`from_eager` shares every parameter, buffer and submodule name with the module it replaces. Weights that change are
folded again before they are used; what torch cannot see changing needs `refresh()`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastjepa.calibration.setting import ambient_tf32
from fastjepa.fused.autocast import InBf16
from fastjepa.fused.folded_layers import (
    MOST_OF_IMAGE,
    FoldedLayer,
    encoder_layers,
    kernels_problem,
    norms_of,
    sizes_of,
    unet_layers,
)
from fastjepa.fused.folded_maps import MapsCache
from fastjepa.fused.folded_run import FoldedRun, Sources
from fastjepa.fused.folded_weights import FoldedWeights
from fastjepa.fused.recognition import encoder_problem, predictor_problem, require
from fastjepa.kernels.checks import require_available
from fastjepa.model.autoregressive import parallel_tails, roll_out_plainly
from fastjepa.model.networks import per_frame, pooled, require_frames
from fastjepa.profiling import span

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


class FoldedEncoder(FoldedModule):
    """`ResNet5`, folded."""

    conv1: nn.Module

    def __init__(self, source: nn.Module, autocast_dtype: torch.dtype | None, layers: Layers) -> None:
        super().__init__(source, autocast_dtype, layers)
        self.avg_pool: bool = getattr(source, "avg_pool", False)

    @classmethod
    def from_eager(
        cls, network: nn.Module, autocast_dtype: torch.dtype | None = None, layers: Layers = "all"
    ) -> FoldedEncoder:
        """Share everything with `network`.

        Args:
            network: of the published structure: plain, fused, or `eb_jepa`'s.
            autocast_dtype: torch.bfloat16 or torch.float16: compute in it, and return the dtype of the input; None:
                that of the network, if it has one of its own, else as autocast says in each call.
            layers: the launches that kernels run, by the names of `kernels/convolution/recipe.py`; torch's own
                convolutions run the others.

        Raises:
            ValueError: not of the published structure, or it cannot be folded; names of no launches, or launches with
                more channels than kernels take; another `autocast_dtype`.
            RuntimeError: launches are asked of kernels where they cannot run.
        """
        require(encoder_problem(network))
        return cls(network, autocast_dtype, layers)

    def forward(self, x: Tensor) -> Tensor:
        """As `ResNet5.forward`, in the dtype of x if there is an `autocast_dtype`.

        Raises:
            ValueError: neither frames nor a video, or on another device.
            TypeError: of a dtype that the network does not take.
        """
        if not self.folds_now():
            return self._run_source(x)
        if self.avg_pool:
            require_frames(x)
        self._check_input("the video", x)
        out = per_frame(self._frames, x)
        return out if self.autocast_dtype is None else out.to(x.dtype)

    def _fold(self, layers: Layers) -> Folding:
        source: Any = self
        return Folding(self, encoder_layers(self), layers, source.conv1.in_channels)

    def _frames(self, x: Tensor) -> Tensor:
        folding, dtype = self._folding(follow=False), self.compute_dtype()
        channels, size = x.shape[1], (x.shape[2], x.shape[3])
        first = folding.layers[0]
        if channels != first.conv.in_channels:
            raise ValueError(f"the encoder takes images of {first.conv.in_channels} channels, got {tuple(x.shape)}")
        in_place = first.name in folding.by_kernels and channels <= MOST_OF_IMAGE and x.dtype in (torch.float32, dtype)
        if not in_place:
            x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        run = folding.ready(len(x), size, dtype)
        last = folding.layers[-1]
        shape = (len(x), last.out_channels, *sizes_of(folding.layers, *size)[last.name])
        out = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
        run((x,), out)
        return pooled(out) if self.avg_pool else out


class FoldedPredictor(FoldedModule):
    """`StateOnlyPredictor` over a `ResUNet`, folded.

    Frames of states lie one after another, (T, B, H, W, D): those that a step reads beside each other are slices, and
    so are those that it makes. A context of 3 and more frames is joined by a copy in each step.
    """

    predictor: nn.Module

    def __init__(self, source: nn.Module, autocast_dtype: torch.dtype | None, layers: Layers) -> None:
        context: Any = source.context_length
        self.context_length: int = context
        super().__init__(source, autocast_dtype, layers)
        self.is_rnn: bool = getattr(source, "is_rnn", False)

    @classmethod
    def from_eager(
        cls, predictor: nn.Module, autocast_dtype: torch.dtype | None = None, layers: Layers = "all"
    ) -> FoldedPredictor:
        """Share everything with `predictor`: arguments and errors as of `FoldedEncoder.from_eager`. The network reads
        `context_length` states and makes one: ValueError for one that also reads actions.
        """
        require(predictor_problem(predictor))
        return cls(predictor, autocast_dtype, layers)

    def forward(self, states: Tensor, actions: Tensor | None = None) -> Tensor:
        """States (B, D, T, H, W) → (B, D, T - context_length + 1, H, W), in the dtype of the states if there is an
        `autocast_dtype`; `actions` is not used.

        Raises:
            ValueError: another shape, too few frames, or on another device.
            TypeError: of a dtype that the network does not take.
        """
        if not self.folds_now():
            return self._run_source(states, actions)
        self._check_states(states)
        count = states.shape[2] - self.context_length + 1
        frames = self.in_frames(states)
        out = frames.new_empty(count, *frames.shape[1:])
        self.step(self.ready(states, count), frames, out)
        return self._result(out, states)

    @torch.no_grad()
    def roll_out(self, states: Tensor, steps: int, out: Tensor | None = None) -> Tensor:
        """The states, and behind them `steps` predicted ones, each from the last c (predicted ones included).

        Args:
            states: (B, D, T, H, W), T ≥ c.
            steps: at least 1.
            out: (B, D, T + steps, H, W) to write to, in any layout.

        Returns:
            `out`, or new memory in the dtype of the states; the given ones bit for bit.

        Raises:
            As `forward`.
        """
        B, D, T, H, W = states.shape
        if out is None:
            out = states.new_empty(B, D, T + steps, H, W)
        if not self.folds_now():
            return roll_out_plainly(self, states, steps, out)
        self._check_states(states)
        c = self.context_length
        given = self.in_frames(states[:, :, -c:])
        frames = given.new_empty(c + steps, *given.shape[1:])
        frames[:c] = given
        run = self.ready(states, 1)
        for step in range(steps):
            with span(f"rollout step {step + 1}"):
                self.step(run, frames[step : step + c], frames[step + c : step + c + 1])
        out[:, :, :T] = states
        out[:, :, T:] = as_states(frames[c:])
        return out

    def tails(self, states: Tensor, steps: int) -> Iterator[Tensor]:
        """The frames of a parallel rollout that each step computes anew: `model.autoregressive.parallel_tails`.

        Args:
            states: (B, D, T, H, W).
            steps: 1 to T - c.

        Yields:
            For s = 0 … steps - 1 the predictions of frames s + c … T - 1, (B, D, T - c - s, H, W), in memory of their
            own and in the dtype that `forward` returns.

        Raises:
            As `forward`.
        """
        if not self.folds_now():
            yield from parallel_tails(self, states, steps)
            return
        self._check_states(states)
        c = self.context_length
        current = self.in_frames(states)
        run = self.ready(states, states.shape[2] - c)
        for s in range(steps):
            with span(f"rollout step {s + 1}"):
                following = current.new_empty(len(current) - 1, *current.shape[1:])
                self.tail_step(run, current, following)
            yield self._result(following[c - 1 :], states)
            current = following

    # ---- parts, for who keeps memory of his own ----

    def ready(self, states: Tensor, count: int) -> FoldedRun:
        """To predict up to `count` frames at once of states (B, D, T, H, W), with the weights and settings of now."""
        size = (states.shape[3], states.shape[4])
        return self._folding().ready(len(states) * count, size, self.compute_dtype())

    def in_frames(self, states: Tensor) -> Tensor:
        """States (B, D, T, H, W) → (T, B, H, W, D), contiguous, in the dtype in which is computed."""
        return states.permute(2, 0, 3, 4, 1).to(self.compute_dtype()).contiguous()

    def step(self, run: FoldedRun, frames: Tensor, out: Tensor) -> None:
        """Frames (c + n - 1, B, H, W, D), contiguous → the n that follow each c of them, into `out` (n, B, H, W, D)."""
        count, c = len(out), self.context_length
        slices = [frames[first : first + count] for first in range(c)]
        if c > 2:  # a launch reads two sources
            slices = [torch.cat(slices, -1)]
        sources: Sources = tuple(_as_maps(part) for part in slices)
        run(sources, _as_maps(out))

    def tail_step(self, run: FoldedRun, current: Tensor, following: Tensor) -> None:
        """Frames s … T - 1 of step s → frames s + 1 … T - 1 of the next, of which the first c - 1 are final."""
        before = self.context_length - 1
        if before:
            following[:before] = current[1 : 1 + before]
        self.step(run, current[:-1], following[before:])

    def _fold(self, layers: Layers) -> Folding:
        network: Any = self.predictor
        read, made = network.conv1.in_channels, network.head.out_channels
        c = self.context_length
        if read != c * made:
            raise ValueError(f"the predictor reads {read} channels, which are not {c} states of {made}")
        return Folding(self, unet_layers(network), layers, made if c <= 2 else read)

    def _check_states(self, states: Tensor) -> None:
        if states.dim() != 5:
            raise ValueError(f"expected states (B, D, T, H, W), got shape {tuple(states.shape)}")
        if states.shape[2] < self.context_length:
            raise ValueError(f"predicting takes at least {self.context_length} frames, got {states.shape[2]}")
        made = self._folding(follow=False).layers[-1].out_channels
        if states.shape[1] != made:
            raise ValueError(f"the predictor takes states of {made} channels, got shape {tuple(states.shape)}")
        self._check_input("states", states)

    def _result(self, frames: Tensor, states: Tensor) -> Tensor:
        out = as_states(frames)
        return out if self.autocast_dtype is None else out.to(states.dtype)


def as_states(frames: Tensor) -> Tensor:
    """A view of frames (T, B, H, W, D) as states (B, D, T, H, W)."""
    return frames.permute(1, 4, 0, 2, 3)


def _as_maps(frames: Tensor) -> Tensor:
    """A view of frames (T, B, H, W, D) as maps (T·B, D, H, W), channels-last."""
    return frames.flatten(0, 1).permute(0, 3, 1, 2)


def _own_autocast(source: Any) -> torch.dtype | None:
    """The dtype of a network that computes in an autocast of its own."""
    for network in (source, getattr(source, "predictor", None)):
        if isinstance(network, InBf16):
            return torch.bfloat16
        dtype = getattr(network, "autocast_dtype", None)
        if isinstance(dtype, torch.dtype):
            return dtype
    return None
