"""The networks of Video JEPA as plain modules. Parameter names are an interface: checkpoints of the original load.

Shapes: B batch, C image channels, T frames, H×W pixels, D state channels (`dstc`). A video is (B, C, T, H, W); the
2-D networks see its frames as one batch (B·T, C, H, W). All 3×3 convolutions keep the size (padding 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.kernels.frame_windows.reference import frame_windows
from fastjepa.model.batch_norm import normalize
from fastjepa.model.context import CONTEXT
from fastjepa.optional_packages import needed_for

# Input channels in one block of oneDNN's 1×1 convolutions: 16 with AVX-512, 8 with AVX2.
_BLOCK = 16


def per_frame(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a network of frames to frames (N, C, H, W), or to each frame of a video (B, C, T, H, W).

    Raises:
        ValueError: `x` is neither 4-D nor 5-D.
        TypeError: `x` is not floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"expected a floating point tensor, got {x.dtype}; scale uint8 video to [0, 1] first")
    if x.dim() == 4:
        return network(x)
    if x.dim() != 5:
        raise ValueError(f"expected frames (N, C, H, W) or a video (B, C, T, H, W), got shape {tuple(x.shape)}")
    batch, frames = x.shape[0], x.shape[2]
    out = network(x.transpose(1, 2).flatten(0, 1))  # (B·T, C, H, W)
    return out.unflatten(0, (batch, frames)).transpose(1, 2)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3×3 convolution with padding 1 and no bias: a BatchNorm follows it everywhere."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


class Shortcut(nn.Sequential):
    """1×1 convolution, with a stride or not, → BatchNorm: a Sequential that calls the convolution right on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in, H, W) → (N, out, ceil(H/stride), ceil(W/stride))."""
        conv, norm = self
        return normalize(norm, apply_convolution(conv, x))


def apply_convolution(conv: Any, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """conv(x), or, given a weight, the same function of it and of the bias; padding is then with zeros.

    On a CPU, a strided 1×1 convolution of few channels takes the pixels that it visits, and strides no more: oneDNN's
    weight gradient writes past its workspace where input or weight is channels-last and the input has fewer channels
    than one block (uxlfoundation/oneDNN#6035, seen with torch 2.13): the heap is corrupted, or the gradient is wrong
    without a word. The products and their sums are the same either way.
    """
    if (
        x.device.type == "cpu"
        and type(conv).forward is nn.Conv2d.forward
        and (conv.kernel_size, conv.padding, conv.groups) == ((1, 1), (0, 0), 1)
        and conv.stride != (1, 1)
        and conv.in_channels < _BLOCK
    ):
        parameters = (conv.weight, conv.bias) if weight is None else (weight, bias)
        return F.conv2d(x[:, :, :: conv.stride[0], :: conv.stride[1]], *parameters)
    if weight is None:
        out: Tensor = conv(x)
        return out
    if isinstance(conv, nn.ConvTranspose2d):
        options: Any = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
        return F.conv_transpose2d(x, weight, bias, *options)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class ResidualBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)): (N, in, H, W) → (N, out, ceil(H/stride), ceil(W/stride))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = Shortcut(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in, H, W) → (N, out, H/stride, W/stride)."""
        out = F.relu(normalize(self.bn1, self.conv1(x)))
        out = normalize(self.bn2, self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet5(nn.Module):
    """The encoder: frames to states, ending in ReLU, so states are ≥ 0; at full resolution if nothing strides.

    Args:
        in_d: image channels.
        h_d: width of the first block; the second has twice as many channels.
        out_d: state channels.
        s1, s2, s3: strides of the three blocks.
        avg_pool: average the last block's map, so that each frame becomes one vector.
    """

    def __init__(
        self, in_d: int, h_d: int, out_d: int, s1: int = 1, s2: int = 1, s3: int = 1, avg_pool: bool = False
    ) -> None:
        super().__init__()
        self.avg_pool = avg_pool
        self.conv1 = conv3x3(in_d, h_d)
        self.bn1 = nn.BatchNorm2d(h_d)
        self.layer1 = ResidualBlock(h_d, h_d, s1)
        self.layer2 = ResidualBlock(h_d, 2 * h_d, s2)
        self.layer3 = ResidualBlock(2 * h_d, out_d, s3)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_d, T, H, W) or (N, in_d, H, W) → the same with out_d channels, H and W divided by the strides.

        With `avg_pool`, frames (N, in_d, H, W) → (N, out_d). Raises ValueError for a video then: vectors are no states.
        """
        if self.avg_pool:
            require_frames(x)
        return per_frame(self._frames, x)

    def _frames(self, x: Tensor) -> Tensor:
        x = F.relu(normalize(self.bn1, self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return pooled(x) if self.avg_pool else x


def require_frames(x: Tensor) -> None:
    """Raise ValueError for a video, which a network with `avg_pool` does not take."""
    if x.dim() == 5:
        raise ValueError(
            f"an encoder with avg_pool takes frames (N, in_d, H, W) and makes vectors of them; got a video of shape "
            f"{tuple(x.shape)}"
        )


def pooled(x: Tensor) -> Tensor:
    """The mean over the pixels of (N, C, H, W), (N, C)."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


class ResUNet(nn.Module):
    """The predictor's network: a U-Net of residual blocks, three times down and up, linear at the end.

    Upsampled maps whose size differs from the skip's (sizes not divisible by 8) are resized bilinearly.
    `is_rnn` is what a JEPA reads as `single_unroll`; it changes nothing in the network.
    """

    def __init__(self, in_d: int, h_d: int, out_d: int, is_rnn: bool = False) -> None:
        super().__init__()
        self.is_rnn = is_rnn
        self.conv1 = conv3x3(in_d, h_d)
        self.bn1 = nn.BatchNorm2d(h_d)
        self.enc1 = ResidualBlock(h_d, h_d)
        self.enc2 = ResidualBlock(h_d, 2 * h_d, stride=2)
        self.enc3 = ResidualBlock(2 * h_d, 4 * h_d, stride=2)
        self.bott = ResidualBlock(4 * h_d, 8 * h_d, stride=2)
        self.up3 = nn.ConvTranspose2d(8 * h_d, 4 * h_d, 2, stride=2)
        self.dec3 = ResidualBlock(8 * h_d, 4 * h_d)
        self.up2 = nn.ConvTranspose2d(4 * h_d, 2 * h_d, 2, stride=2)
        self.dec2 = ResidualBlock(4 * h_d, 2 * h_d)
        self.up1 = nn.ConvTranspose2d(2 * h_d, h_d, 2, stride=2)
        self.dec1 = ResidualBlock(2 * h_d, h_d)
        self.head = nn.Conv2d(h_d, out_d, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_d, T, H, W) or (N, in_d, H, W) → the same with out_d channels."""
        return per_frame(self._frames, x)

    def _frames(self, x: Tensor) -> Tensor:
        x = F.relu(normalize(self.bn1, self.conv1(x)))
        s1 = self.enc1(x)
        s2 = self.enc2(s1)
        s3 = self.enc3(s2)
        x = self.bott(s3)
        x = self.dec3(join_skip(self.up3(x), s3))
        x = self.dec2(join_skip(self.up2(x), s2))
        x = self.dec1(join_skip(self.up1(x), s1))
        return self.head(x)


def join_skip(x: Tensor, skip: Tensor) -> Tensor:
    """cat[x, skip] over channels, x (N, C, h, w) resized to the skip's (N, C', H, W) where odd sizes made it differ."""
    return torch.cat((resized(x, skip), skip), dim=1)


def resized(x: Tensor, skip: Tensor) -> Tensor:
    """x (N, C, h, w) itself, or, where its size differs from the skip's (N, C', H, W), bilinearly resized to that."""
    if x.shape[-2:] == skip.shape[-2:]:
        return x
    return F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)


class Projector(nn.Module):
    """An MLP over rows, given as "in-hidden-…-out".

    Linear → BatchNorm1d → ReLU for each hidden size, then a Linear without bias.

    Attributes:
        out_dim: the last size.

    Raises:
        ValueError: `mlp_spec` is not at least two positive integers joined by "-".
    """

    def __init__(self, mlp_spec: str) -> None:
        super().__init__()
        try:
            dims = [int(size) for size in mlp_spec.split("-")]
        except ValueError:
            dims = []
        if len(dims) < 2 or min(dims) < 1:
            raise ValueError(f"projector sizes must look like '16-64-64', got {mlp_spec!r}")
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(dims[:-1]):
            layers += [nn.Linear(d_in, d_out), nn.BatchNorm1d(d_out), nn.ReLU()]
        layers.append(nn.Linear(dims[-2], dims[-1], bias=False))
        self.net = nn.Sequential(*layers)
        self.out_dim = dims[-1]

    def forward(self, rows: Tensor) -> Tensor:
        """rows (N, in) → (N, out)."""
        return self.net(rows)


class StateOnlyPredictor(nn.Module):
    """Feeds a 2-D network with `context_length` consecutive states, the older first in the channels."""

    def __init__(self, predictor: nn.Module, context_length: int = CONTEXT) -> None:
        super().__init__()
        if context_length < 1:
            raise ValueError(f"context_length must be at least 1, got {context_length}")
        self.predictor = predictor
        self.is_rnn: bool = getattr(predictor, "is_rnn", False)
        self.context_length = context_length

    def forward(self, states: Tensor, actions: Tensor | None = None) -> Tensor:
        """States (B, D, T, H, W) → (B, D, T - context_length + 1, H, W); entry i predicts frame i + context_length.

        `actions` is accepted, because `JEPA.unroll` passes it to every predictor, and not used.
        """
        return self.predictor(join_context(states, self.context_length))


def join_context(states: Tensor, context_length: int) -> Tensor:
    """Every `context_length` consecutive states side by side in the channels, the older first.

    (B, D, T, H, W) → (B, context_length·D, T - context_length + 1, H, W). Raises ValueError for too few frames.
    """
    if states.dim() != 5:
        raise ValueError(f"expected states (B, D, T, H, W), got shape {tuple(states.shape)}")
    if states.shape[2] < context_length:
        raise ValueError(f"predicting takes at least {context_length} frames, got {states.shape[2]}")
    return frame_windows(states, context_length)


class ImageDecoder(nn.Module):
    """A probe that paints the frame from the state: conv → ReLU → conv.

    in_dim, out_dim, hidden_dim: channels of the state, of the image and in between. The other arguments are the
    original's and change nothing, as there.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 1,
        hidden_dim: int = 16,
        tk: int = 1,
        ts: int = 1,
        sk: int = 4,
        ss: int = 2,
        pad_mode: str = "same",
        scale_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale_factor, self.shift_factor = scale_factor, shift_factor
        self.net = nn.Sequential(
            nn.Conv2d(in_dim, hidden_dim, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden_dim, out_dim, 3, padding=1)
        )
        self.apply(_init_probe)

    def forward(self, states: Tensor) -> Tensor:
        """States (B, D, T, H, W) or (N, D, H, W) → images of the same layout with out_dim channels."""
        return per_frame(self.net, states)


class DetHead(nn.Module):
    """A probe that finds the digits: the probability that a digit's centre lies in each of 8×8 cells of a frame."""

    CELLS = 8

    def __init__(self, in_d: int, h_d: int, out_d: int = 1) -> None:
        super().__init__()
        convs = nn.Sequential(
            nn.Conv3d(in_d, h_d, (1, 3, 3), padding="same"),
            nn.ReLU(),
            nn.Conv3d(h_d, out_d, (1, 3, 3), padding="same"),
        )
        self.head = nn.Sequential(convs)  # a Sequential of one, because the original's checkpoints name it so
        self.apply(_init_probe)

    def forward(self, states: Tensor) -> Tensor:
        """States (B, D, T, H, W) → probabilities (B, T, 8, 8); with out_d > 1, (B, out_d, T, 8, 8)."""
        if states.dim() != 5:
            raise ValueError(f"expected states (B, D, T, H, W), got shape {tuple(states.shape)}")
        logits = self.head(per_frame(lambda x: F.adaptive_avg_pool2d(x, self.CELLS), states))
        # Under bf16 autocast a sigmoid of bf16 logits would round to exactly 1, and the loss take log(0).
        return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))).squeeze(1)

    @torch.no_grad()
    def score(self, preds: Sequence[Tensor], targets: Tensor) -> list[float]:
        """The average precision of each horizon, as the original's evaluation takes it.

        Args:
            preds: predicted states of horizon 0, 1, …, each (B, D, T, H, W); the last is not scored.
            targets: 1 where a digit is, (B, T, 8, 8).

        Returns:
            For s = 0 … len(preds) - 2 the AP of preds[s] against the targets, both from frame s on.

        Raises:
            MissingPackageError: torchmetrics is not installed.
        """
        with needed_for("average precision"):
            from torchmetrics.functional.classification import binary_average_precision
        return [
            float(binary_average_precision(self(states)[:, s:].flatten(), targets[:, s:].flatten().long()))
            for s, states in enumerate(preds[:-1])
        ]


def _init_probe(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Conv3d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
