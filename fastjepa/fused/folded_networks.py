"""Folded networks: the published ones for inference, in which a launch has a convolution and everything around it.

In eval mode and without gradients, BatchNorm is folded into static weights (`folded_weights`), frames and maps are read
where they lie and written where they are read next, and nothing is copied, joined or allocated between two launches.
In training mode, or where gradients are wanted, the network that was given runs as it was.

`from_eager` shares every parameter, buffer and submodule name with the module it replaces. Weights that change are
folded again before they are used; what torch cannot see changing needs `refresh()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.fused.folded_layers import MOST_OF_IMAGE, encoder_layers, sizes_of, unet_layers
from fastjepa.fused.folded_module import FoldedModule, Folding, Layers
from fastjepa.fused.folded_run import FoldedRun, Sources
from fastjepa.fused.match import encoder_problem, predictor_problem, require
from fastjepa.model.jepa import parallel_tails, roll_out_plainly
from fastjepa.model.networks import per_frame, pooled, require_frames
from fastjepa.profiling import span


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
        self.check_states(states)
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
        _check_rank(states)
        B, D, T, H, W = states.shape
        if out is None:
            out = states.new_empty(B, D, T + steps, H, W)
        if not self.folds_now():
            return roll_out_plainly(self, states, steps, out)
        self.check_states(states)
        c = self.context_length
        frames = states.new_empty(c + steps, B, H, W, D, dtype=self.compute_dtype())
        as_states(frames[:c]).copy_(states[:, :, -c:])
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
        self.check_states(states)
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

    def check_states(self, states: Tensor) -> None:
        """Raise ValueError or TypeError for states that a call would not take now."""
        _check_rank(states)
        if states.shape[2] < self.context_length:
            raise ValueError(f"predicting takes at least {self.context_length} frames, got {states.shape[2]}")
        made = self._folding(follow=False).layers[-1].out_channels
        if states.shape[1] != made:
            raise ValueError(f"the predictor takes states of {made} channels, got shape {tuple(states.shape)}")
        self._check_input("states", states)

    def _result(self, frames: Tensor, states: Tensor) -> Tensor:
        out = as_states(frames)
        return out if self.autocast_dtype is None else out.to(states.dtype)


def _check_rank(states: Tensor) -> None:
    if states.dim() != 5:
        raise ValueError(f"expected states (B, D, T, H, W), got shape {tuple(states.shape)}")


def as_states(frames: Tensor) -> Tensor:
    """A view of frames (T, B, H, W, D) as states (B, D, T, H, W)."""
    return frames.permute(1, 4, 0, 2, 3)


def _as_maps(frames: Tensor) -> Tensor:
    """A view of frames (T, B, H, W, D) as maps (T·B, D, H, W), channels-last."""
    return frames.flatten(0, 1).permute(0, 3, 1, 2)
