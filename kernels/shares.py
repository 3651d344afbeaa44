"""A batch that lies on several processes ("ranks"): how much of it each has, and what the parts of a statistic become.

Ops that reduce over a batch take an optional `Shares`. Each rank reduces its own rows; what comes out is small, is
gathered from all ranks, and is merged in the order of the ranks: the same bits on each of them. Rows never travel.

A gradient with respect to rows is that of the loss of the whole batch. A gradient with respect to a parameter is a part
of it, whose sum over the ranks is the whole: that sum is the caller's, once for all parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shares:
    """Who has how much of one batch.

    A rank whose count is 0 computes on an entry that is not its own, so that it takes part in everything: of what it
    computes, zeros are gathered, and its gradients are to be dropped.

    Attributes:
        counts: entries of the batch on each rank, 0 or more, in all at least 1.
        rank: of this process, from 0.
        collect: gives the tensors (...) of all ranks, each of this shape and dtype, as one (ranks, ...). Every rank
            calls it, in the same order.

    Raises:
        ValueError: counts that are negative, or all 0; a rank that is not one of theirs.
    """

    counts: tuple[int, ...]
    rank: int
    collect: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 0 or sum(self.counts) < 1:
            raise ValueError(f"counts must be 0 or more of each rank, and 1 or more in all; got {self.counts}")
        if not 0 <= self.rank < len(self.counts):
            raise ValueError(f"rank must be 0 to {len(self.counts) - 1}, one for each of the counts; got {self.rank}")

    @property
    def empty(self) -> bool:
        """Whether this rank has nothing of the batch, and computes on what is not its own."""
        return self.counts[self.rank] == 0

    @property
    def share(self) -> float:
        """The part of the batch that is this rank's, 0 to 1."""
        return self.counts[self.rank] / sum(self.counts)

    def rows(self, own: int) -> tuple[int, ...]:
        """Rows of each rank where this one computes on `own` rows, as many for each entry of the batch as others."""
        per_entry = own // max(1, self.counts[self.rank])
        return tuple(count * per_entry for count in self.counts)

    def weights(self, own: int, like: Tensor) -> Tensor:
        """`rows` as a tensor (ranks,) of the dtype and device of `like`; made there by fills, because a copy from the
        host would wait for a GPU.
        """
        runs = [(rows, len(list(some))) for rows, some in groupby(self.rows(own))]
        return torch.cat([like.new_full((length,), rows) for rows, length in runs])

    def gather(self, tensor: Tensor) -> Tensor:
        """(...) of this rank → (ranks, ...), those of all; zeros for a rank that has nothing of the batch."""
        return self.collect(torch.zeros_like(tensor) if self.empty else tensor)

    def filled(self, of_ranks: Tensor) -> Tensor:
        """Of (ranks, ...) those of the ranks that have something of the batch, in their order."""
        if min(self.counts) > 0:
            return of_ranks
        return torch.stack([of_ranks[rank] for rank, count in enumerate(self.counts) if count > 0])

    def sum(self, tensor: Tensor) -> Tensor:
        """Σ over the ranks of a tensor (...), in their order."""
        return self.gather(tensor).sum(0)

    def once(self, tensor: Tensor) -> Tensor:
        """What every rank has computed of the whole batch, as the part of one of them: zeros on all others. It is the
        first that has something of the batch, because gradients of one that has nothing are dropped.
        """
        first = next(rank for rank, count in enumerate(self.counts) if count > 0)
        return tensor if self.rank == first else torch.zeros_like(tensor)


_current: Shares | None = None


def current_shares() -> Shares | None:
    """Whose statistics an op called now has to use; None: those of its own batch."""
    return _current


@contextmanager
def sharing(shares: Shares | None) -> Iterator[None]:
    """Inside, `current_shares()` is `shares`."""
    global _current
    before, _current = _current, shares
    try:
        yield
    finally:
        _current = before


def refuse_compiled(shares: Shares | None, what: str) -> None:
    """Raise a RuntimeError if torch.compile traces `what` of a batch on several ranks: it cannot see them talk."""
    if shares is not None and torch.compiler.is_compiling():
        raise RuntimeError(f"{what} of a batch on several ranks cannot be compiled; call it outside of torch.compile")
