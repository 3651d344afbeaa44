"""How weights lie in memory: a matrix with a row for each product's input and a column for each output channel.

A program reads whole rows of consecutive columns, tap after tap. Torch alone is needed here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(weight: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """Weights of a convolution, and of the 1×1 shortcut that is added to it, in one matrix.

    Args:
        weight: (O, C, k, k).
        shortcut: (O, S, 1, 1) or None.

    Returns:
        (k·k·C + S, O): for each tap, row by row, its input channels, then those of the shortcut; contiguous.
    """
    rows = weight.permute(2, 3, 1, 0).flatten(0, 2)
    if shortcut is not None:
        rows = torch.cat((rows, shortcut.permute(2, 3, 1, 0).flatten(0, 2)))
    return rows.contiguous()


def unpack(packed: Tensor, channels: int, kernel_size: int) -> tuple[Tensor, Tensor | None]:
    """The inverse of `pack` for C channels: (O, C, k, k), and (O, S, 1, 1) or None."""
    taps = kernel_size**2 * channels
    weight = packed[:taps].unflatten(0, (kernel_size, kernel_size, channels)).permute(3, 2, 0, 1)
    shortcut = packed[taps:]
    return weight, shortcut.t()[:, :, None, None] if len(shortcut) else None


def pack_transposed(weight: Tensor) -> Tensor:
    """Weights (C, O, 2, 2) of a transposed convolution of stride 2 → (C, 4·O): a column for each tap and channel."""
    return weight.permute(0, 2, 3, 1).flatten(1).contiguous()


def unpack_transposed(packed: Tensor) -> Tensor:
    """The inverse of `pack_transposed`."""
    return packed.unflatten(1, (2, 2, -1)).permute(0, 3, 1, 2)


def pack_head(weight: Tensor) -> Tensor:
    """Weights (D, O, 1, 1) of the 1×1 convolution behind ReLU → (O, D)."""
    return weight[:, :, 0, 0].t().contiguous()
