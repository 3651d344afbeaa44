"""Where a CPU may train with channels-last weights."""

from __future__ import annotations

from torch import nn

# Input channels in one block of oneDNN's 1×1 convolutions: 16 with AVX-512, 8 with AVX2.
_BLOCK = 16


def cpu_trains_channels_last(network: nn.Module) -> bool:
    """Whether a CPU computes the right weight gradients of `network` when it is channels-last.

    oneDNN's weight gradient of a strided 1×1 convolution, which is what a shortcut is, writes past its workspace where
    a channels-last input has fewer channels than one block (uxlfoundation/oneDNN#6035, seen with torch 2.13).
    The heap is corrupted, or the gradient is wrong without a word. Contiguous inputs, stride 1 and inference are safe.
    """
    return not any(
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == (1, 1)
        and conv.stride != (1, 1)
        and conv.in_channels < _BLOCK
        for conv in network.modules()
    )
