"""A convolution of stride 1 of many wide frames: a program makes four rows of BLOCK_W columns, and all channels.

Each of the six input rows that it loads, three times, shifted by a column, is an operand of up to three of the four
sums: 18 loads of tiles where four programs of `gemm` have 36. A tile is BLOCK_W columns of one row of BLOCK_N //
BLOCK_W frames. The three shifts of a block of channels follow each other, so that with `num_stages` 1, when loads go
through L1, two of them find their rows there; all rows of a shift are asked for before the first is used, because
without a pipeline nothing else overlaps their latencies. Channels must be a multiple of BLOCK_I, output channels
BLOCK_O.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fastjepa.kernels.convolution.layer import Layer
from fastjepa.kernels.convolution.operands import Operands, channels, dot_input_precision
from fastjepa.kernels.convolution.tile import after_the_kernel_before, finish
from fastjepa.kernels.launch import LaunchConfig, dot, launch_kernel

ROWS = 4


@triton.jit
def finish_row(  # type: ignore[no-untyped-def]
    acc, residual_ptr, out_ptr, bias_ptr, head_weight_ptr, head_bias_ptr, offs_n, offs_o, real, top, row, height, width,
    C_OUT: tl.constexpr, HEAD: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`finish` of the row `top + row`, if there is one."""
    mask_n = tl.where(top + row < height, real, False)
    finish(
        acc, residual_ptr, out_ptr, bias_ptr, head_weight_ptr, head_bias_ptr, offs_n + row * width, offs_o, mask_n,
        C_OUT, HEAD, RELU, PRECISION, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _convolution_strip_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # (n_frames, height, width, C1)
    x2_ptr,  # (n_frames, height, width, C2) or None
    shortcut_ptr,  # (n_frames, height, width, S1) or None
    shortcut2_ptr,  # (n_frames, height, width, S2) or None
    residual_ptr,  # (n_frames, height, width, C_OUT) or None
    out_ptr,  # (n_frames, height, width, HEAD or C_OUT)
    weight_ptr,  # (9·(C1 + C2) + S1 + S2, C_OUT)
    bias_ptr,  # (C_OUT,) or None
    head_weight_ptr,  # (C_OUT, HEAD) or None
    head_bias_ptr,  # (HEAD,) or None
    n_frames,
    height,
    width,
    C1: tl.constexpr,
    C2: tl.constexpr,
    S1: tl.constexpr,
    S2: tl.constexpr,
    C_OUT: tl.constexpr,
    HEAD: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    tl.static_assert(C1 % BLOCK_I + C2 % BLOCK_I + S1 % BLOCK_I + S2 % BLOCK_I == 0 and C_OUT == BLOCK_O)
    STEPS1: tl.constexpr = C1 // BLOCK_I
    STEPS: tl.constexpr = STEPS1 + C2 // BLOCK_I
    SHORTCUT_STEPS1: tl.constexpr = S1 // BLOCK_I
    SHORTCUT_STEPS: tl.constexpr = SHORTCUT_STEPS1 + S2 // BLOCK_I
    TAP: tl.constexpr = (C1 + C2) * C_OUT  # a tap's weights
    FRAMES: tl.constexpr = BLOCK_N // BLOCK_W

    strips = tl.cdiv(width, BLOCK_W)
    tops = tl.cdiv(height, 4)
    column = tl.program_id(0) % strips * BLOCK_W + tl.arange(0, BLOCK_N) % BLOCK_W
    top = tl.program_id(0) // strips % tops * 4
    frame = (tl.program_id(0) // (strips * tops) * FRAMES).to(tl.int64)
    frames = tl.arange(0, BLOCK_N) // BLOCK_W
    real = (column < width) & (frame + frames < n_frames)
    offs_n = (frames * height + top) * width + column  # from the start of the first frame
    offs_i = tl.arange(0, BLOCK_I)
    offs_o = tl.arange(0, BLOCK_O)
    weight_ptrs = weight_ptr + offs_i[:, None] * C_OUT + offs_o[None, :]
    n_pixels = frame * height * width
    x_ptr += n_pixels * C1
    if C2 > 0:
        x2_ptr += n_pixels * C2
    if S1 > 0:
        shortcut_ptr += n_pixels * S1
    if S2 > 0:
        shortcut2_ptr += n_pixels * S2
    after_the_kernel_before(LAUNCH_EARLY)

    acc0 = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    for step in range(3 * STEPS):
        shift = step % 3
        block = step // 3
        base, n_channels, start = x_ptr, C1, block * BLOCK_I
        if C2 > 0:
            second = block >= STEPS1
            base = tl.where(second, x2_ptr, x_ptr)
            start = tl.where(second, start - STEPS1 * BLOCK_I, start)
            if C1 != C2:
                n_channels = tl.where(second, C2, C1)
        there = real & (column + shift >= 1) & (column + shift <= width)
        ptrs = base + ((offs_n + shift - 1) * n_channels + start)[:, None] + offs_i[None, :]
        row = width * n_channels
        of_shift = weight_ptrs + shift * TAP + block * (BLOCK_I * C_OUT)
        weight0 = tl.load(of_shift)
        weight1 = tl.load(of_shift + 3 * TAP)
        weight2 = tl.load(of_shift + 6 * TAP)
        x0 = tl.load(ptrs - row, mask=tl.where(top >= 1, there, False)[:, None], other=0.0)
        x1 = tl.load(ptrs, mask=there[:, None], other=0.0)
        x2 = tl.load(ptrs + row, mask=tl.where(top + 1 < height, there, False)[:, None], other=0.0)
        x3 = tl.load(ptrs + 2 * row, mask=tl.where(top + 2 < height, there, False)[:, None], other=0.0)
        x4 = tl.load(ptrs + 3 * row, mask=tl.where(top + 3 < height, there, False)[:, None], other=0.0)
        x5 = tl.load(ptrs + 4 * row, mask=tl.where(top + 4 < height, there, False)[:, None], other=0.0)
        acc0 = dot(x0, weight0, acc0, PRECISION)
        acc0 = dot(x1, weight1, acc0, PRECISION)
        acc1 = dot(x1, weight0, acc1, PRECISION)
        acc0 = dot(x2, weight2, acc0, PRECISION)
        acc1 = dot(x2, weight1, acc1, PRECISION)
        acc2 = dot(x2, weight0, acc2, PRECISION)
        acc1 = dot(x3, weight2, acc1, PRECISION)
        acc2 = dot(x3, weight1, acc2, PRECISION)
        acc3 = dot(x3, weight0, acc3, PRECISION)
        acc2 = dot(x4, weight2, acc2, PRECISION)
        acc3 = dot(x4, weight1, acc3, PRECISION)
        acc3 = dot(x5, weight2, acc3, PRECISION)
    for step in tl.static_range(SHORTCUT_STEPS):
        base, n_channels, start = shortcut_ptr, S1, step * BLOCK_I
        if step >= SHORTCUT_STEPS1:
            base, n_channels, start = shortcut2_ptr, S2, (step - SHORTCUT_STEPS1) * BLOCK_I
        ptrs = base + (offs_n * n_channels + start)[:, None] + offs_i[None, :]
        row = width * n_channels
        weight = tl.load(weight_ptrs + 9 * TAP + step * (BLOCK_I * C_OUT))
        x0 = tl.load(ptrs, mask=real[:, None], other=0.0)
        x1 = tl.load(ptrs + row, mask=tl.where(top + 1 < height, real, False)[:, None], other=0.0)
        x2 = tl.load(ptrs + 2 * row, mask=tl.where(top + 2 < height, real, False)[:, None], other=0.0)
        x3 = tl.load(ptrs + 3 * row, mask=tl.where(top + 3 < height, real, False)[:, None], other=0.0)
        acc0 = dot(x0, weight, acc0, PRECISION)
        acc1 = dot(x1, weight, acc1, PRECISION)
        acc2 = dot(x2, weight, acc2, PRECISION)
        acc3 = dot(x3, weight, acc3, PRECISION)

    if residual_ptr is not None:
        residual_ptr += n_pixels * C_OUT
    out_ptr += n_pixels * (HEAD if HEAD > 0 else C_OUT)
    finish_row(
        acc0, residual_ptr, out_ptr, bias_ptr, head_weight_ptr, head_bias_ptr, offs_n, offs_o, real, top, 0,
        height, width, C_OUT, HEAD, RELU, PRECISION, BLOCK_D,
    )  # fmt: skip
    finish_row(
        acc1, residual_ptr, out_ptr, bias_ptr, head_weight_ptr, head_bias_ptr, offs_n, offs_o, real, top, 1,
        height, width, C_OUT, HEAD, RELU, PRECISION, BLOCK_D,
    )  # fmt: skip
    finish_row(
        acc2, residual_ptr, out_ptr, bias_ptr, head_weight_ptr, head_bias_ptr, offs_n, offs_o, real, top, 2,
        height, width, C_OUT, HEAD, RELU, PRECISION, BLOCK_D,
    )  # fmt: skip
    finish_row(
        acc3, residual_ptr, out_ptr, bias_ptr, head_weight_ptr, head_bias_ptr, offs_n, offs_o, real, top, 3,
        height, width, C_OUT, HEAD, RELU, PRECISION, BLOCK_D,
    )  # fmt: skip


def fits(layer: Layer, config: LaunchConfig) -> bool:
    """Whether the kernel takes this layer with these blocks."""
    blocks = config.blocks
    return (
        (layer.kernel_size, layer.stride, layer.shortcut_stride) == (3, 1, 1)
        and layer.out == blocks["BLOCK_O"]
        and not any(channels % blocks["BLOCK_I"] for channels in (*layer.sources, *layer.shortcut))
    )


def grid(layer: Layer, config: LaunchConfig) -> tuple[int]:
    """Programs by strips of columns, tops of rows and groups of frames."""
    columns, frames = config.blocks["BLOCK_W"], config.blocks["BLOCK_N"] // config.blocks["BLOCK_W"]
    strips = triton.cdiv(layer.width, columns) * triton.cdiv(layer.height, ROWS)
    return (strips * triton.cdiv(layer.frames, frames),)


def launch(operands: Operands, config: LaunchConfig) -> None:
    """Launch it: any number and size of frames, any epilogue. Raises ValueError for a layer that it does not take."""
    layer = operands.layer
    if not fits(layer, config):
        raise ValueError(f"no strip of {config.blocks} fits {layer}")
    sizes = operands.sizes()
    launch_kernel(
        _convolution_strip_kernel,
        grid(layer, config),
        config,
        **operands.pointers(),
        **{name: sizes[name] for name in ("n_frames", "height", "width")},
        **constexprs(layer, operands.relu, config.launch_pdl),
    )


def constexprs(layer: Layer, relu: bool, launch_early: bool) -> dict[str, Any]:
    """The kernel's flags, in the order of its signature."""
    precision = dot_input_precision(layer.precision)
    return {**channels(layer), "RELU": relu, "PRECISION": precision, "LAUNCH_EARLY": launch_early}


KERNEL = _convolution_strip_kernel  # for the audit
