"""`InferenceEncoder` and `InferencePredictor`: what runs in eval mode and without gradients in the published networks.

BatchNorm is folded into static weights, and between two launches nothing is copied, joined or allocated. In training
mode, with gradients, or once a module has hooks or a reparametrisation, the network that was given runs as it is.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastjepa import autotune
from fastjepa.fused.autocast import InBf16
from fastjepa.fused.inference.layers import MOST_OF_IMAGE, Layer, encoder_layers, kernels_problem, sizes_of, unet_layers
from fastjepa.fused.inference.run import Run
from fastjepa.fused.inference.weights import Weights
from fastjepa.fused.match import encoder_problem, network_trial_problem, predictor_problem, require
from fastjepa.kernels import checks
from fastjepa.model.jepa import parallel_tails, roll_out_plainly
from fastjepa.model.networks import ResNet5, ResUNet, StateOnlyPredictor, per_frame, pooled, require_frames
from fastjepa.profiling import span

Convolutions = Literal["auto", "fused", "eager"]

MOST_RUNS = 4  # sizes of frames whose buffers are kept


class _Folded:
    """What was made of the modules of now: launches, weights, runs; or the problem that forbids it."""

    def __init__(self, network: InferenceNetwork) -> None:
        source = network.source
        modules = [*network.modules(), *source.modules()]
        self._children = [(module._modules, dict(module._modules)) for module in modules]
        inner = [vars(module) for module in {*source.modules()}]
        self._hooks = [hooks for one in inner for hooks in (one["_forward_hooks"], one["_forward_pre_hooks"])]
        self._attributes = inner
        self.layers: tuple[Layer, ...] = ()
        self.weights: dict[tuple[torch.dtype, bool], Weights] = {}
        self.runs: OrderedDict[Any, Run] = OrderedDict()
        try:
            self.problem = network.structure_problem(source)
            if self.problem is None:
                self.layers = network.describe()
        except ValueError as error:
            self.problem = str(error)

    def replaced(self) -> bool:
        """Whether modules were replaced, or reparametrised, which does so too."""
        return any(children != before for children, before in self._children)

    def hooked(self) -> bool:
        """Whether somebody waits for the call of a module that launches do not call."""
        return (
            any(self._hooks)
            or any("forward" in attributes for attributes in self._attributes)
            or bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
        )


class InferenceNetwork(nn.Module):
    """What both have in common. They share every parameter, buffer and submodule name with the module they replace.

    Attributes:
        autocast_dtype: the dtype in which it computes; None: that of the autocast around a call, or of the weights.
        convolutions: "fused" (Triton kernels), "eager" (torch's), or "auto": the faster for each shape.
        layer_names: its launches, in order.
    """

    is_inference = True  # for whoever asks what a network is

    def __init__(self, source: nn.Module, autocast_dtype: torch.dtype | None, convolutions: Convolutions) -> None:
        super().__init__()
        if autocast_dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast_dtype is {autocast_dtype}; accepted: None, torch.bfloat16, torch.float16")
        if convolutions not in get_args(Convolutions):
            raise ValueError(f"convolutions must be one of {', '.join(get_args(Convolutions))}; got {convolutions!r}")
        for name, child in source.named_children():  # in the order of its parameters
            self.add_module(name, child)
        self._source = (source,)  # in a tuple: it is no submodule, whose parameters would count twice
        self.autocast_dtype = _own_autocast(source) if autocast_dtype is None else autocast_dtype
        self.convolutions: Convolutions = convolutions
        self.training = source.training
        self._kept: _Folded | None = None
        folded = self._folded()
        require(folded.problem)
        self.layer_names = tuple(layer.name for layer in folded.layers)
        if convolutions == "fused" and (problem := self.kernels_problem()) is not None:
            raise RuntimeError(f"convolution: {problem}") if "maps of" not in problem else ValueError(problem)

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
        norms = (m for layer in self._folded().layers for m in (layer.norm, layer.shortcut_norm) if m is not None)
        return not any(norm.training for norm in norms)

    def problem(self) -> str | None:
        """Why the source must run, whatever the mode: hooks, or modules that cannot be folded; None if it need not."""
        folded = self._folded(follow=True)
        return "a module has hooks, or a forward of its own" if folded.hooked() else folded.problem

    def kernels_problem(self) -> str | None:
        """Why kernels cannot run its convolutions on the device of its weights; None if they can."""
        first, folded = self._first.conv, self._folded()
        if (problem := checks.unavailable_reason(first.weight.device)) is not None:
            return problem
        from fastjepa.kernels.convolution.op import architecture  # only here: it needs Triton

        try:
            architecture(first.weight.device)
        except RuntimeError as error:
            return str(error)
        return kernels_problem(folded.layers, first.in_channels // self._sources)

    def update(self) -> None:
        """Fold again what has changed, into the memory that recordings of `run` read."""
        for weights in self._folded().weights.values():
            weights.update()

    def refresh(self) -> None:
        """Fold the weights of now. Needed only after changes that torch does not see: through `.data`, or by a CUDA
        graph that is not of `fastjepa.graphs`.
        """
        for weights in self._folded().weights.values():
            weights.fill()

    def compute_dtype(self) -> torch.dtype:
        """In which a call would compute now. As in autocast, float64 stays float64."""
        weight = self._first.conv.weight
        if weight.dtype == torch.float64:
            return torch.float64
        if self.autocast_dtype is not None:
            return self.autocast_dtype
        kind = weight.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype

    def ready(self, frames: int, size: tuple[int, int]) -> Run:
        """To run up to so many frames of that size, with the weights and settings of now."""
        fused = self.convolutions == "fused" or (self.convolutions == "auto" and self._fused_is_faster(frames, size))
        return self._run(frames, size, fused)

    def extra_repr(self) -> str:
        """What it replaces, and how."""
        own = "" if self.autocast_dtype is None else f", {self.autocast_dtype}"
        return f"{type(self._source[0]).__name__}{own}, convolutions={self.convolutions}"

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be made again: for copies and pickles."""
        return {**self.__dict__, "_kept": None}

    def structure_problem(self, source: nn.Module) -> str | None:
        """Why this is no network of the published structure."""
        raise NotImplementedError

    def describe(self) -> tuple[Layer, ...]:
        """Its launches."""
        raise NotImplementedError

    @property
    def _sources(self) -> int:
        """How many maps its first launch reads."""
        return 1

    @property
    def _first(self) -> Layer:
        return self._folded().layers[0]

    def _folded(self, *, follow: bool = False) -> _Folded:
        """Made again if modules were replaced; `follow`: look for that, as each call does once."""
        if self._kept is None or (follow and self._kept.replaced()):
            self._kept = _Folded(self)
        return self._kept

    def _run(self, frames: int, size: tuple[int, int], fused: bool) -> Run:
        folded, dtype, device = self._folded(), self.compute_dtype(), self._first.conv.weight.device
        weights = folded.weights.get((dtype, fused))
        if weights is None or weights.device != device:
            folded.weights[dtype, fused] = weights = Weights(folded.layers, fused, dtype, device)
        else:
            weights.update()
        key = (size, dtype, device, fused)
        run = folded.runs.pop(key, None)
        if run is None or run.frames < frames or run.weights is not weights.of:
            run = None  # let go of it before more is made
            while len(folded.runs) >= MOST_RUNS:
                folded.runs.popitem(last=False)
            run = Run(folded.layers, weights.of, fused, frames, size, dtype, device)
        folded.runs[key] = run
        return run

    def _fused_is_faster(self, frames: int, size: tuple[int, int]) -> bool:
        conv, dtype = self._first.conv, self.compute_dtype()
        device = conv.weight.device
        if dtype == torch.float64 or self.kernels_problem() is not None:
            return False

        @functools.cache
        def example() -> tuple[tuple[Tensor, ...], Tensor]:
            shape = (frames, conv.in_channels // self._sources, *size)
            x = torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
            return (x,) * self._sources, self._new_out(frames, size)

        def candidate(fused: bool) -> object:
            return self._run(frames, size, fused)(*example())

        key = f"{type(self).__name__} {conv.out_channels} {frames}x{size[0]}x{size[1]} {dtype}"
        ways = {"eager": functools.partial(candidate, False), "fused": functools.partial(candidate, True)}
        return autotune.fastest(key, ways, device) == "fused"

    def _new_out(self, frames: int, size: tuple[int, int]) -> Tensor:
        """Memory for the last map."""
        last = self._folded().layers[-1]
        shape = (frames, last.out_channels, *sizes_of(self._folded().layers, *size)[last.name])
        device = self._first.conv.weight.device
        return torch.empty(shape, dtype=self.compute_dtype(), device=device, memory_format=torch.channels_last)

    def _run_source(self, x: Tensor, *arguments: Any) -> Tensor:
        """What was replaced, in the precision of this one."""
        own = self.autocast_dtype
        with nullcontext() if own is None else torch.autocast(x.device.type, dtype=own):
            out: Tensor = self.source(x, *arguments)
        return self._in_dtype_of(x, out)

    def _in_dtype_of(self, x: Tensor, out: Tensor) -> Tensor:
        return out if self.autocast_dtype is None else out.to(x.dtype)

    def _check_input(self, name: str, x: Tensor) -> None:
        weight = self._first.conv.weight
        if x.device != weight.device:
            raise ValueError(f"{name} is on {x.device}, the weights are on {weight.device}")
        if not x.is_floating_point():
            raise TypeError(f"expected a floating point tensor, got {x.dtype}; scale uint8 video to [0, 1] first")
        cast = self.autocast_dtype is not None or torch.is_autocast_enabled(x.device.type)
        if x.dtype != weight.dtype and (torch.float64 in (x.dtype, weight.dtype) or not cast):
            raise TypeError(f"{name} has dtype {x.dtype}, the weights have {weight.dtype}; autocast does not cast it")


class InferenceEncoder(InferenceNetwork):
    """`ResNet5` for inference."""

    conv1: nn.Module

    def __init__(self, source: nn.Module, autocast_dtype: torch.dtype | None, convolutions: Convolutions) -> None:
        super().__init__(source, autocast_dtype, convolutions)
        self.avg_pool: bool = getattr(source, "avg_pool", False)

    @classmethod
    def from_eager(
        cls, network: nn.Module, autocast_dtype: torch.dtype | None = None, convolutions: Convolutions = "auto"
    ) -> InferenceEncoder:
        """Share everything with `network`.

        Args:
            network: of the published structure: plain, fused, or `eb_jepa`'s.
            autocast_dtype: torch.bfloat16 or torch.float16: compute in it, and return the dtype of the input; None:
                that of the network, if it has one of its own, else as autocast says in each call.
            convolutions: "fused" (Triton kernels), "eager" (torch's), or "auto": the faster for each shape.

        Raises:
            ValueError: not of the published structure, or it cannot be folded; "fused" with more channels than kernels
                take; another `autocast_dtype` or `convolutions`.
            RuntimeError: "fused" where kernels cannot run.
        """
        return cls(network, autocast_dtype, convolutions)

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
        return self._in_dtype_of(x, per_frame(self._frames, x))

    def structure_problem(self, source: nn.Module) -> str | None:
        """As of `recognition.encoder_problem`."""
        return encoder_problem(source)

    def describe(self) -> tuple[Layer, ...]:
        """Seven launches."""
        return encoder_layers(self)

    def _frames(self, x: Tensor) -> Tensor:
        channels, size, dtype = x.shape[1], (x.shape[2], x.shape[3]), self.compute_dtype()
        if channels != self._first.conv.in_channels:
            raise ValueError(
                f"the encoder takes images of {self._first.conv.in_channels} channels, got {tuple(x.shape)}"
            )
        run = self.ready(len(x), size)
        if not (run.fused and channels <= MOST_OF_IMAGE and x.dtype in (torch.float32, dtype)):  # else read in place
            x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        out = self._new_out(len(x), size)
        run((x,), out)
        return pooled(out) if self.avg_pool else out


class InferencePredictor(InferenceNetwork):
    """`StateOnlyPredictor` over a `ResUNet` for inference.

    *Frames* are states one after another, (T, B, D, H, W), each channels-last: those that a step reads beside each
    other are slices, and so are those that it makes. A context of 3 and more frames is joined by a copy in each step.
    """

    predictor: nn.Module

    def __init__(self, source: nn.Module, autocast_dtype: torch.dtype | None, convolutions: Convolutions) -> None:
        self.context_length: int = getattr(source, "context_length", 0)
        super().__init__(source, autocast_dtype, convolutions)
        self.is_rnn: bool = getattr(source, "is_rnn", False)

    @classmethod
    def from_eager(
        cls, predictor: nn.Module, autocast_dtype: torch.dtype | None = None, convolutions: Convolutions = "auto"
    ) -> InferencePredictor:
        """Share everything with `predictor`: arguments and errors as of `InferenceEncoder.from_eager`. The network
        reads `context_length` states and makes one: ValueError for one that also reads actions.
        """
        return cls(predictor, autocast_dtype, convolutions)

    def forward(self, states: Tensor, actions: Tensor | None = None) -> Tensor:
        """States (B, D, T, H, W) → (B, D, T - context_length + 1, H, W), in the dtype of the states if there is an
        `autocast_dtype`; `actions` is not used.

        Raises:
            ValueError: another shape, too few frames, or on another device.
            TypeError: of a dtype that the network does not take.
        """
        if not self.folds_now():
            return self._run_source(states, actions)
        self.check_states(states)
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
        self.check_states(states)
        c = self.context_length
        frames = new_frames(c + steps, states.permute(2, 0, 1, 3, 4), self.compute_dtype())
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
        self.check_states(states)
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
        return self.ready(len(states) * count, (states.shape[3], states.shape[4]))

    def in_frames(self, states: Tensor) -> Tensor:
        """States (B, D, T, H, W) → frames, in the dtype in which is computed."""
        return states.permute(2, 0, 3, 4, 1).to(self.compute_dtype()).contiguous().permute(0, 1, 4, 2, 3)

    def step(self, run: Run, frames: Tensor, out: Tensor) -> None:
        """Frames (c + n - 1, B, D, H, W) → the n that follow each c of them, into `out` (n, B, D, H, W)."""
        slices = [frames[first : first + len(out)].flatten(0, 1) for first in range(self.context_length)]
        run(tuple(slices) if len(slices) == self._sources else (torch.cat(slices, 1),), out.flatten(0, 1))

    def check_states(self, states: Tensor) -> None:
        """Raise ValueError or TypeError for states that a call would not take now."""
        _check_rank(states)
        if states.shape[2] < self.context_length:
            raise ValueError(f"predicting takes at least {self.context_length} frames, got {states.shape[2]}")
        made = self._folded().layers[-1].out_channels
        if states.shape[1] != made:
            raise ValueError(f"the predictor takes states of {made} channels, got shape {tuple(states.shape)}")
        self._check_input("states", states)

    def structure_problem(self, source: nn.Module) -> str | None:
        """As of `recognition.predictor_problem`, or that it reads more than states."""
        if (problem := predictor_problem(source)) is not None:
            return problem
        network: Any = self.predictor
        read, made = network.conv1.in_channels, network.head.out_channels
        if read != self.context_length * made:
            return f"the predictor reads {read} channels, which are not {self.context_length} states of {made}"
        return None

    def describe(self) -> tuple[Layer, ...]:
        """Eighteen launches."""
        return unet_layers(self.predictor)

    @property
    def _sources(self) -> int:
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
    if any(getattr(child, "is_fused", False) or getattr(child, "is_inference", False) for child in module.modules()):
        return module
    kind: Any = InferenceEncoder if name == "encoder" else InferencePredictor
    try:
        return module if inference_problem(module, name) else kind.from_eager(module, convolutions="eager")
    except ValueError:  # it cannot be folded
        return module


def new_frames(count: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for frames (count, B, D, H, W), channels-last, as `like` (…, B, D, H, W)."""
    B, D, H, W = like.shape[-4:]
    return like.new_empty(count, B, H, W, D, dtype=dtype).permute(0, 1, 4, 2, 3)


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
