"""Fused networks: the published ones with everything between the convolutions done in one pass each way.

For the backward pass only raw outputs of convolutions are kept; what lies between is computed again, unless a network
was made with `recompute=False`: then autograd keeps everything, for more memory and the same numbers bit for bit.

`from_eager` shares every parameter, buffer and submodule name with the module it replaces, so state_dicts, optimizers
and freezing go on as before. Frames are kept channels-last (N, H, W, C in memory) throughout; results have the shapes
of the replaced module, and equal its results to rounding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.fused.recognition import (
    BLOCKS_OF_ENCODER,
    BLOCKS_OF_UNET,
    CONVS_OF_UNET,
    block_problem,
    encoder_problem,
    is_identity,
    predictor_problem,
    require,
    unet_problem,
)
from fastjepa.fused.recompute import Recomputation, recompute_activations
from fastjepa.kernels.batch_norm.fused import batch_norm_act_repeatable
from fastjepa.model.networks import join_context, join_skip, per_frame, pooled, require_frames
from fastjepa.model.strided_convolution import apply_convolution


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x), channels-last. A copy only where cuDNN chose another layout, as it may for a single input channel."""
    return apply_convolution(conv, x).contiguous(memory_format=torch.channels_last)


def activate(
    memory: Recomputation, x: Tensor, bn: nn.BatchNorm2d, residual: Tensor | None = None, residual_bn: Any = None
) -> Tensor:
    """relu(bn(x) [+ residual] [+ residual_bn(residual)]) in one pass, to be computed again in the backward pass."""
    (out,), again = batch_norm_act_repeatable(x, bn, residual, residual_bn)
    if residual is None:
        return memory.announce(out, lambda: again(None))
    remake_residual = memory.remake(residual)
    return memory.announce(out, lambda: again(remake_residual()))


def join(memory: Recomputation, x: Tensor, skip: Tensor) -> Tensor:
    """`join_skip`, keeping the upsampled half and a maker for the other."""
    out = join_skip(x, skip)
    remake_x, remake_skip = memory.remake(x), memory.remake(skip)
    return memory.announce(out, lambda: join_skip(remake_x(), remake_skip()))


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

    @classmethod
    def from_eager(cls, block: nn.Module, recompute: bool = True) -> FusedResidualBlock:
        """Share everything with `block`. Raises ValueError, saying why, if it is not of the published form."""
        require(block_problem(block))
        return cls(block, recompute)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in, H, W) → (N, out, H/stride, W/stride), channels-last."""
        with recompute_activations(self.recompute) as memory:
            return self.frames(memory, x.contiguous(memory_format=torch.channels_last))

    def frames(self, memory: Recomputation, x: Tensor) -> Tensor:
        """`forward` as a part of a network: x is channels-last, and its maker may be in `memory`."""
        out = activate(memory, convolve(self.conv1, x), self.bn1)
        out = convolve(self.conv2, out)
        if is_identity(self.shortcut):
            return activate(memory, out, self.bn2, x.to(out.dtype))
        return activate(memory, out, self.bn2, convolve(self.shortcut[0], x), self.shortcut[1])


class FusedNetwork(nn.Module):
    """Frames in, frames out, under an autocast of its own if it was given one."""

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

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in, T, H, W) or (N, in, H, W) → the same with the output channels, in the dtype of x if the network
        has an autocast of its own.
        """
        with recompute_activations(self.recompute) as memory:
            return self.run(memory, x)

    def run(self, memory: Recomputation, x: Tensor) -> Tensor:
        """`forward` as a part of something larger: the maker of x may be in `memory`."""
        if self.autocast_dtype is None:
            return per_frame(partial(self._frames, memory), x)
        with torch.autocast(x.device.type, dtype=self.autocast_dtype):
            return per_frame(partial(self._frames, memory), x).to(x.dtype)

    def _frames(self, memory: Recomputation, x: Tensor) -> Tensor:
        stem = convolve(self.conv1, x.contiguous(memory_format=torch.channels_last))
        return self._body(memory, activate(memory, stem, self.bn1))

    def _body(self, memory: Recomputation, x: Tensor) -> Tensor:
        raise NotImplementedError


class FusedResNet5(FusedNetwork):
    """`ResNet5`, fused."""

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

    def _body(self, memory: Recomputation, x: Tensor) -> Tensor:
        for block in (self.layer1, self.layer2, self.layer3):
            x = block.frames(memory, x)
        return pooled(x) if self.avg_pool else x


class FusedResUNet(FusedNetwork):
    """`ResUNet`, fused. Skips are concatenated channels-last, once."""

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

    def _body(self, memory: Recomputation, x: Tensor) -> Tensor:
        s1 = self.enc1.frames(memory, x)
        s2 = self.enc2.frames(memory, s1)
        s3 = self.enc3.frames(memory, s2)
        x = self.bott.frames(memory, s3)
        x = self.dec3.frames(memory, join(memory, convolve(self.up3, x), s3))
        x = self.dec2.frames(memory, join(memory, convolve(self.up2, x), s2))
        x = self.dec1.frames(memory, join(memory, convolve(self.up1, x), s1))
        return self.head(x)


class FusedStateOnlyPredictor(nn.Module):
    """`StateOnlyPredictor` over a fused network; what it joins is joined again in the backward pass, not kept."""

    def __init__(self, predictor: nn.Module, autocast_dtype: torch.dtype | None, recompute: bool) -> None:
        super().__init__()
        source: Any = predictor
        self.predictor = FusedResUNet.from_eager(source.predictor, autocast_dtype, recompute)
        self.context_length: int = source.context_length
        self.is_rnn: bool = getattr(predictor, "is_rnn", False)
        self.training = predictor.training

    @classmethod
    def from_eager(
        cls, predictor: nn.Module, autocast_dtype: torch.dtype | None = None, recompute: bool = True
    ) -> FusedStateOnlyPredictor:
        """Share everything with `predictor`. Raises ValueError, saying why, if it is not of the published form."""
        require(predictor_problem(predictor))
        return cls(predictor, autocast_dtype, recompute)

    def forward(self, states: Tensor, actions: Tensor | None = None) -> Tensor:
        """States (B, D, T, H, W) → (B, D, T - context_length + 1, H, W); `actions` is not used."""
        with recompute_activations(self.predictor.recompute) as memory:
            remake = memory.remake(states)
            joined = join_context(states, self.context_length)
            return self.predictor.run(
                memory, memory.announce(joined, lambda: join_context(remake(), self.context_length))
            )
