"""What the kernels share: which pixels a tile has, and what is done with its sums before they are stored."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastjepa.kernels.batch_norm.relu import apply_relu
from fastjepa.kernels.launch import INTERPRET, dot, round_to

_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def frame_of(first, n_pixels):  # type: ignore[no-untyped-def]
    """(frame, pixel in it) of the pixel `first`, of frames with `n_pixels` each.

    Offsets are counted from that frame on, so that they fit 32 bits; the frame, whose offset may not, is an int64.
    """
    frame = first // n_pixels
    return frame.to(tl.int64), first - frame * n_pixels


@triton.jit
def window_of(  # type: ignore[no-untyped-def]
    offs_n, mask_n, height, width, out_height, out_width, TAPS: tl.constexpr, STRIDE: tl.constexpr
):
    """Of output pixels, counted from the start of a frame: the input pixel under the first tap (which may lie outside),
    and a bit for each tap that lies inside the map; the bit after those is set for every pixel that exists.
    """
    PADDING: tl.constexpr = 1 if TAPS == 9 else 0
    row = (offs_n // out_width) % out_height * STRIDE - PADDING
    column = offs_n % out_width * STRIDE - PADDING
    inside = tl.where(mask_n, (2 << TAPS) - 1, 0)
    if TAPS == 9:
        rows = tl.where(mask_n, 1 << TAPS, 0)
        columns = rows
        # The taps 3·place … 3·place + 2 are in one row; place, place + 3 and place + 6 are in one column.
        for place in tl.static_range(3):
            rows |= tl.where((row + place >= 0) & (row + place < height), 7 << (3 * place), 0)
            columns |= tl.where((column + place >= 0) & (column + place < width), 73 << place, 0)
        inside &= rows & columns
    return (offs_n // (out_width * out_height) * height + row) * width + column, inside


@triton.jit
def after_the_kernel_before(LAUNCH_EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """With LAUNCH_EARLY (programmatic dependent launch): what stands above this ran while the kernel before was still
    finishing; what stands below waits for its results, and lets the next kernel begin.
    """
    if LAUNCH_EARLY and not _INTERPRET:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    acc,
    residual_ptr,  # (rows, C_OUT) or None
    out_ptr,  # (rows, HEAD or C_OUT)
    bias_ptr,  # (C_OUT,) or None
    head_weight_ptr,  # (C_OUT, HEAD) or None
    head_bias_ptr,  # (HEAD,) or None
    offs_n,
    offs_o,
    mask_n,
    C_OUT: tl.constexpr,
    HEAD: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Bias, residual, ReLU, head and cast of the sums (BLOCK_N, BLOCK_O), in that order, each where there is one, and
    the store to rows `offs_n`.
    """
    mask_o = offs_o < C_OUT
    mask = mask_n[:, None] & mask_o[None, :]
    offs = offs_n[:, None] * C_OUT + offs_o[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_o, mask=mask_o, other=0.0)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        acc = apply_relu(acc)
    if HEAD > 0:
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d < HEAD
        weight_mask = mask_o[:, None] & mask_d[None, :]
        weight = tl.load(head_weight_ptr + offs_o[:, None] * HEAD + offs_d[None, :], mask=weight_mask, other=0.0)
        acc = round_to(acc, head_weight_ptr.dtype.element_ty)
        acc = dot(acc, weight, tl.zeros((acc.shape[0], BLOCK_D), tl.float32), PRECISION)
        if head_bias_ptr is not None:
            acc += tl.load(head_bias_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
        mask = mask_n[:, None] & mask_d[None, :]
        offs = offs_n[:, None] * HEAD + offs_d[None, :]
    tl.store(out_ptr + offs, round_to(acc, out_ptr.dtype.element_ty), mask=mask)
