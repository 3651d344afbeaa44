"""Fused networks: the published ones with everything between the convolutions done in one pass each way.

For the backward pass only raw outputs of convolutions are kept; what lies between is computed again, unless a network
was made with `recompute=False`: then autograd keeps everything, for more memory and the same numbers bit for bit.

`from_eager` shares every parameter, buffer and submodule name with the module it replaces, so state_dicts, optimizers
and freezing go on as before. Frames are kept channels-last (N, H, W, C in memory) throughout; results have the shapes
of the replaced module, and equal its results to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.fused.joining import join_used_twice
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
from fastjepa.fused.recompute import Recomputation, recompute_activations
from fastjepa.fused.shared_parameters import ParameterOf, SharedParameters, is_plain_convolution
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
    apply_convolution_with,
    join_context,
    join_skip,
    per_frame,
    pooled,
    require_frames,
)
from fastjepa.profiling import span

# One result, given out once for each of its users: one memory, but each user's gradient goes its own way to the kernel
# that adds them. A list of these is what would be one tensor in eager code.
Uses = tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """One call of a network: what its backward pass makes again, the tensors that stand for its parameters, and whose
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
            out = apply_convolution_with(source, x, weight, bias)
        else:
            out = apply_convolution(conv, x)
        return out.contiguous(memory_format=torch.channels_last)

    def activate(
        self, x: Tensor, bn: nn.BatchNorm2d, residual: Tensor | None = None, residual_bn: Any = None, uses: int = 1
    ) -> Uses:
        """relu(bn(x) [+ residual] [+ residual_bn(residual)]) in one pass, to be computed again in the backward pass."""
        outs, again = batch_norm_act_repeatable(
            x, bn, residual, residual_bn, uses=uses, parameter_of=self.parameter_of, shares=self.shares
        )
        if residual is None:
            return self.memory.announce(outs, lambda: again(None))
        remake_residual = self.memory.remake(residual)
        return self.memory.announce(outs, lambda: again(remake_residual()))

    def join(self, x: Tensor, skip: Uses) -> Uses:
        """`join_skip` for two users, by two uses of the skip, keeping the upsampled half and a maker for the other."""
        outs = join_used_twice(x, (skip[0], skip[1]))
        remake_x, remake_skip = self.memory.remake(x), self.memory.remake(skip[0])
        return self.memory.announce(outs, lambda: join_skip(remake_x(), remake_skip()))


class FusedResidualBlock(nn.Module):
    """`ResidualBlock` with BatchNorm, the addition and ReLU in one pass."""

    conv1: nn.Module
    bn1: nn.BatchNorm2d
    conv2: nn.Module
    bn2: nn.BatchNorm2d
    shortcut: Any

    def __init__(self, block: nn.Module, recompute: bool = True) -> None:
        super().__init__()
        for name, child in block.named_children():  # in the order of the block's parameters
            if name in ("conv1", "bn1", "conv2", "bn2", "shortcut"):
                setattr(self, name, child)
        self.recompute = recompute
        self.training = block.training
        self._unchanged = Unchanged(self, block)

    @classmethod
    def from_eager(cls, block: nn.Module, recompute: bool = True) -> FusedResidualBlock:
        """Share everything with `block`. Raises ValueError, saying why, if it is not of the published form."""
        require(block_problem(block))
        return cls(block, recompute)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in, H, W) → (N, out, H/stride, W/stride), channels-last."""
        if (eager := self._unchanged.eager(ResidualBlock.forward)) is not None:
            out: Tensor = eager(x)
            return out
        with recompute_activations(self.recompute) as memory:
            call = Call(memory, SharedParameters(self, x.device.type).of_call(), current_shares())
            x = x.contiguous(memory_format=torch.channels_last)
            return self.frames(call, (x, x))[0]

    def frames(self, call: Call, x: Uses, uses: int = 1) -> Uses:
        """`forward` as a part of a network: x, channels-last, is given twice, and so is the result `uses` times."""
        to_conv, to_shortcut = x
        (out,) = call.activate(call.convolve(self.conv1, to_conv), self.bn1)
        out = call.convolve(self.conv2, out)
        if is_identity(self.shortcut):
            return call.activate(out, self.bn2, to_shortcut.to(out.dtype), uses=uses)
        residual = call.convolve(self.shortcut[0], to_shortcut)
        return call.activate(out, self.bn2, residual, self.shortcut[1], uses=uses)


class FusedNetwork(nn.Module):
    """Frames in, frames out, under an autocast of its own if it was given one."""

    published: Any  # the class of the eager network
    is_fused = True  # for whoever asks what a network is without importing this module, which needs Triton
    conv1: nn.Module
    bn1: nn.BatchNorm2d
    blocks: tuple[str, ...] = ()
    convs: tuple[str, ...] = ()

    def __init__(self, network: nn.Module, autocast_dtype: torch.dtype | None, recompute: bool) -> None:
        super().__init__()
        # In the order of the network, which is that of its parameters: an optimizer's state counts them.
        for name, child in network.named_children():
            if name in self.blocks:
                setattr(self, name, FusedResidualBlock.from_eager(child, recompute))
            elif name in ("conv1", "bn1", *self.convs):
                setattr(self, name, child)
        self.autocast_dtype = autocast_dtype
        self.recompute = recompute
        self.training = network.training
        self._unchanged = Unchanged(self, network)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in, T, H, W) or (N, in, H, W) → the same with the output channels, in the dtype of x if the network
        has an autocast of its own.
        """
        if (eager := self._unchanged.eager(self.published._frames)) is not None:
            with self._autocast(x.device.type):
                out = per_frame(eager, x)
                return out if self.autocast_dtype is None else out.to(x.dtype)
        with recompute_activations(self.recompute) as memory:
            return self.run(memory, self.shared_parameters(x.device.type), x)

    def shared_parameters(self, device_type: str) -> SharedParameters:
        """The parameters for calls that follow at once."""
        with self._autocast(device_type):
            return SharedParameters(self, device_type, callers_autocast=self.autocast_dtype is None)

    def run(self, memory: Recomputation, parameters: SharedParameters, x: Tensor) -> Tensor:
        """`forward` as a part of something larger: the maker of x may be in `memory`."""
        call = Call(memory, parameters.of_call(), current_shares())
        with self._autocast(x.device.type):
            out = per_frame(partial(self._frames, call), x)
            return out if self.autocast_dtype is None else out.to(x.dtype)

    def _autocast(self, device_type: str) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device_type, dtype=self.autocast_dtype)

    def _frames(self, call: Call, x: Tensor) -> Tensor:
        stem = call.convolve(self.conv1, x.contiguous(memory_format=torch.channels_last))
        return self._body(call, call.activate(stem, self.bn1, uses=2))

    def _body(self, call: Call, x: Uses) -> Tensor:
        raise NotImplementedError


class FusedResNet5(FusedNetwork):
    """`ResNet5`, fused."""

    published = ResNet5
    blocks = BLOCKS_OF_ENCODER
    layer1: FusedResidualBlock
    layer2: FusedResidualBlock
    layer3: FusedResidualBlock

    def __init__(self, network: nn.Module, autocast_dtype: torch.dtype | None, recompute: bool) -> None:
        super().__init__(network, autocast_dtype, recompute)
        self.avg_pool: bool = getattr(network, "avg_pool", False)

    @classmethod
    def from_eager(
        cls, network: nn.Module, autocast_dtype: torch.dtype | None = None, recompute: bool = True
    ) -> FusedResNet5:
        """Share everything with `network`. Raises ValueError, saying why, if it is not of the published form."""
        require(encoder_problem(network))
        return cls(network, autocast_dtype, recompute)

    def forward(self, x: Tensor) -> Tensor:
        """As `ResNet5.forward`, in the dtype of x if the network has an autocast of its own."""
        if self.avg_pool:
            require_frames(x)
        return super().forward(x)

    def _body(self, call: Call, x: Uses) -> Tensor:
        x = self.layer1.frames(call, x, uses=2)
        x = self.layer2.frames(call, x, uses=2)
        (out,) = self.layer3.frames(call, x)
        return pooled(out) if self.avg_pool else out


class FusedResUNet(FusedNetwork):
    """`ResUNet`, fused. Skips are concatenated channels-last, once."""

    published = ResUNet
    blocks = BLOCKS_OF_UNET
    convs = CONVS_OF_UNET
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

    def __init__(self, network: nn.Module, autocast_dtype: torch.dtype | None, recompute: bool) -> None:
        super().__init__(network, autocast_dtype, recompute)
        self.is_rnn: bool = getattr(network, "is_rnn", False)

    @classmethod
    def from_eager(
        cls, network: nn.Module, autocast_dtype: torch.dtype | None = None, recompute: bool = True
    ) -> FusedResUNet:
        """Share everything with `network`. Raises ValueError, saying why, if it is not of the published form."""
        require(unet_problem(network))
        return cls(network, autocast_dtype, recompute)

    def _body(self, call: Call, x: Uses) -> Tensor:
        # Of each level, two uses go down and two across.
        s1 = self.enc1.frames(call, x, uses=4)
        s2 = self.enc2.frames(call, s1[:2], uses=4)
        s3 = self.enc3.frames(call, s2[:2], uses=4)
        (out,) = self.bott.frames(call, s3[:2])
        (out,) = self.dec3.frames(call, call.join(call.convolve(self.up3, out), s3[2:]))
        (out,) = self.dec2.frames(call, call.join(call.convolve(self.up2, out), s2[2:]))
        (out,) = self.dec1.frames(call, call.join(call.convolve(self.up1, out), s1[2:]))
        return call.convolve(self.head, out)


class FusedStateOnlyPredictor(nn.Module):
    """`StateOnlyPredictor` over a fused network; what it joins is joined again in the backward pass, not kept."""

    def __init__(self, predictor: nn.Module, autocast_dtype: torch.dtype | None, recompute: bool) -> None:
        super().__init__()
        source: Any = predictor
        self.predictor = FusedResUNet.from_eager(source.predictor, autocast_dtype, recompute)
        self.context_length: int = source.context_length
        self.is_rnn: bool = getattr(predictor, "is_rnn", False)
        self.training = predictor.training
        self._unchanged = Unchanged(self, predictor)

    @classmethod
    def from_eager(
        cls, predictor: nn.Module, autocast_dtype: torch.dtype | None = None, recompute: bool = True
    ) -> FusedStateOnlyPredictor:
        """Share everything with `predictor`. Raises ValueError, saying why, if it is not of the published form."""
        require(predictor_problem(predictor))
        return cls(predictor, autocast_dtype, recompute)

    def forward(self, states: Tensor, actions: Tensor | None = None) -> Tensor:
        """States (B, D, T, H, W) → (B, D, T - context_length + 1, H, W); `actions` is not used."""
        if (eager := self._unchanged.eager(StateOnlyPredictor.forward)) is not None:
            out: Tensor = eager(states, actions)
            return out
        with recompute_activations(self.predictor.recompute) as memory:
            again = partial(_windows_again, memory.remake(states), self.context_length)
            (joined,) = memory.announce((join_context(states, self.context_length),), again)
            return self.predictor.run(memory, self.predictor.shared_parameters(states.device.type), joined)

    def unroll_parallel(self, state: Tensor, nsteps: int) -> tuple[Tensor, list[Tensor]]:
        """The steps of a parallel unroll, as `model.jepa.parallel_unroll`, with what K calls have in common done once.

        Args:
            state: z (B, D, T, H, W), T > context_length.
            nsteps: K.

        Returns:
            z again, whose gradient is added to the others where they are gathered, and p¹ … pᴷ, each like z.
        """
        c = self.context_length
        if self._unchanged.eager(StateOnlyPredictor.forward) is not None:
            return unroll_step_by_step(self, state, nsteps)
        with recompute_activations(self.predictor.recompute) as memory:
            parameters = self.predictor.shared_parameters(state.device.type)
            windows, state, head = first_windows(state, c)
            sequences, current = [], state
            for step in range(1, nsteps + 1):
                with span(f"prediction step {step}"):
                    (windows,) = memory.announce((windows,), partial(_windows_again, memory.remake(current), c))
                    predicted = self.predictor.run(memory, parameters, windows)
                    if step < nsteps:
                        windows, current = next_windows(head, predicted)
                    else:
                        current = last_sequence(head, predicted)
                sequences.append(current)
        return state, sequences


def _windows_again(states: Callable[[], Tensor], context: int) -> Tensor:
    return frame_windows(states(), context)
