"""What one launch computes, in sizes: by these its form and configuration are chosen, and its work is counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """Sizes of a convolution and of what surrounds it.

    sources: the channels of its one or two sources, which lie in memory as (frames, height, width, channels).
    out: output channels, before a head.
    kernel_size: 3 (padding 1), 1, or, of a transposed convolution, which doubles height and width, 2.
    shortcut: the channels of the one or two sources of a 1×1 convolution that is added; () for none.
    head: output channels of a 1×1 convolution behind ReLU; 0 for none.
    precision: of the products; "tf32" and "fp32" are of fp32 tensors.
    """

    sources: tuple[int, ...]
    out: int
    frames: int
    height: int
    width: int
    kernel_size: int = 3
    stride: int = 1
    shortcut: tuple[int, ...] = ()
    shortcut_stride: int = 1
    residual: bool = False
    head: int = 0
    precision: Precision = "bf16"

    @property
    def is_transposed(self) -> bool:
        """Whether it doubles the size."""
        return self.kernel_size == 2

    @property
    def out_height(self) -> int:
        """ceil(height / stride), or twice the height."""
        return 2 * self.height if self.is_transposed else -(-self.height // self.stride)

    @property
    def out_width(self) -> int:
        """ceil(width / stride), or twice the width."""
        return 2 * self.width if self.is_transposed else -(-self.width // self.stride)

    @property
    def pixels(self) -> int:
        """Rows of the product: output pixels of all frames, or, of a transposed convolution, input pixels."""
        per_frame = self.height * self.width if self.is_transposed else self.out_height * self.out_width
        return self.frames * per_frame

    @property
    def columns(self) -> int:
        """Columns of the product: output channels, of a transposed convolution for each of four places."""
        return self.out * (4 if self.is_transposed else 1)

    @property
    def rows(self) -> int:
        """Rows of the weights: how many products make one output."""
        taps = 1 if self.is_transposed else self.kernel_size**2
        return taps * sum(self.sources) + sum(self.shortcut)

    @property
    def flops(self) -> int:
        """Floating-point operations, a product and its addition counting as two."""
        return 2 * self.pixels * (self.rows * self.columns + self.out * self.head)

    @property
    def bytes_moved(self) -> int:
        """Every tensor once: sources, weights, bias, residual and result."""
        size = DTYPES[self.precision].itemsize
        visited = self.frames * (self.out_height * self.shortcut_stride) * (self.out_width * self.shortcut_stride)
        out_pixels = self.frames * self.out_height * self.out_width
        elements = self.frames * self.height * self.width * sum(self.sources) + self.rows * self.columns
        elements += visited * sum(self.shortcut) + out_pixels * (self.head or self.out)
        elements += out_pixels * self.out * self.residual + self.out * self.head
        return elements * size + 4 * (self.out + self.head)
