"""A strided 1×1 convolution, which is what a shortcut is, by a way that a CPU computes right."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.model.batch_norm import normalize

# Input channels in one block of oneDNN's 1×1 convolutions: 16 with AVX-512, 8 with AVX2.
_BLOCK = 16


class Shortcut(nn.Sequential):
    """1×1 convolution, with a stride or not, → BatchNorm: a Sequential that calls the convolution right on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in, H, W) → (N, out, ceil(H/stride), ceil(W/stride))."""
        conv, norm = self
        out: Tensor = normalize(norm, apply_convolution(conv, x))
        return out


def apply_convolution(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x); on a CPU, where oneDNN is at fault, by taking the pixels that a stride visits and striding no more.

    oneDNN's weight gradient of a strided 1×1 convolution writes past its workspace where input or weight is
    channels-last and the input has fewer channels than one block (uxlfoundation/oneDNN#6035, seen with torch 2.13): the
    heap is corrupted, or the gradient is wrong without a word. With stride 1 there is no such workspace. The products
    and their sums are the same either way.
    """
    if isinstance(conv, nn.Conv2d) and _is_at_fault(conv, x):
        return _of_visited_pixels(conv, x, conv.weight, conv.bias)
    out: Tensor = conv(x)
    return out


def apply_convolution_with(
    conv: nn.Conv2d | nn.ConvTranspose2d, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """`apply_convolution` with other tensors in the places of its parameters; padding is with zeros."""
    if isinstance(conv, nn.ConvTranspose2d):
        options: Any = (conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation)
        out: Tensor = F.conv_transpose2d(x, weight, bias, *options)
        return out
    if _is_at_fault(conv, x):
        return _of_visited_pixels(conv, x, weight, bias)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _is_at_fault(conv: nn.Conv2d, x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and conv.kernel_size == (1, 1)
        and conv.stride != (1, 1)
        and (conv.padding, conv.groups) == ((0, 0), 1)
        and conv.in_channels < _BLOCK
    )


def _of_visited_pixels(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x[:, :, :: conv.stride[0], :: conv.stride[1]], weight, bias)
