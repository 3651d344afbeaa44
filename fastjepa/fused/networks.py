"""Fused networks: the published ones with everything between the convolutions done in one pass each way.

`from_eager` shares every parameter, buffer and submodule name with the module it replaces, so state_dicts, optimizers
and freezing go on as before. Frames are kept channels-last (N, H, W, C in memory) throughout; results have the shapes
of the replaced module, and equal its results to rounding. With `recompute=True` only raw outputs of convolutions are
kept for the backward pass; what lies between is computed again: less memory, more time, the same numbers bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastjepa.fused.joining import join_forked
from fastjepa.fused.match import (
    BLOCKS_OF_ENCODER,
    BLOCKS_OF_UNET,
    CONVS_OF_UNET,
    Unchanged,
    block_problem,
    encoder_problem,
    is_identity,
    predictor_problem,
    require,
    unet_problem,
)
from fastjepa.fused.recompute import Fork, Recomputation
from fastjepa.fused.shared_parameters import ParameterOf, is_plain_convolution, share_parameters
from fastjepa.kernels.batch_norm.fused import batch_norm_act_repeatable
from fastjepa.kernels.frame_windows.fused import first_windows, last_sequence, next_windows
from fastjepa.kernels.frame_windows.reference import frame_windows
from fastjepa.kernels.shares import Shares, current_shares
from fastjepa.model.jepa import unroll_step_by_step
from fastjepa.model.networks import (
    ResidualBlock,
    ResNet5,
    ResUNet,
    StateOnlyPredictor,
    apply_convolution,
    join_context,
    join_skip,
    per_frame,
    pooled,
    require_frames,
)
from fastjepa.profiling import span

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Call:
    """One call of a network: what its backward pass recomputes, the tensors that stand for its parameters, and whose
    statistics its BatchNorms use.
    """

    memory: Recomputation
    parameter_of: ParameterOf
    shares: Shares | None = None  # of which clips the statistics are, where these are one rank's of several

    def convolve(self, conv: nn.Module, x: Tensor) -> Tensor:
        """conv(x), channels-last; a copy only where cuDNN chose another layout, as it may for one input channel."""
        if is_plain_convolution(conv):
            source: Any = conv
            weight, bias = self.parameter_of(source.weight), self.parameter_of(source.bias)
            assert weight is not None
            out = apply_convolution(source, x, weight, bias)
        else:
            out = apply_convolution(conv, x)
        return out.contiguous(memory_format=torch.channels_last)

    def activate(
        self, x: Tensor, bn: nn.BatchNorm2d, residual: Tensor | None = None, residual_bn: Any = None, users: int = 1
    ) -> Fork:
        """relu(bn(x) [+ residual] [+ residual_bn(residual)]) in one pass, which the backward pass may repeat."""
        outs, again = batch_norm_act_repeatable(
            x, bn, residual, residual_bn, uses=users, parameter_of=self.parameter_of, shares=self.shares
        )
        if residual is None:
            return self.memory.register(outs, lambda: again(None))
        recompute_residual = self.memory.recompute(residual)
        return self.memory.register(outs, lambda: again(recompute_residual()))

    def join(self, x: Tensor, skip: Fork) -> Fork:
        """`join_skip` for two users, of a skip that is given twice; only x, the upsampled half, is kept."""
        outs = join_forked(x, (skip[0], skip[1]))
        recompute_x, recompute_skip = self.memory.recompute(x), self.memory.recompute(skip[0])
        return self.memory.register(outs, lambda: join_skip(recompute_x(), recompute_skip()))


class FusedNetwork(nn.Module):
    """What the fused modules have in common. Some children are those of the eager module, the others fused in turn.

    Args:
        network: the eager module, of the published form.
        autocast_dtype: compute in an autocast of its own, with results in the dtype of the input; None: the caller's.
        recompute: keep only raw outputs of convolutions for the backward pass.
    """

    published: ClassVar[staticmethod[..., Tensor]]  # the eager module's work, on a fused one's children too
    is_fused = True  # for whoever asks what a network is without importing this module, which needs Triton
    problem_of: ClassVar[staticmethod[[nn.Module], str | None]]
    shared: ClassVar[tuple[str, ...]] = ()  # children that are the eager module's own
    fused: ClassVar[Mapping[str, type[FusedNetwork]]] = {}  # children that are fused
    conv1: nn.Module
    bn1: nn.BatchNorm2d
    avg_pool: bool = False
    is_rnn: bool = False
    context_length: int

    def __init__(self, network: nn.Module, autocast_dtype: torch.dtype | None = None, recompute: bool = False) -> None:
        super().__init__()
        # In the order of the network, which is that of its parameters: an optimizer's state counts them.
        for name, child in network.named_children():
            if name in self.fused:
                setattr(self, name, self.fused[name](child, autocast_dtype, recompute))
            elif name in self.shared:
                setattr(self, name, child)
        for name in ("avg_pool", "is_rnn", "context_length"):
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))
        self.autocast_dtype = autocast_dtype
        self.recompute = recompute
        self.training = network.training
        self._unchanged = Unchanged(self, network)

    @classmethod
    def from_eager(cls, network: nn.Module, autocast_dtype: torch.dtype | None = None, recompute: bool = False) -> Self:
        """Share everything with `network`. Raises ValueError, saying why, if it is not of the published form."""
        require(cls.problem_of(network))
        return cls(network, autocast_dtype, recompute)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in, T, H, W) or (N, in, H, W) → the same with the output channels, in the dtype of x if the network
        has an autocast of its own.
        """
        if (eager := self._unchanged.eager(self.published)) is not None:
            with self._autocast(x.device.type):
                out = per_frame(eager, x)
                return out if self.autocast_dtype is None else out.to(x.dtype)
        memory = Recomputation(self.recompute)
        with memory.hooks():
            return self.run(memory, self.shared_parameters(x.device.type), x)

    def shared_parameters(self, device_type: str) -> Callable[[], ParameterOf]:
        """The parameters for calls that follow at once, as `share_parameters` gives them."""
        with self._autocast(device_type):
            return share_parameters(self, device_type, callers_autocast=self.autocast_dtype is None)

    def run(self, memory: Recomputation, parameters_of_call: Callable[[], ParameterOf], x: Tensor) -> Tensor:
        """`forward` as a part of something larger: x may be registered in `memory`."""
        call = Call(memory, parameters_of_call(), current_shares())
        with self._autocast(x.device.type):
            out = per_frame(partial(self._frames, call), x)
            return out if self.autocast_dtype is None else out.to(x.dtype)

    def _autocast(self, device_type: str) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.autocast_dtype)

    def _frames(self, call: Call, x: Tensor) -> Tensor:
        stem = call.convolve(self.conv1, x.contiguous(memory_format=torch.channels_last))
        return self._body(call, call.activate(stem, self.bn1, users=2))

    def _body(self, call: Call, x: Fork) -> Tensor:
        raise NotImplementedError


class FusedResidualBlock(FusedNetwork):
    """`ResidualBlock` with BatchNorm, the addition and ReLU in one pass: x (N, in, H, W) → (N, out, H/s, W/s)."""

    published = staticmethod(ResidualBlock.forward)
    problem_of = staticmethod(block_problem)
    shared = ("conv1", "bn1", "conv2", "bn2", "shortcut")
    conv2: nn.Module
    bn2: nn.BatchNorm2d
    shortcut: Any

    def _frames(self, call: Call, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return self.of_fork(call, (x, x))[0]

    def of_fork(self, call: Call, x: Fork, users: int = 1) -> Fork:
        """`forward` as a part of a network: x, channels-last, for two users; the result for `users`."""
        to_conv, to_shortcut = x
        (out,) = call.activate(call.convolve(self.conv1, to_conv), self.bn1)
        out = call.convolve(self.conv2, out)
        if is_identity(self.shortcut):
            return call.activate(out, self.bn2, to_shortcut.to(out.dtype), users=users)
        residual = call.convolve(self.shortcut[0], to_shortcut)
        return call.activate(out, self.bn2, residual, self.shortcut[1], users=users)


class FusedResNet5(FusedNetwork):
    """`ResNet5`, fused."""

    published = staticmethod(ResNet5._frames)
    problem_of = staticmethod(encoder_problem)
    shared = ("conv1", "bn1")
    fused = dict.fromkeys(BLOCKS_OF_ENCODER, FusedResidualBlock)
    layer1: FusedResidualBlock
    layer2: FusedResidualBlock
    layer3: FusedResidualBlock

    def forward(self, x: Tensor) -> Tensor:
        """As `ResNet5.forward`, in the dtype of x if the network has an autocast of its own."""
        if self.avg_pool:
            require_frames(x)
        return super().forward(x)

    def _body(self, call: Call, x: Fork) -> Tensor:
        x = self.layer1.of_fork(call, x, users=2)
        x = self.layer2.of_fork(call, x, users=2)
        (out,) = self.layer3.of_fork(call, x)
        return pooled(out) if self.avg_pool else out


class FusedResUNet(FusedNetwork):
    """`ResUNet`, fused. Skips are concatenated channels-last, once."""

    published = staticmethod(ResUNet._frames)
    problem_of = staticmethod(unet_problem)
    shared = ("conv1", "bn1", *CONVS_OF_UNET)
    fused = dict.fromkeys(BLOCKS_OF_UNET, FusedResidualBlock)
    enc1: FusedResidualBlock
    enc2: FusedResidualBlock
    enc3: FusedResidualBlock
    bott: FusedResidualBlock
    dec3: FusedResidualBlock
    dec2: FusedResidualBlock
    dec1: FusedResidualBlock
    up3: nn.Module
    up2: nn.Module
    up1: nn.Module
    head: nn.Module

    def _body(self, call: Call, x: Fork) -> Tensor:
        # Of each level's users, two are below it and two across.
        s1 = self.enc1.of_fork(call, x, users=4)
        s2 = self.enc2.of_fork(call, s1[:2], users=4)
        s3 = self.enc3.of_fork(call, s2[:2], users=4)
        (out,) = self.bott.of_fork(call, s3[:2])
        (out,) = self.dec3.of_fork(call, call.join(call.convolve(self.up3, out), s3[2:]))
        (out,) = self.dec2.of_fork(call, call.join(call.convolve(self.up2, out), s2[2:]))
        (out,) = self.dec1.of_fork(call, call.join(call.convolve(self.up1, out), s1[2:]))
        return call.convolve(self.head, out)


class FusedStateOnlyPredictor(FusedNetwork):
    """`StateOnlyPredictor` over a fused network, with an unroll of its own."""

    published = staticmethod(StateOnlyPredictor.forward)
    problem_of = staticmethod(predictor_problem)
    fused: ClassVar[Mapping[str, type[FusedNetwork]]] = {"predictor": FusedResUNet}
    predictor: FusedResUNet

    def forward(self, states: Tensor, actions: Tensor | None = None) -> Tensor:
        """States (B, D, T, H, W) → (B, D, T - context_length + 1, H, W); `actions` is not used."""
        if (eager := self._unchanged.eager(self.published)) is not None:
            out: Tensor = eager(states, actions)
            return out
        memory = Recomputation(self.recompute)
        with memory.hooks():
            again = self._windows_again(memory, states)
            (windows,) = memory.register((join_context(states, self.context_length),), again)
            return self.predictor.run(memory, self.predictor.shared_parameters(states.device.type), windows)

    def unroll_parallel(self, state: Tensor, nsteps: int) -> tuple[Tensor, list[Tensor]]:
        """The steps of a parallel unroll, as `model.jepa.parallel_unroll`, with what K calls have in common done once.

        Args:
            state: z (B, D, T, H, W), T > context_length.
            nsteps: K.

        Returns:
            z again, whose gradient is added to the others where they are gathered, and p¹ … pᴷ, each like z.
        """
        if self._unchanged.eager(self.published) is not None:
            return unroll_step_by_step(self, state, nsteps)
        memory = Recomputation(self.recompute)
        with memory.hooks():
            parameters = self.predictor.shared_parameters(state.device.type)
            windows, state, head = first_windows(state, self.context_length)
            sequences, current = [], state
            for step in range(1, nsteps + 1):
                with span(f"prediction step {step}"):
                    (windows,) = memory.register((windows,), self._windows_again(memory, current))
                    predicted = self.predictor.run(memory, parameters, windows)
                    if step < nsteps:
                        windows, current = next_windows(head, predicted)
                    else:
                        current = last_sequence(head, predicted)
                sequences.append(current)
        return state, sequences

    def _windows_again(self, memory: Recomputation, states: Tensor) -> Callable[[], Tensor]:
        recompute_states, context = memory.recompute(states), self.context_length
        return lambda: frame_windows(recompute_states(), context)
