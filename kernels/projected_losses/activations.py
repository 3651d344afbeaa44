"""The projector's hidden activations r = relu(A(x − μ) + β), recomputed on chip from rows x.

    N rows  T = 1+K tensors (t = 0: the state z; t = 1..K: predictions)  D channels  H hidden features

A and the centre of each tensor come from its own batch statistics (`hidden_affine`).

Precision. bf16 rows enter the dot as they are, with A as the sum of two bf16 matrices, so that r is nearly exact; fp32
rows are centred first (an exact subtraction where the mean is large) and the dot is "tf32x3", of `parts`. What later
dots read is rounded to bf16, or split again; every sum is fp32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastjepa.kernels.launch import LaunchConfig, dot, load_rows
from fastjepa.kernels.projected_losses.parts import dot_matrix, parts_of_rows

MAX_D = 64
MAX_HIDDEN = 128
MAX_PROGRAMS = 528  # 4 for each of 132 multiprocessors; 8.6 MB of partials for each matrix of 64 hidden features


@triton.jit
def hidden_activations(  # type: ignore[no-untyped-def]
    x_ptr,  # (n_rows, D)
    centre_ptr,  # (2, BLOCK_D) fp32: μ as a sum of two
    slope_ptr,  # (2, BLOCK_D, BLOCK_H): Aᵀ as a sum of two
    offset_ptr,  # (BLOCK_H,) fp32
    offs_n,
    n_rows,
    D: tl.constexpr,
    EVEN_N: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """(x − μ in the two `parts_of_rows`, relu(y) in fp32) of one tile of rows."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_h = tl.arange(0, BLOCK_H)
    offs_dh = offs_d[:, None] * BLOCK_H + offs_h[None, :]
    x = load_rows(x_ptr, offs_n, offs_d, n_rows, D, EVEN_N, D == BLOCK_D)
    # Exact where |μ| is large beside the deviations: the first difference is, and the second term is tiny.
    centred = x.to(tl.float32) - tl.load(centre_ptr + offs_d)[None, :]
    centred -= tl.load(centre_ptr + BLOCK_D + offs_d)[None, :]
    high, low = parts_of_rows(centred, x_ptr.dtype.element_ty)
    y = tl.broadcast_to(tl.load(offset_ptr + offs_h)[None, :], [BLOCK_N, BLOCK_H])
    if HALF:
        y = dot(x, tl.load(slope_ptr + BLOCK_D * BLOCK_H + offs_dh), y, "ieee")
        y = dot(x, tl.load(slope_ptr + offs_dh), y, "ieee")
    else:
        y = dot_matrix(high, low, slope_ptr + offs_dh, BLOCK_D * BLOCK_H, y, HALF)
    return high, low, tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as torch's relu


class Operands(NamedTuple):
    """Each tensor's map to the hidden features, padded and rounded as the kernels read it."""

    centre: Tensor  # (T, 2, BLOCK_D) fp32: μ as a sum of two
    slope: Tensor  # (T, 2, BLOCK_D, BLOCK_H) in the rows' dtype: Aᵀ as a sum of two
    offset: Tensor  # (T, BLOCK_H) fp32: what y is where the dot is 0

    def pointers(self, name: str, tensors: int | slice | None) -> dict[str, Tensor | None]:
        """`centre_{name}_ptr` and so on: the operands of one tensor, of some, or None."""
        fields = self._asdict().items()
        return {f"{field}_{name}_ptr": None if tensors is None else of_all[tensors] for field, of_all in fields}


def block_sizes(n_channels: int, n_hidden: int) -> tuple[int, int]:
    """(BLOCK_D, BLOCK_H): sizes padded to powers of two that tensor cores take; numbers, also under torch.compile."""
    block_d = max(16, triton.next_power_of_2(int(n_channels)))
    return block_d, 64 if n_hidden <= 64 else 128


def with_block_d(config: LaunchConfig, block_d: int) -> LaunchConfig:
    """An entry of a launch table with BLOCK_D, which follows from the rows, where the kernels' signatures have it."""
    blocks = {"BLOCK_N": config.blocks["BLOCK_N"], "BLOCK_D": block_d, "BLOCK_H": config.blocks["BLOCK_H"]}
    return replace(config, blocks=blocks)
