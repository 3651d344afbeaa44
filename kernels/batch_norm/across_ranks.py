"""Statistics and sums of gradients over the rows of several ranks: each rank's passes, one collective, a merge.

Each rank merges the partials of its own programs. What it has then, of every channel, is

    forward    its pivot x₀ (`statistics`), its mean − x₀, its M2         (BatchNorms, 3, C)
    backward   Σ g, Σ g·x̂ [, Σ g·r̂]                                        (2 or 3, C)

in fp32, which is gathered and merged in the order of the ranks. Means are merged relative to the first rank's pivot,
x₀ᵢ − x₀₁ + (meanᵢ − x₀ᵢ): exact for values near each other, as within a rank. A rank that has no rows of its own has no
part in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastjepa.kernels.batch_norm.merge import Partials, RunningStatistics, merge_partials
from fastjepa.kernels.batch_norm.statistics import check_running_statistics, statistics_partials
from fastjepa.kernels.batch_norm.tiling import check_rows
from fastjepa.kernels.shares import Shares


def statistics_across_ranks(
    op: str, normalised: Sequence[tuple[Tensor, RunningStatistics]], shares: Shares
) -> list[tuple[Tensor, Tensor]]:
    """`batch_norm_statistics` of the rows of all ranks, for one BatchNorm or two; one collective.

    Args:
        op: what an error names.
        normalised: of each BatchNorm this rank's rows (n_rows, n_channels) of its input, all of one shape, and the
            buffers that are moved by the statistics of all rows.
        shares: which part of the rows is whose; 2 rows or more in all.

    Returns:
        mean and biased variance, each (n_channels,) fp32, for each BatchNorm: the same bits on every rank.
    """
    own = []
    for rows, running in normalised:
        n_rows, _ = check_rows(op, rows)
        check_running_statistics(op, rows, running)
        mean, var = merge_partials(statistics_partials(rows, rows[0]), n_rows)
        own.append(torch.stack((rows[0].to(torch.float32), mean, var * n_rows)))
    parts = shares.filled(shares.gather(torch.stack(own)))
    counts = shares.filled(shares.weights(n_rows, parts))
    pivots, means, m2s = parts.unbind(2)
    # (BatchNorms, parts, C): what one merge reads is contiguous.
    means = (means + (pivots - pivots[0])).transpose(0, 1).contiguous()
    m2s = m2s.transpose(0, 1).contiguous()
    return [
        merge_partials(
            Partials(means[i], m2s[i], rows_per_part=n_rows),
            sum(shares.rows(n_rows)),
            pivot=pivots[0, i],
            counts=counts,
            running=running,
        )
        for i, (_, running) in enumerate(normalised)
    ]


def sums_across_ranks(sums: Tensor, n_rows: int, shares: Shares) -> Tensor:
    """What the second pass of the backward reads, (2 or 3, n_channels) fp32; one collective.

    Args:
        sums: (2 or 4, n_channels), of `reduce_gradients`, over this rank's rows.
        n_rows: of this rank. The pass divides by it, and what it is to have are means over all ranks' rows.
        shares: which part of the rows is whose.
    """
    of_all = shares.sum(sums[:3])  # the fourth, of a normalised residual, is the first again
    return of_all * (n_rows / sum(shares.rows(n_rows)))
