"""A transposed convolution of 2×2 and stride 2: one matrix product, whose columns go where they belong.

Every input pixel makes four output pixels, which no other makes: its channels @ (C, 4·O). The four are two rows apart
in the result, which is stored straight to its place.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fastjepa.kernels.convolution.layer import Layer
from fastjepa.kernels.convolution.operands import Operands, dot_input_precision
from fastjepa.kernels.convolution.tile import after_the_kernel_before, frame_of
from fastjepa.kernels.launch import LaunchConfig, add_dot, launch_kernel, round_to


@triton.jit
def _transposed_convolution_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (n_frames, height, width, C1)
    out_ptr,  # (n_frames, 2·height, 2·width, C_OUT)
    weight_ptr,  # (C1, 4·C_OUT)
    bias_ptr,  # (C_OUT,) or None
    n_frames,
    height,
    width,
    C1: tl.constexpr,
    C_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ORDERED_FP32: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    EVEN_I: tl.constexpr = C1 % BLOCK_I == 0
    EVEN_O: tl.constexpr = 4 * C_OUT % BLOCK_O == 0
    n_pixels = height * width
    first = tl.program_id(0) * BLOCK_N
    frame, pixel = frame_of(first, n_pixels)
    offs_n = pixel + tl.arange(0, BLOCK_N)
    mask_n = first + tl.arange(0, BLOCK_N) < n_frames * n_pixels
    offs_i = tl.arange(0, BLOCK_I)
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_o = offs_o < 4 * C_OUT
    x_ptrs = x_ptr + frame * n_pixels * C1 + offs_n[:, None] * C1 + offs_i[None, :]
    weight_ptrs = weight_ptr + offs_i[:, None] * (4 * C_OUT) + offs_o[None, :]
    after_the_kernel_before(LAUNCH_EARLY)

    acc = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for step in range((C1 + BLOCK_I - 1) // BLOCK_I):
        start = step * BLOCK_I
        if EVEN_I and EVEN_O:
            x = tl.load(x_ptrs + start, mask=mask_n[:, None], other=0.0)
            weight = tl.load(weight_ptrs + start * (4 * C_OUT))
        else:
            mask_i = start + offs_i < C1
            x = tl.load(x_ptrs + start, mask=mask_n[:, None] & mask_i[None, :], other=0.0)
            weight = tl.load(weight_ptrs + start * (4 * C_OUT), mask=mask_i[:, None] & mask_o[None, :], other=0.0)
        acc = add_dot(acc, x, weight, PRECISION, ORDERED_FP32)

    channel = offs_o % C_OUT
    place = offs_o // C_OUT  # 0, 1 above; 2, 3 below
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=mask_o, other=0.0)[None, :]
    top_left = (offs_n // width * 4 * width + offs_n % width * 2) * C_OUT  # rows of all frames follow each other
    offs = top_left[:, None] + ((place // 2 * 2 * width + place % 2) * C_OUT + channel)[None, :]
    out_ptr += frame * (4 * n_pixels) * C_OUT
    tl.store(out_ptr + offs, round_to(acc, out_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_o[None, :])


def grid(layer: Layer, config: LaunchConfig) -> tuple[int, int]:
    """Programs by tiles of input pixels and of the four places' channels."""
    return triton.cdiv(layer.pixels, config.blocks["BLOCK_N"]), triton.cdiv(layer.columns, config.blocks["BLOCK_O"])


def launch(operands: Operands, config: LaunchConfig) -> None:
    """Launch it; of the epilogue there is the bias."""
    layer = operands.layer
    launch_kernel(
        _transposed_convolution_kernel,
        grid(layer, config),
        config,
        x_ptr=operands.x,
        out_ptr=operands.out,
        weight_ptr=operands.weight,
        bias_ptr=operands.bias,
        n_frames=layer.frames,
        height=layer.height,
        width=layer.width,
        **constexprs(layer, config.launch_pdl),
    )


def constexprs(layer: Layer, launch_early: bool) -> dict[str, Any]:
    """The kernel's flags, in the order of its signature."""
    return {
        "C1": layer.sources[0],
        "C_OUT": layer.out,
        "PRECISION": dot_input_precision(layer.precision),
        "ORDERED_FP32": layer.precision == "fp32",
        "LAUNCH_EARLY": launch_early,
    }


KERNEL = _transposed_convolution_kernel  # for the audit
