"""`InferenceEncoder` and `InferencePredictor`: what runs in eval mode and without gradients in the published networks.

BatchNorm is folded into static weights, and between two launches nothing is copied, joined or allocated. In training
mode, with gradients, or once a module has hooks or a reparametrisation, the network that was given runs as it is.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastjepa import autotune
from fastjepa.fused.autocast import InBf16
from fastjepa.fused.inference.layers import (
    MOST_OF_IMAGE,
    Layer,
    channels_problem,
    encoder_layers,
    inputs_of,
    sizes_of,
    unet_layers,
)
from fastjepa.fused.inference.run import Run
from fastjepa.fused.inference.weights import Weights
from fastjepa.fused.match import Unchanged, encoder_problem, network_trial_problem, predictor_problem, require
from fastjepa.kernels import checks
from fastjepa.model.jepa import parallel_tails, roll_out_plainly
from fastjepa.model.networks import ResNet5, ResUNet, StateOnlyPredictor, per_frame, pooled, require_frames
from fastjepa.profiling import span

if TYPE_CHECKING:
    from typing_extensions import Self

Convolutions = Literal["auto", "fused", "eager"]

MOST_RUNS = 4  # sizes of frames whose buffers are kept


@dataclass
class _Folded:
    """What was made of the modules of a network: launches, and weights and memory for them."""

    layers: tuple[Layer, ...]
    unchanged: Unchanged
    weights: dict[Any, Weights] = field(default_factory=dict)
    runs: OrderedDict[Any, Run] = field(default_factory=OrderedDict)


class InferenceNetwork(nn.Module):
    """What both have in common. They share every parameter, buffer and submodule name with the module they replace.

    Attributes:
        autocast_dtype: the dtype in which it computes; None: that of the autocast around a call, or of the weights.
        convolutions: "fused" (Triton kernels), "eager" (torch's), or "auto": the faster for each shape.
    """

    def __init__(self, source: nn.Module, autocast_dtype: torch.dtype | None, convolutions: Convolutions) -> None:
        super().__init__()
        if autocast_dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast_dtype is {autocast_dtype}; accepted: None, torch.bfloat16, torch.float16")
        if convolutions not in get_args(Convolutions):
            raise ValueError(f"convolutions must be one of {', '.join(get_args(Convolutions))}; got {convolutions!r}")
        for name, child in source.named_children():  # in the order of its parameters
            self.add_module(name, child)
        for name in ("avg_pool", "context_length", "is_rnn"):
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))
        self._source = (source,)  # in a tuple: it is no submodule, whose parameters would count twice
        self.autocast_dtype = _own_autocast(source) if autocast_dtype is None else autocast_dtype
        self.convolutions: Convolutions = convolutions
        self.training = source.training
        self._kept: _Folded | None = None
        if problem := self.problem() or (convolutions == "fused" and channels_problem(self._folded.layers)):
            raise ValueError(problem)
        if convolutions == "fused" and (problem := self._kernels_problem()) is not None:
            raise RuntimeError(problem)

    @classmethod
    def from_eager(
        cls, network: nn.Module, autocast_dtype: torch.dtype | None = None, convolutions: Convolutions = "auto"
    ) -> Self:
        """Share everything with `network`.

        Args:
            network: of the published structure: plain, fused, or `eb_jepa`'s. A predictor reads `context_length` states
                and makes one.
            autocast_dtype: torch.bfloat16 or torch.float16: compute in it, and return the dtype of the input; None:
                that of the network, if it has one of its own, else as autocast says in each call.
            convolutions: "fused" (Triton kernels), "eager" (torch's), or "auto": the faster for each shape.

        Raises:
            ValueError: not of the published structure, or it cannot be folded; "fused" with more channels than kernels
                take; another `autocast_dtype` or `convolutions`.
            RuntimeError: "fused" where kernels cannot run.
        """
        return cls(network, autocast_dtype, convolutions)

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
        """Whether a call would run folded now: in eval mode, without gradients, and without a `problem`."""
        if torch.is_grad_enabled() or self.training or self.problem() is not None:
            return False
        return not any(module.training for layer in self._folded.layers for module in layer.modules)

    def problem(self) -> str | None:
        """Why the source must run, whatever the mode: hooks, or modules that cannot be folded; None if it need not."""
        if self._kept is not None and self._kept.unchanged.eager(self.forward) is None:
            return None
        source = self.source
        try:
            self._kept = _Folded(self._describe(source), Unchanged(self, source))
        except ValueError as error:
            return str(error)
        return None

    def update(self) -> None:
        """Fold again what has changed, into the memory that recordings read."""
        for weights in () if self._kept is None else self._kept.weights.values():
            weights.update()

    def refresh(self) -> None:
        """Fold the weights of now. Needed only after changes that torch does not see: through `.data`, or by a CUDA
        graph that is not of `fastjepa.graphs`.
        """
        for weights in () if self._kept is None else self._kept.weights.values():
            weights.fill()

    def extra_repr(self) -> str:
        """What it replaces, and how."""
        own = "" if self.autocast_dtype is None else f", {self.autocast_dtype}"
        return f"{type(self._source[0]).__name__}{own}, convolutions={self.convolutions}"

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be made again: for copies and pickles."""
        return {**self.__dict__, "_kept": None}

    def _describe(self, source: Any) -> tuple[Layer, ...]:
        """The launches for `source`. Raises ValueError: it has not the published structure, or cannot be folded."""
        raise NotImplementedError

    @property
    def _folded(self) -> _Folded:
        if self._kept is None:
            require(self.problem())
        assert self._kept is not None
        return self._kept

    @property
    def _weight(self) -> Tensor:
        """That of the first convolution, for dtype and device."""
        weight: Tensor = self._folded.layers[0].conv.weight
        return weight

    def _compute_dtype(self) -> torch.dtype:
        """In which a call would compute now. As in autocast, float64 stays float64."""
        weight = self._weight
        if weight.dtype == torch.float64:
            return torch.float64
        if self.autocast_dtype is not None:
            return self.autocast_dtype
        kind = weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

    def _kernels_problem(self) -> str | None:
        """Why kernels cannot run its convolutions on the device of its weights; None if they can."""
        device = self._weight.device
        try:
            checks.require_available("convolution", device)
            from fastjepa.kernels.convolution.op import architecture  # only here: it needs Triton

            architecture(device)
        except RuntimeError as error:
            return str(error)
        return channels_problem(self._folded.layers)

    def _ready(self, frames: int, size: tuple[int, int], fused: bool | None = None) -> Run:
        """To run up to so many frames of that size, with the weights and settings of now."""
        if fused is None:
            fused = self.convolutions == "fused" or (
                self.convolutions == "auto" and self._fused_is_faster(frames, size)
            )
        folded, dtype, device = self._folded, self._compute_dtype(), self._weight.device
        key = (dtype, device, fused)
        if key not in folded.weights:
            folded.weights[key] = Weights(folded.layers, fused, dtype, device)
        folded.weights[key].update()
        run = folded.runs.pop((size, key), None)
        if run is None or run.frames < frames:
            run = None  # let go of it before more is made
            while len(folded.runs) >= MOST_RUNS:
                folded.runs.popitem(last=False)
            run = Run(folded.layers, folded.weights[key].of, fused, frames, size, dtype, device)
        folded.runs[size, key] = run
        return run

    def _fused_is_faster(self, frames: int, size: tuple[int, int]) -> bool:
        dtype, device, layers = self._compute_dtype(), self._weight.device, self._folded.layers
        if dtype == torch.float64 or self._kernels_problem() is not None:
            return False

        @functools.cache
        def example() -> tuple[list[Tensor], Tensor]:
            inputs = [new_maps((frames, n, *size), dtype, device).zero_() for n in inputs_of(layers).values()]
            return inputs, self._new_out(frames, size)

        def candidate(fused: bool) -> object:
            return self._ready(frames, size, fused)(*example())

        key = f"{type(self).__name__} {layers[0].conv.out_channels} {frames}x{size[0]}x{size[1]} {dtype}"
        ways = {"eager": functools.partial(candidate, False), "fused": functools.partial(candidate, True)}
        return autotune.fastest(key, ways, device) == "fused"

    def _new_out(self, frames: int, size: tuple[int, int]) -> Tensor:
        """Memory for the last map."""
        last, sizes = self._folded.layers[-1], sizes_of(self._folded.layers, *size)
        return new_maps((frames, last.out_channels, *sizes[last.name]), self._compute_dtype(), self._weight.device)

    def _run_source(self, x: Tensor, *arguments: Any) -> Tensor:
        """What was replaced, in the precision of this one."""
        own = self.autocast_dtype
        with nullcontext() if own is None else torch.autocast(x.device.type, dtype=own):
            out: Tensor = self.source(x, *arguments)
        return self._in_dtype_of(x, out)

    def _in_dtype_of(self, x: Tensor, out: Tensor) -> Tensor:
        return out if self.autocast_dtype is None else out.to(x.dtype)

    def _check(self, x: Tensor, channels: int) -> None:
        """Raise ValueError or TypeError for an input that a call would not take now."""
        weight = self._weight
        if x.shape[1] != channels:
            raise ValueError(f"{type(self).__name__} takes {channels} channels, got shape {tuple(x.shape)}")
        if x.device != weight.device:
            raise ValueError(f"the input is on {x.device}, the weights are on {weight.device}")
        cast = self.autocast_dtype is not None or torch.is_autocast_enabled(x.device.type)
        if x.dtype != weight.dtype and not (cast and {x.dtype, weight.dtype} <= {*checks.FLOAT_DTYPES}):
            raise TypeError(
                f"the input has dtype {x.dtype}, the weights have {weight.dtype}; autocast does not cast it"
            )


class InferenceEncoder(InferenceNetwork):
    """`ResNet5` for inference: seven launches."""

    conv1: nn.Module
    avg_pool: bool = False

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
        return self._in_dtype_of(x, per_frame(self._frames, x))

    def _describe(self, source: Any) -> tuple[Layer, ...]:
        require(encoder_problem(source))
        return encoder_layers(source)

    def _frames(self, x: Tensor) -> Tensor:
        self._check(x, *inputs_of(self._folded.layers).values())
        size, dtype = (x.shape[2], x.shape[3]), self._compute_dtype()
        run = self._ready(len(x), size)
        if not (run.fused and x.shape[1] <= MOST_OF_IMAGE and x.dtype in (torch.float32, dtype)):  # else read in place
            x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        out = self._new_out(len(x), size)
        run((x,), out)
        return pooled(out) if self.avg_pool else out


class InferencePredictor(InferenceNetwork):
    """`StateOnlyPredictor` over a `ResUNet` for inference: eighteen launches.

    *Frames* are states one after another, (T, B, D, H, W), each channels-last: those that a step reads beside each
    other are slices, and so are those that it makes. A context of 3 and more frames is joined by a copy in each step.
    """

    predictor: nn.Module
    context_length: int
    is_rnn: bool = False

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
        frames = self.in_frames(states)
        out = new_frames(len(frames) - self.context_length + 1, frames)
        self.step(self.ready_for(states, len(out)), frames, out)
        return self._in_dtype_of(states, as_states(out))

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
        _check_rank(states)
        B, D, T, H, W = states.shape
        if out is None:
            out = states.new_empty(B, D, T + steps, H, W)
        if not self.folds_now():
            return roll_out_plainly(self, states, steps, out)
        self._check_states(states)
        c = self.context_length
        frames = new_frames(c + steps, states.permute(2, 0, 1, 3, 4), self._compute_dtype())
        as_states(frames[:c]).copy_(states[:, :, -c:])
        run = self.ready_for(states, 1)
        for step in range(steps):
            with span(f"rollout step {step + 1}"):
                self.step(run, frames[step : step + c], frames[step + c : step + c + 1])
        out[:, :, :T] = states
        out[:, :, T:] = as_states(frames[c:])
        return out

    def tails(self, states: Tensor, steps: int) -> Iterator[Tensor]:
        """An incremental rollout: of a parallel one, the frames that each step computes anew
        (`model.jepa.parallel_tails`).

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
        run = self.ready_for(states, len(current) - c)
        for s in range(steps):
            with span(f"rollout step {s + 1}"):
                following = new_frames(len(current) - 1, current)
                following[: c - 1] = current[1:c]  # final already
                self.step(run, current[:-1], following[c - 1 :])
            yield self._in_dtype_of(states, as_states(following[c - 1 :]))
            current = following

    def ready_for(self, states: Tensor, count: int) -> Run:
        """To predict up to `count` frames at once of states (B, D, T, H, W)."""
        return self._ready(len(states) * count, (states.shape[3], states.shape[4]))

    def in_frames(self, states: Tensor) -> Tensor:
        """States (B, D, T, H, W) → frames, in the dtype in which is computed."""
        return states.permute(2, 0, 3, 4, 1).to(self._compute_dtype()).contiguous().permute(0, 1, 4, 2, 3)

    def step(self, run: Run, frames: Tensor, out: Tensor) -> None:
        """Frames (c + n - 1, B, D, H, W) → the n that follow each c of them, into `out` (n, B, D, H, W)."""
        slices = [frames[first : first + len(out)].flatten(0, 1) for first in range(self.context_length)]
        run(slices if self.context_length == self._inputs else [torch.cat(slices, 1)], out.flatten(0, 1))

    def _check_states(self, states: Tensor) -> None:
        _check_rank(states)
        if states.shape[2] < self.context_length:
            raise ValueError(f"predicting takes at least {self.context_length} frames, got {states.shape[2]}")
        self._check(states, self._folded.layers[-1].out_channels)

    def _describe(self, source: Any) -> tuple[Layer, ...]:
        require(predictor_problem(source))
        network = source.predictor
        read, made = network.conv1.in_channels, network.head.out_channels
        if read != self.context_length * made:  # as one does that also reads actions
            raise ValueError(
                f"the predictor reads {read} channels, which are not {self.context_length} states of {made}"
            )
        return unet_layers(network, self._inputs)

    @property
    def _inputs(self) -> int:
        """How many maps its first launch reads."""
        return self.context_length if self.context_length <= 2 else 1


def inference_problem(module: Any, name: Literal["encoder", "predictor"]) -> str | None:
    """Why a network cannot be replaced by its inference network, None if it can: structure, hooks, and, of a class
    that is not known, a trial of what it computes.
    """
    problem = (encoder_problem if name == "encoder" else predictor_problem)(module)
    network = module if name == "encoder" else getattr(module, "predictor", None)
    kinds = (type(module), type(network))
    if problem or kinds in ((ResNet5,) * 2, (StateOnlyPredictor, ResUNet)) or getattr(network, "is_fused", False):
        return problem
    return network_trial_problem(module, name)


def for_evaluation(module: nn.Module, name: Literal["encoder", "predictor"]) -> nn.Module:
    """The inference network of a plain one, by torch's convolutions; any other network, and a fused one, as it is."""
    if any(getattr(child, "is_fused", False) or isinstance(child, InferenceNetwork) for child in module.modules()):
        return module
    kind: Any = InferenceEncoder if name == "encoder" else InferencePredictor
    try:
        return module if inference_problem(module, name) else kind.from_eager(module, convolutions="eager")
    except ValueError:  # it cannot be folded
        return module


def new_maps(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for maps (N, C, H, W), channels-last."""
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


def new_frames(count: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for frames (count, B, D, H, W), channels-last, as `like` (…, B, D, H, W)."""
    B, D, H, W = like.shape[-4:]
    return new_maps((count * B, D, H, W), dtype or like.dtype, like.device).unflatten(0, (count, B))


def as_states(frames: Tensor) -> Tensor:
    """A view of frames (T, B, D, H, W) as states (B, D, T, H, W)."""
    return frames.permute(1, 2, 0, 3, 4)


def _check_rank(states: Tensor) -> None:
    if states.dim() != 5:
        raise ValueError(f"expected states (B, D, T, H, W), got shape {tuple(states.shape)}")


def _own_autocast(source: Any) -> torch.dtype | None:
    """The dtype of a network that computes in an autocast of its own."""
    for network in (source, getattr(source, "predictor", None)):
        if isinstance(network, InBf16):
            return torch.bfloat16
        if isinstance(dtype := getattr(network, "autocast_dtype", None), torch.dtype):
            return dtype
    return None
