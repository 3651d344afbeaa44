"""The blocks of channels in which both passes work, and matrices as kernels read them."""

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


def n_summands(dtype: torch.dtype) -> int:
    """How many tensors of `dtype` hold a float64 one as their sum: one in fp32, two in bf16, 16 bits together."""
    return 1 if dtype == torch.float32 else 2


def summands(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The `n_summands(dtype)` tensors of `dtype` whose sum is x (float64), the large one first."""
    first = x.to(dtype)
    return [first] if n_summands(dtype) == 1 else [first, (x - first.double()).to(dtype)]


def padded(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`x` as `dtype`, zero-padded at the end of its last dimensions up to `shape`, contiguous."""
    if shape == x.shape:
        return x.to(dtype).contiguous()
    pad = [p for want, have in zip(reversed(shape), reversed(x.shape), strict=True) for p in (0, want - have)]
    return torch.nn.functional.pad(x.to(dtype), pad).contiguous()
