"""A convolution as one matrix product: a program makes BLOCK_N pixels × BLOCK_O channels of the result.

The sum goes through the rows of the weights: tap after tap, in each the channels of the first source and of the
second, then the channels of the shortcut; BLOCK_I of them are one step of one loop. Which tensor a step reads is a
choice between base pointers, so nothing is concatenated and the shortcut needs no pass of its own. There is no
prologue: tiles go from memory to the dot as they are. With BLOCK_N < 64 the dot is mma.sync on Hopper, which suits
one frame (few, small tiles; `num_stages` beyond the number of steps asks for everything at once), with more it is
wgmma on shared memory.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fastjepa.kernels.convolution.layer import Layer
from fastjepa.kernels.convolution.operands import Operands, channels, dot_input_precision
from fastjepa.kernels.convolution.tile import after_the_kernel_before, finish, frame_of, window_of
from fastjepa.kernels.launch import LaunchConfig, add_dot, launch_kernel


@triton.jit
def _convolution_gemm_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (n_frames, height, width, C1)
    x2_ptr,  # (n_frames, height, width, C2) or None
    shortcut_ptr,  # (n_frames, shortcut_height, shortcut_width, S1) or None
    shortcut2_ptr,  # (n_frames, shortcut_height, shortcut_width, S2) or None
    residual_ptr,  # (n_frames, out_height, out_width, C_OUT) or None
    out_ptr,  # (n_frames, out_height, out_width, HEAD or C_OUT)
    weight_ptr,  # (TAPS·(C1 + C2) + S1 + S2, C_OUT)
    bias_ptr,  # (C_OUT,) or None
    head_weight_ptr,  # (C_OUT, HEAD) or None
    head_bias_ptr,  # (HEAD,) or None
    n_frames,
    height,
    width,
    shortcut_height,
    shortcut_width,
    out_height,
    out_width,
    C1: tl.constexpr,
    C2: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    C_OUT: tl.constexpr,
    HEAD: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    SHORTCUT_STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    ORDERED_FP32: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # Steps of the loop: of the first source, of a tap, of the first source of the shortcut, of the shortcut.
    STEPS1: tl.constexpr = (C1 + BLOCK_I - 1) // BLOCK_I
    STEPS: tl.constexpr = STEPS1 + (C2 + BLOCK_I - 1) // BLOCK_I
    SHORTCUT_STEPS1: tl.constexpr = (S1 + BLOCK_I - 1) // BLOCK_I
    SHORTCUT_STEPS: tl.constexpr = SHORTCUT_STEPS1 + (S2 + BLOCK_I - 1) // BLOCK_I
    # Whether steps are whole blocks of channels, so that step t reads the rows t·BLOCK_I … of the weights.
    EVEN_I: tl.constexpr = C1 % BLOCK_I + C2 % BLOCK_I + S1 % BLOCK_I + S2 % BLOCK_I == 0
    EVEN_O: tl.constexpr = C_OUT % BLOCK_O == 0

    n_pixels = out_height * out_width
    first = tl.program_id(0) * BLOCK_N
    frame, pixel = frame_of(first, n_pixels)
    offs_n = pixel + tl.arange(0, BLOCK_N)
    mask_n = first + tl.arange(0, BLOCK_N) < n_frames * n_pixels
    corner, inside = window_of(offs_n, mask_n, height, width, out_height, out_width, TAPS, STRIDE)
    offs_i = tl.arange(0, BLOCK_I)
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_o = offs_o < C_OUT

    x_ptr += frame * (height * width) * C1
    if C2 > 0:
        x2_ptr += frame * (height * width) * C2
    if S1 > 0:
        shortcut_ptr += frame * (shortcut_height * shortcut_width) * S1
        # The pixels that the shortcut visits: its first tap is its only one.
        visited = offs_n // n_pixels * shortcut_height + offs_n // out_width % out_height * SHORTCUT_STRIDE
        visited = visited * shortcut_width + offs_n % out_width * SHORTCUT_STRIDE
    if S2 > 0:
        shortcut2_ptr += frame * (shortcut_height * shortcut_width) * S2
    weight_ptrs = weight_ptr + offs_i[:, None] * C_OUT + offs_o[None, :]
    after_the_kernel_before(LAUNCH_EARLY)

    acc = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for step in range(TAPS * STEPS + SHORTCUT_STEPS):
        tap = tl.minimum(step // STEPS, TAPS)
        block = step - tap * STEPS
        base, n_channels, start, row = x_ptr, C1, block * BLOCK_I, tap * (C1 + C2)
        if C2 > 0:
            second = block >= STEPS1
            base = tl.where(second, x2_ptr, x_ptr)
            start = tl.where(second, start - STEPS1 * BLOCK_I, start)
            row += tl.where(second, C1, 0)
            if C1 != C2:
                n_channels = tl.where(second, C2, C1)
        offs = (corner + (tap // 3 * width + tap % 3)) * n_channels
        if S1 > 0:
            of_shortcut = tap == TAPS
            shortcut_base, shortcut_start, n_shortcut = shortcut_ptr, block * BLOCK_I, S1
            shortcut_row = TAPS * (C1 + C2)
            if S2 > 0:
                second = block >= SHORTCUT_STEPS1
                shortcut_base = tl.where(second, shortcut2_ptr, shortcut_ptr)
                shortcut_start = tl.where(second, shortcut_start - SHORTCUT_STEPS1 * BLOCK_I, shortcut_start)
                shortcut_row += tl.where(second, S1, 0)
                if S1 != S2:
                    n_shortcut = tl.where(second, S2, S1)
            base = tl.where(of_shortcut, shortcut_base, base)
            start = tl.where(of_shortcut, shortcut_start, start)
            row = tl.where(of_shortcut, shortcut_row, row)
            offs = tl.where(of_shortcut, visited * n_shortcut, offs)
            n_channels = tl.where(of_shortcut, n_shortcut, n_channels)
            if C1 % 16 + C2 % 16 + S1 % 16 + S2 % 16 == 0:
                offs = tl.multiple_of(offs, 16)  # Triton 3.9 loses it in the select, and loads two bytes at a time
        mask = ((inside >> tap) & 1 != 0)[:, None]
        if EVEN_I:
            weight_row = step * BLOCK_I
        else:
            weight_row = row + start
            mask_i = start + offs_i < n_channels
            mask = mask & mask_i[None, :]
        x = tl.load(base + (offs + start)[:, None] + offs_i[None, :], mask=mask, other=0.0)
        ptrs = weight_ptrs + weight_row * C_OUT
        if EVEN_I and EVEN_O:
            weight = tl.load(ptrs)
        elif EVEN_I:
            weight = tl.load(ptrs, mask=mask_o[None, :], other=0.0)
        else:
            weight = tl.load(ptrs, mask=mask_i[:, None] & mask_o[None, :], other=0.0)
        acc = add_dot(acc, x, weight, PRECISION, ORDERED_FP32)

    if residual_ptr is not None:
        residual_ptr += frame * n_pixels * C_OUT
    out_ptr += frame * n_pixels * (HEAD if HEAD > 0 else C_OUT)
    finish(
        acc, residual_ptr, out_ptr, bias_ptr, head_weight_ptr, head_bias_ptr, offs_n, offs_o, mask_n,
        C_OUT, HEAD, RELU, PRECISION, BLOCK_D,
    )  # fmt: skip


def grid(layer: Layer, config: LaunchConfig) -> tuple[int, int]:
    """Programs by tiles of pixels and of channels."""
    return triton.cdiv(layer.pixels, config.blocks["BLOCK_N"]), triton.cdiv(layer.out, config.blocks["BLOCK_O"])


def launch(operands: Operands, config: LaunchConfig) -> None:
    """Launch it. Any channels, sizes and epilogue; with a head BLOCK_O must hold all output channels."""
    layer = operands.layer
    launch_kernel(
        _convolution_gemm_kernel,
        grid(layer, config),
        config,
        **operands.pointers(),
        **operands.sizes(),
        **constexprs(layer, operands.relu, config.launch_pdl),
    )


def constexprs(layer: Layer, relu: bool, launch_early: bool) -> dict[str, Any]:
    """The kernel's flags, in the order of its signature."""
    return {
        **channels(layer),
        "TAPS": layer.kernel_size**2,
        "STRIDE": layer.stride,
        "SHORTCUT_STRIDE": layer.shortcut_stride,
        "RELU": relu,
        "PRECISION": dot_input_precision(layer.precision),
        "ORDERED_FP32": layer.precision == "fp32",
        "LAUNCH_EARLY": launch_early,
    }


KERNEL = _convolution_gemm_kernel  # for the audit
