"""The blocks of channels in which both passes work, and padding to whole blocks."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

MAX_D = 512  # the largest size that is tested and audited


def block_d_for(n_channels: int) -> int:
    """The block of channels in which both kernels work; a number, also where torch.compile has a symbol."""
    return min(64, max(16, triton.next_power_of_2(int(n_channels))))


def padded_size(n_channels: int) -> int:
    """`n_channels` rounded up to whole blocks: the size in which centres and matrices are passed to the kernels."""
    block_d = block_d_for(n_channels)
    return -(-int(n_channels) // block_d) * block_d


def padded(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`x` as `dtype`, zero-padded at the end of its last dimensions up to `shape`, contiguous."""
    if shape == x.shape:
        return x.to(dtype).contiguous()
    pad = [p for want, have in zip(reversed(shape), reversed(x.shape), strict=True) for p in (0, want - have)]
    return torch.nn.functional.pad(x.to(dtype), pad).contiguous()
