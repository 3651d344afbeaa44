"""A convolution of a small map: each of the four warps of a program has a quarter of the sum for the same few outputs.

A map of 8×8 or 16×16 is few tiles for 132 multiprocessors, and a long sum for each. Here a dot of three dimensions,
(warps, pixels, channels) @ (warps, channels, outputs), gives every warp its own steps: warp w takes the steps w, w + 4,
…; the four sums are added in order at the end. There are no atomics and no second launch. Steps are those of `gemm`;
channels of every source must be a multiple of BLOCK_I.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastjepa.kernels.convolution.gemm import constexprs, grid
from fastjepa.kernels.convolution.layer import Layer
from fastjepa.kernels.convolution.operands import Operands
from fastjepa.kernels.convolution.tile import after_the_kernel_before, finish, frame_of, window_of
from fastjepa.kernels.launch import LaunchConfig, add_dot, launch_kernel


@triton.jit
def _convolution_split_k_kernel(  # type: ignore[no-untyped-def]
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
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    tl.static_assert(C1 % BLOCK_I + C2 % BLOCK_I + S1 % BLOCK_I + S2 % BLOCK_I == 0)
    STEPS1: tl.constexpr = C1 // BLOCK_I
    STEPS: tl.constexpr = STEPS1 + C2 // BLOCK_I
    SHORTCUT_STEPS1: tl.constexpr = S1 // BLOCK_I
    ALL_STEPS: tl.constexpr = TAPS * STEPS + SHORTCUT_STEPS1 + S2 // BLOCK_I

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
        visited = offs_n // n_pixels * shortcut_height + offs_n // out_width % out_height * SHORTCUT_STRIDE
        visited = visited * shortcut_width + offs_n % out_width * SHORTCUT_STRIDE
    if S2 > 0:
        shortcut2_ptr += frame * (shortcut_height * shortcut_width) * S2
    warp = tl.arange(0, BLOCK_P)
    weight_ptrs = weight_ptr + (warp[:, None, None] * BLOCK_I + offs_i[None, :, None]) * C_OUT + offs_o[None, None, :]
    after_the_kernel_before(LAUNCH_EARLY)

    acc = tl.zeros((BLOCK_P, BLOCK_N, BLOCK_O), tl.float32)
    for turn in range((ALL_STEPS + BLOCK_P - 1) // BLOCK_P):
        step = turn * BLOCK_P + warp
        tap = tl.minimum(step // STEPS, TAPS)
        block = step - tap * STEPS
        start = block * BLOCK_I
        base = x_ptr + tl.zeros_like(start)
        n_channels = tl.full((BLOCK_P,), C1, tl.int32)
        if C2 > 0:
            base = tl.where(block >= STEPS1, x2_ptr, base)
            n_channels = tl.where(block >= STEPS1, C2, n_channels)
            start = tl.where(block >= STEPS1, start - STEPS1 * BLOCK_I, start)
        offs = (corner[None, :] + (tap // 3 * width + tap % 3)[:, None]) * n_channels[:, None]
        if S1 > 0:
            shortcut_base = shortcut_ptr + tl.zeros_like(start)
            shortcut_start = block * BLOCK_I
            n_shortcut = tl.full((BLOCK_P,), S1, tl.int32)
            if S2 > 0:
                shortcut_base = tl.where(block >= SHORTCUT_STEPS1, shortcut2_ptr, shortcut_base)
                n_shortcut = tl.where(block >= SHORTCUT_STEPS1, S2, n_shortcut)
                shortcut_start = tl.where(
                    block >= SHORTCUT_STEPS1, shortcut_start - SHORTCUT_STEPS1 * BLOCK_I, shortcut_start
                )
            base = tl.where(tap == TAPS, shortcut_base, base)
            start = tl.where(tap == TAPS, shortcut_start, start)
            offs = tl.where((tap == TAPS)[:, None], visited[None, :] * n_shortcut[:, None], offs)
        base = tl.multiple_of(base, 16)  # Triton 3.9 loses these in the selects, and loads two bytes at a time
        start = tl.multiple_of(start, BLOCK_I)
        offs = tl.multiple_of(offs, [16, 16])
        exists = step < ALL_STEPS
        mask = exists[:, None] & ((inside[None, :] >> tap[:, None]) & 1 != 0)
        ptrs = (base[:, None] + (offs + start[:, None]))[:, :, None] + offs_i[None, None, :]
        x = tl.load(ptrs, mask=mask[:, :, None], other=0.0)
        mask = exists[:, None, None] & mask_o[None, None, :]
        weight = tl.load(weight_ptrs + turn * (BLOCK_P * BLOCK_I * C_OUT), mask=mask, other=0.0)
        acc = add_dot(acc, x, weight, PRECISION, ORDERED_FP32)

    if residual_ptr is not None:
        residual_ptr += frame * n_pixels * C_OUT
    out_ptr += frame * n_pixels * (HEAD if HEAD > 0 else C_OUT)
    finish(
        tl.sum(acc, 0), residual_ptr, out_ptr, bias_ptr, head_weight_ptr, head_bias_ptr, offs_n, offs_o, mask_n,
        C_OUT, HEAD, RELU, PRECISION, BLOCK_D,
    )  # fmt: skip


def fits(layer: Layer, block_i: int) -> bool:
    """Whether the kernel takes this layer in steps of `block_i` channels."""
    return not any(channels % block_i for channels in (*layer.sources, *layer.shortcut))


def launch(operands: Operands, config: LaunchConfig) -> None:
    """Launch it: any sizes and epilogue. `config` has as many warps as BLOCK_P says."""
    layer = operands.layer
    if not fits(layer, config.blocks["BLOCK_I"]):
        raise ValueError(f"no steps of {config.blocks['BLOCK_I']} channels fit {layer}")
    launch_kernel(
        _convolution_split_k_kernel,
        grid(layer, config),
        config,
        **operands.pointers(),
        **operands.sizes(),
        **constexprs(layer, operands.relu, config.launch_pdl),
    )


KERNEL = _convolution_split_k_kernel  # for the audit
