"""A 3×3 convolution of an image: one to four channels, in whatever layout it comes.

Nine taps of so few channels are one short row of 9 to 36 numbers for each pixel, gathered one by one through L1 into a
tile (BLOCK_N, BLOCK_I), which one dot multiplies: a whole block of channels for each tap would be mostly padding.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fastjepa.kernels.convolution.gemm import grid
from fastjepa.kernels.convolution.layer import Layer
from fastjepa.kernels.convolution.operands import Operands, dot_input_precision
from fastjepa.kernels.convolution.tile import after_the_kernel_before, finish, frame_of
from fastjepa.kernels.launch import LaunchConfig, dot, launch_kernel, round_to

MOST_CHANNELS = 4


@triton.jit
def _convolution_stem_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (n_frames, C1, height, width), strided
    residual_ptr,  # (n_frames, out_height, out_width, C_OUT) or None
    out_ptr,  # (n_frames, out_height, out_width, C_OUT)
    weight_ptr,  # (9·C1, C_OUT)
    bias_ptr,  # (C_OUT,) or None
    n_frames,
    height,
    width,
    out_height,
    out_width,
    stride_frame,  # of x, in elements
    stride_channel,
    stride_row,
    stride_column,
    C1: tl.constexpr,
    C_OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    n_pixels = out_height * out_width
    first = tl.program_id(0) * BLOCK_N
    frame, pixel = frame_of(first, n_pixels)
    offs_n = pixel + tl.arange(0, BLOCK_N)
    mask_n = first + tl.arange(0, BLOCK_N) < n_frames * n_pixels
    offs_i = tl.arange(0, BLOCK_I)
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    tap = offs_i // C1
    row = (offs_n // out_width % out_height * STRIDE)[:, None] + (tap // 3 - 1)[None, :]
    column = (offs_n % out_width * STRIDE)[:, None] + (tap % 3 - 1)[None, :]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    mask = mask_n[:, None] & (offs_i < 9 * C1)[None, :] & inside
    offs = row * stride_row + column * stride_column + (offs_i % C1 * stride_channel)[None, :]
    frames = frame + (offs_n // n_pixels)
    after_the_kernel_before(LAUNCH_EARLY)

    x = tl.load(x_ptr + (frames * stride_frame)[:, None] + offs, mask=mask, other=0.0)
    weight_mask = (offs_i < 9 * C1)[:, None] & (offs_o < C_OUT)[None, :]
    weight = tl.load(weight_ptr + offs_i[:, None] * C_OUT + offs_o[None, :], mask=weight_mask, other=0.0)
    # In the dtype of the weights: a video is fp32 whatever the network computes in.
    x = round_to(x.to(tl.float32), weight_ptr.dtype.element_ty)
    acc = dot(x, weight, tl.zeros((BLOCK_N, BLOCK_O), tl.float32), PRECISION)
    if residual_ptr is not None:
        residual_ptr += frame * n_pixels * C_OUT
    out_ptr += frame * n_pixels * C_OUT
    finish(acc, residual_ptr, out_ptr, bias_ptr, None, None, offs_n, offs_o, mask_n, C_OUT, 0, RELU, PRECISION, BLOCK_D)


def fits(layer: Layer) -> bool:
    """Whether the kernel takes this layer: one source of few channels, and neither shortcut nor head."""
    few = len(layer.sources) == 1 and layer.sources[0] <= MOST_CHANNELS
    return few and layer.kernel_size == 3 and not layer.shortcut and not layer.head


def launch(operands: Operands, config: LaunchConfig) -> None:
    """Launch it. `x` may be strided, and fp32 beside weights of another dtype."""
    layer = operands.layer
    if not fits(layer):
        raise ValueError(f"the stem's kernel does not take {layer}")
    sizes, strides = operands.sizes(), operands.x.stride()
    launch_kernel(
        _convolution_stem_kernel,
        grid(layer, config),
        config,
        x_ptr=operands.x,
        residual_ptr=operands.residual,
        out_ptr=operands.out,
        weight_ptr=operands.weight,
        bias_ptr=operands.bias,
        **{name: sizes[name] for name in ("n_frames", "height", "width", "out_height", "out_width")},
        stride_frame=strides[0],
        stride_channel=strides[1],
        stride_row=strides[2],
        stride_column=strides[3],
        **constexprs(layer, operands.relu, config.launch_pdl),
    )


def constexprs(layer: Layer, relu: bool, launch_early: bool) -> dict[str, Any]:
    """The kernel's flags, in the order of its signature."""
    return {
        "C1": layer.sources[0],
        "C_OUT": layer.out,
        "STRIDE": layer.stride,
        "RELU": relu,
        "PRECISION": dot_input_precision(layer.precision),
        "LAUNCH_EARLY": launch_early,
    }


KERNEL = _convolution_stem_kernel  # for the audit
