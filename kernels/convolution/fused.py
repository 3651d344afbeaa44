"""The functions to call: a convolution and all that surrounds it in one launch, for inference; no gradients.

Weights are packed (`weights.pack`), feature maps channels-last; results are written where the caller says, if he does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastjepa.kernels.checks import check_tensor
from fastjepa.kernels.convolution import stem
from fastjepa.kernels.convolution.op import OP, convolution_out


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
    tf32: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """head(relu(conv(cat[sources]) + conv1x1(cat[shortcut]) + bias + residual)), each part but the first optional.

    Sums are fp32, and rounded once, to the dtype of the result (before a head to that of the sources, too).

    Args:
        sources: one or two of (N, C, H, W), fp32, bf16 or fp16, read in place where they are channels-last (of one
            source of at most 4 channels in any layout, and as fp32 beside weights of another dtype).
        weight: (k·k·C + S, O) in the same dtype, from `weights.pack`.
        bias: (O,) fp32.
        kernel_size: k: 3, with padding 1, or 1, without.
        stride: 1 or 2.
        shortcut: one or two of (N, S, H′, W′), channels-last, whose 1×1 convolution of stride
            `shortcut_stride` is added.
        residual: (N, O, H/stride, W/stride), channels-last.
        relu: apply the ReLU.
        head: (weight (O, D) from `weights.pack_head`, bias (D,) fp32 or None) of a 1×1 convolution behind it; O ≤ 128.
        tf32: multiply fp32 in TF32; else in three parts, as exactly as fp32.
        out: (N, D or O, ceil(H/stride), ceil(W/stride)), channels-last, to write to; any of the dtypes.

    Returns:
        `out`, or a new tensor like it in the dtype of the weights.

    Raises:
        RuntimeError: the kernels cannot run on this device.
        TypeError, ValueError: an argument of another dtype, shape, layout or device; the message names it.
    """
    if not 1 <= len(sources) <= 2:
        raise ValueError(f"{OP}: sources has {len(sources)} tensors; accepted: 1 or 2")
    if len(shortcut) > 2:
        raise ValueError(f"{OP}: shortcut has {len(shortcut)} tensors; accepted: at most 2")
    if kernel_size not in (1, 3):
        raise ValueError(f"{OP}: kernel_size is {kernel_size}; accepted: 1, 3")
    x, x2 = (*sources, None)[:2]
    s, s2 = (*shortcut, None, None)[:2]
    assert x is not None
    head_weight, head_bias = head or (None, None)
    check_tensor(OP, "sources[0]", x, shape=(None,) * 4)
    if out is None:
        for name, tensor in (("weight", weight), ("head[0]", head_weight)):
            if tensor is not None:
                check_tensor(OP, name, tensor, shape=(None, None))
        if stride not in (1, 2):
            raise ValueError(f"{OP}: stride is {stride}; accepted: 1, 2")
        n_out = weight.shape[1] if head_weight is None else head_weight.shape[1]
        out = _new(weight, x.shape[0], n_out, -(-x.shape[2] // stride), -(-x.shape[3] // stride))
    few = x2 is None and x.shape[1] <= stem.MOST_CHANNELS and s is None and head is None
    if not (few and kernel_size == 3):
        x = _laid(x)
    convolution_out(
        out, x, _channels_last(x2), _channels_last(s), _channels_last(s2), weight, bias, _channels_last(residual),
        head_weight, head_bias, kernel_size, stride, shortcut_stride, relu, tf32,
    )  # fmt: skip
    return out


def transposed_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, tf32: bool = False, out: Tensor | None = None
) -> Tensor:
    """The transposed convolution of kernel size 2 and stride 2.

    Args:
        x: (N, C, H, W), fp32, bf16 or fp16, channels-last.
        weight: (C, 4·O) in the same dtype, from `weights.pack_transposed`.
        bias: (O,) fp32.
        tf32, out: as in `convolution`.

    Returns:
        (N, O, 2H, 2W), channels-last.

    Raises:
        As `convolution`.
    """
    if out is None:
        check_tensor(OP, "x", x, shape=(None,) * 4)
        check_tensor(OP, "weight", weight, shape=(None, None))
        out = _new(weight, x.shape[0], weight.shape[1] // 4, 2 * x.shape[2], 2 * x.shape[3])
    convolution_out(
        out, _laid(x), None, None, None, weight, bias, None, None, None, 2, 1, 1, False, tf32
    )  # fmt: skip
    return out


def _new(weight: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=torch.channels_last)


def _channels_last(x: Tensor | None) -> Tensor | None:
    return x if x is None else _laid(x)


def _laid(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
