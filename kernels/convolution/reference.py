"""The definition in plain torch, for any dtype, device and layout, without Triton. Weights are packed (`weights`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjepa.kernels.convolution.weights import unpack, unpack_transposed


def convolution(
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    shortcut: Sequence[Tensor] = (),
    shortcut_stride: int = 1,
    residual: Tensor | None = None,
    relu: bool = False,
    head: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:
    """Arguments and result of `fused.convolution`; everything is added and kept in the dtype of the sources."""
    x = torch.cat(tuple(sources), 1)
    kernel, of_shortcut = unpack(weight, x.shape[1], kernel_size)
    out = F.conv2d(x, kernel, stride=stride, padding=kernel_size // 2)
    if of_shortcut is not None:
        visited = torch.cat(tuple(shortcut), 1)[:, :, ::shortcut_stride, ::shortcut_stride]
        out = out + F.conv2d(visited, of_shortcut)
    if bias is not None:
        out = out + bias.to(out.dtype)[:, None, None]
    if residual is not None:
        out = out + residual
    if relu:
        out = F.relu(out)
    if head is not None:
        head_weight, head_bias = head
        out = F.conv2d(out, head_weight.t()[:, :, None, None], None if head_bias is None else head_bias.to(out.dtype))
    return out


def transposed_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Arguments and result of `fused.transposed_convolution`."""
    return F.conv_transpose2d(x, unpack_transposed(weight), None if bias is None else bias.to(x.dtype), stride=2)
