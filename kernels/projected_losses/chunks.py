"""How the closed form walks over the pixels, and sums over many of them that keep their precision.

On a CPU chunks are small, so that their temporaries stay in cache, and threads share them. Everywhere else an operation
is a launch, on the stream of the thread that makes it: chunks are few and large, and one thread walks over them.

A sum over more than `BLOCK` pixels is the sum, in float64, of sums over blocks. So a large chunk is as exact as many
small ones, however a library adds up a block, and a product with few rows and millions of columns is a batch of
products that fills a GPU. Libraries differ: on an H100 and on some CPUs 2048 terms are added one after the other, which
put the gradient of weight2 1.3e-5 of its largest entry off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastjepa.kernels.projected_losses.chunk_pool import map_groups
from fastjepa.kernels.projected_losses.reference import as_rows

Item = TypeVar("Item")
Result = TypeVar("Result")

SMALL = 2048  # pixels: a CPU's chunk; its three (hidden, chunk) temporaries take 1.5 MB at 64 features in fp32
LARGE = 2**19  # pixels: 134 MB a temporary, of which five are alive at most; the default recipe (batch 64) has 5 chunks
BLOCK = 128  # pixels that a library adds up
ALL = 2**62  # the compiler that sees the operations on all pixels at once plans their memory itself


class Chunking(NamedTuple):
    """How many pixels a chunk has at most, and whether a pool of threads works on chunks."""

    most: int
    threads: bool

    def map(self, function: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> list[Result]:
        """`function` of all items at once, or, where threads share them, of each group of them, in order."""
        return map_groups(function, items) if self.threads else [function(items)]


def chunking_for(device_type: str, *, compiling: bool) -> Chunking:
    """The choice for a device of that type; `compiling`: whether torch.compile is tracing."""
    if device_type == "cpu":
        return Chunking(SMALL, threads=True)
    return Chunking(ALL if compiling else LARGE, threads=False)


# -- Layout: a tensor is a list of (D, L) matrices, one per batch entry or one in all, in whatever memory order it has


def same_layout(tensors: Sequence[Tensor], chunking: Chunking) -> list[Tensor]:
    """The tensors, so that all can be walked in the same order without copying; else their rows, (N, D)."""
    # Counted, not asked with all(): a generator that stops early is one that torch.compile of torch 2.15 cannot close.
    if sum([x.movedim(1, -1).is_contiguous() for x in tensors]) == len(tensors):
        return [as_rows(x) for x in tensors]
    first = tensors[0]
    long_maps = first.dim() > 2 and (first.shape[0] == 1 or first[0, 0].numel() >= chunking.most)
    if long_maps and sum([x.is_contiguous() for x in tensors]) == len(tensors):
        return list(tensors)
    return [as_rows(x).contiguous() for x in tensors]


def columns(x: Tensor, chunking: Chunking) -> list[Tensor]:
    """All pixels of a tensor that `same_layout` returned, as views (D, L), L ≤ `chunking.most`."""
    matrices = [x.T] if x.dim() == 2 else x.flatten(2).unbind(0)
    length = matrices[0].shape[1]
    pieces = -(-length // chunking.most)
    if pieces == 1:
        return list(matrices)
    blocks = -(-length // (pieces * BLOCK))
    return [chunk for matrix in matrices for chunk in matrix.split(blocks * BLOCK, dim=1)]


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Rows (N, D) as a tensor of the shape of `like`, (B, D, ...)."""
    shape = (like.shape[0], *like.shape[2:], like.shape[1])
    return rows.view(shape).movedim(-1, 1)


# -- Sums over the pixels of a chunk


def row_sums(x: Tensor) -> Tensor:
    """Σ over the columns of (R, L), in float64: (R,)."""
    n_blocks, rest = divmod(x.shape[1], BLOCK)
    if n_blocks == 0 or (n_blocks == 1 and rest == 0):
        return x.sum(1).double()
    total = _blocks(x, n_blocks).sum(2).sum(0, dtype=torch.float64)
    return total + x[:, -rest:].sum(1) if rest else total


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """a·bᵀ of (R, L) and (S, L), the sum over L in float64: (R, S).

    Products within a block are at the precision that torch has for those of a's dtype: with
    `torch.backends.cuda.matmul.allow_tf32`, those of fp32 are TF32, here as in eager.
    """
    n_blocks, rest = divmod(a.shape[1], BLOCK)
    if n_blocks == 0 or (n_blocks == 1 and rest == 0):
        return (a @ b.T).double()
    total = torch.bmm(_blocks(a, n_blocks), _blocks(b, n_blocks).mT).sum(0, dtype=torch.float64)
    return total + a[:, -rest:] @ b[:, -rest:].T if rest else total


def _blocks(x: Tensor, n_blocks: int) -> Tensor:
    """The first blocks of (R, L) as a view (n_blocks, R, BLOCK)."""
    return x[:, : n_blocks * BLOCK].unflatten(1, (n_blocks, BLOCK)).transpose(0, 1)
