"""A training step's batch among several processes, as `model.losses.Group` describes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from fastjepa.distributed.batch_norm import global_statistics
from fastjepa.distributed.losses import global_mean, global_std_and_cov_loss
from fastjepa.distributed.ranks import Ranks
from fastjepa.kernels.shares import Shares


class BatchGroup:
    """The processes `ranks` as what a `TrainStep` takes as its `group`.

    Args:
        ranks: the processes, of which each has a step of the same JEPA.
        sync_stats: BatchNorm and the losses take the statistics of the whole batch, so that N processes compute what
            one would; False: each process those of its own part, as plain data parallel training does, with gradients
            and losses averaged by how many clips each has.
    """

    def __init__(self, ranks: Ranks, *, sync_stats: bool = True) -> None:
        self.ranks = ranks
        self.sync_stats = sync_stats
        self._shares: Shares | None = None

    @classmethod
    def of(cls, ranks: Ranks, *, sync_stats: bool = True) -> BatchGroup | None:
        """The group of these processes; None for a process alone."""
        return None if ranks.alone else cls(ranks, sync_stats=sync_stats)

    @contextmanager
    def batch(self, own: int, clips: int | None) -> Iterator[None]:
        """As `Group.batch`."""
        ranks = self.ranks
        self._shares = shares = ranks.shares(own * ranks.size if clips is None else clips)
        if shares is not None and own != max(1, shares.counts[ranks.rank]):
            raise ValueError(
                f"video has {own} clips, and of {clips} clips on {ranks.size} processes {shares.counts[ranks.rank]} "
                f"are those of process {ranks.rank} (where it has none, it takes one that is not its own)"
            )
        with global_statistics(shares if self.sync_stats else None):
            yield

    def mean(self, means: Tensor) -> Tensor:
        """As `Group.mean`, of the last batch."""
        return means if self._shares is None else global_mean(means, self._shares)

    def std_and_cov_loss(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """As `Group.std_and_cov_loss`, of the last batch."""
        assert self._shares is not None, "there are several processes"
        return global_std_and_cov_loss(features, self._shares)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """As `Group.sum_gradients`; raises LostRanksError if another process has ended or does not answer."""
        self.ranks.sum_gradients(parameters, drop_own=self._shares is not None and self._shares.empty)
