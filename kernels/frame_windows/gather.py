"""The op `fastjepa::gather_frames`: gradients of states from those of the windows that hold them, in one pass.

State t stands at place i of window t - i, so its gradient is

    ∂t = ∂states[t] + Σᵢ ∂windows[t - i][i·D : (i + 1)·D] (+ ∂head[t] for t < c),

added in fp32 and rounded once, where the backward passes of slicing and concatenation would write a tensor of zeros for
each term, in another layout, and add them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjepa.kernels.checks import check_tensor, require_available
from fastjepa.kernels.launch import (
    TRITON_TYPE,
    AuditCase,
    LaunchConfig,
    audit_signature,
    kernel_op,
    launch_kernel,
    round_to,
)

_OP = "gather_frames"


@triton.jit
def _gather_frames_kernel(  # type: ignore[no-untyped-def]
    windows_ptr,  # (n_batch, n_frames - CONTEXT + 1, n_pixels, CONTEXT·n_channels) or None
    states_ptr,  # (n_batch, n_frames, n_pixels, n_channels) or None
    head_ptr,  # (n_batch, CONTEXT, n_pixels, n_channels) or None
    grad_head_ptr,  # (n_batch, CONTEXT, n_pixels, n_channels) or None: the first states' gradients, if SPLIT
    grad_ptr,  # (n_batch, n_frames, ...); if SPLIT, those of the states CONTEXT, …, and a last frame of zeros
    n_frames,
    n_pixels,
    n_channels,
    CONTEXT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: a tile of pixels of one state. Indices of whole frames are int64.
    n_steps = n_frames + 1 if SPLIT else n_frames
    batch = (tl.program_id(0) // n_steps).to(tl.int64)
    t = tl.program_id(0) % n_steps
    n_windows = n_frames - CONTEXT + 1
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_n < n_pixels)[:, None] & (offs_c < n_channels)[None, :]
    offs = offs_n[:, None] * n_channels + offs_c[None, :]
    frame_size = n_pixels * n_channels

    # Not mask & (t < …): a scalar comparison becomes an int32 in the interpreter, of which triton 3.9 takes no mask.
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    if windows_ptr is not None:
        for i in tl.static_range(CONTEXT):
            window = t - i
            there = tl.where((window >= 0) & (window < n_windows) & (t < n_frames), mask, False)
            ptrs = windows_ptr + (batch * n_windows + window) * CONTEXT * frame_size
            ptrs += offs_n[:, None] * (CONTEXT * n_channels) + (i * n_channels + offs_c)[None, :]
            total += tl.load(ptrs, mask=there, other=0.0).to(tl.float32)
    if states_ptr is not None:
        ptrs = states_ptr + (batch * n_frames + t) * frame_size + offs
        total += tl.load(ptrs, mask=tl.where(t < n_frames, mask, False), other=0.0).to(tl.float32)
    if head_ptr is not None:
        ptrs = head_ptr + (batch * CONTEXT + t) * frame_size + offs
        total += tl.load(ptrs, mask=tl.where(t < CONTEXT, mask, False), other=0.0).to(tl.float32)
    total = round_to(total, grad_ptr.dtype.element_ty)
    if SPLIT:
        ptrs = grad_head_ptr + (batch * CONTEXT + t) * frame_size + offs
        tl.store(ptrs, total, mask=tl.where(t < CONTEXT, mask, False))
        ptrs = grad_ptr + (batch * (n_steps - CONTEXT) + t - CONTEXT) * frame_size + offs
        tl.store(ptrs, total, mask=tl.where(t >= CONTEXT, mask, False))
    else:
        tl.store(grad_ptr + (batch * n_frames + t) * frame_size + offs, total, mask=mask)


# A tile is 8 KB: at 16 channels of bf16 two 128-bit loads for each of 128 threads and source, and 1 MB of a frame's
# 64×64 pixels are 16 programs. Chosen from compiled code, not yet measured.
_TILE_BYTES = 8192
_MAX_BLOCK_C = 64


def _config(n_channels: int, dtype: torch.dtype) -> LaunchConfig:
    # A number, also where torch.compile has a symbol.
    block_c = min(triton.next_power_of_2(int(n_channels)), _MAX_BLOCK_C)
    return LaunchConfig(blocks={"BLOCK_N": _TILE_BYTES // (dtype.itemsize * block_c), "BLOCK_C": block_c})


def _grid(n_states: int, n_pixels: int, n_channels: int, config: LaunchConfig) -> tuple[int, int, int]:
    blocks = config.blocks
    return n_states, triton.cdiv(n_pixels, blocks["BLOCK_N"]), triton.cdiv(n_channels, blocks["BLOCK_C"])


def _fake(
    windows: Tensor | None, states: Tensor | None, head: Tensor | None, n_frames: int, context: int, split: bool
) -> tuple[Tensor, Tensor]:
    like = states if windows is None else windows
    assert like is not None
    B, _, P, D = like.shape
    if windows is not None:
        D = D // context
    n_head, n_rest = (context, n_frames - context + 1) if split else (0, n_frames)
    return like.new_empty(B, n_head, P, D), like.new_empty(B, n_rest, P, D)


@kernel_op("fastjepa::gather_frames", fake=_fake)
def gather_frames(
    windows: Tensor | None, states: Tensor | None, head: Tensor | None, n_frames: int, context: int, split: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of T states from those of their windows. Not differentiable.

    Args:
        windows: the windows' gradient (B, T - c + 1, P, c·D) for P pixels, contiguous, fp32, bf16 or fp16; or None.
        states: what else the states have as gradient, (B, T, P, D) like it; None only if there are windows.
        head: what else the first c states have, (B, c, P, D), or None.
        n_frames: T.
        context: c.
        split: whether the first c states and the others are to be told apart, the others as a predictor gives them:
            with one frame more at the end, whose gradient is 0.

    Returns:
        (B, c, P, D) and (B, T - c + 1, P, D) if `split`, else (B, 0, P, D) and (B, T, P, D).

    Raises:
        RuntimeError: the kernels cannot run on this device.
        TypeError, ValueError: an argument of another dtype, shape or layout; the message names it.
    """
    like, D = states, -1
    if windows is not None:
        check_tensor(_OP, "windows", windows, shape=(None, n_frames - context + 1, None, None), contiguous=True)
        if windows.shape[3] % context:
            raise ValueError(
                f"{_OP}: windows has {windows.shape[3]} channels; accepted: a multiple of context = {context}"
            )
        like, D = windows, windows.shape[3] // context
    elif states is not None:
        check_tensor(_OP, "states", states, shape=(None,) * 4, contiguous=True)
        D = states.shape[3]
    if like is None:
        raise ValueError(f"{_OP}: windows and states are both None; accepted: at least one of them")
    require_available(_OP, like.device)
    B, _, P, _ = like.shape
    for name, tensor, frames in (("states", states, n_frames), ("head", head, context)):
        if tensor is not None:
            check_tensor(
                _OP, name, tensor, shape=(B, frames, P, D), dtypes=(like.dtype,), device=like.device, contiguous=True
            )
    grad_head, grad = _fake(windows, states, head, n_frames, context, split)
    config = _config(D, like.dtype)
    launch_kernel(
        _gather_frames_kernel,
        _grid(B * (n_frames + split), P, D, config),
        config,
        windows_ptr=windows,
        states_ptr=states,
        head_ptr=head,
        grad_head_ptr=grad_head if split else None,
        grad_ptr=grad,
        n_frames=n_frames,
        n_pixels=P,
        n_channels=D,
        CONTEXT=context,
        SPLIT=split,
    )
    return grad_head, grad


def audit_cases() -> list[AuditCase]:
    """The states' own gradient, and that of a sequence, at the default recipe's shapes."""
    B, T, P, D, c = 64, 10, 64 * 64, 16, 2
    kernel = _gather_frames_kernel
    in_dtype = ("windows_ptr", "states_ptr", "head_ptr", "grad_head_ptr", "grad_ptr")
    cases = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # (case, frames read besides the windows, frames written, absent pointers)
        forms: list[tuple[str, int, int, tuple[str, ...]]] = [
            ("states", T + c, T, ("grad_head_ptr",)),
            ("sequence", T, T + 1, ("head_ptr",)),
        ]
        for name, read, written, absent in forms:
            config = _config(D, dtype)
            cases.append(
                AuditCase(
                    name=f"gather_frames/{name}/{TRITON_TYPE[dtype]}/{B}x{T}x{P}x{D}",
                    kernel=kernel,
                    signature=audit_signature(kernel, dtype, in_dtype, absent),
                    constexprs={**dict.fromkeys(absent), "CONTEXT": c, "SPLIT": name == "sequence"},
                    config=config,
                    bytes_moved=B * P * D * ((T - c + 1) * c + read + written) * dtype.itemsize,
                    flops=3 * B * P * D * T,
                    divisible_by_16=("n_pixels", "n_channels"),
                    programs=math.prod(_grid(B * (T + (name == "sequence")), P, D, config)),
                )
            )
    return cases
