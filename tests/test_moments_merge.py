"""Partials merged in float64: of the programs of a launch, and of devices that have unequal shares of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from compare import assert_as_exact_as_eager, assert_close_to_truth
from fastjepa.kernels.moments import fused, merge, narrow, reference
from fastjepa.kernels.moments import scatter as scatter_pass

DTYPES = [torch.float32, torch.bfloat16]
WIDE = 1e-12


def draw(*size: int, device: str, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=g, dtype=torch.float64).to(device)


def correlated(n: int, d: int, device: str, seed: int = 0) -> Tensor:
    return draw(n, d, device=device, seed=seed) @ (
        0.5 * torch.eye(d, device=device).double() + 0.3 * draw(d, d, device=device, seed=seed + 1) / d**0.5
    ) + draw(d, device=device, seed=seed + 2)


def moments_of_parts(x: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(P, 1, D), (P, 1, D, D) and (P,) of consecutive parts of rows x in float64."""
    means, scatters = zip(*(reference.moments([part]) for part in x.split(list(counts))), strict=True)
    return torch.stack(means), torch.stack(scatters), torch.tensor(counts, device=x.device).double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [16, 31, 40])
def test_three_devices_with_unequal_shares_have_the_moments_of_all_rows(
    d: int, dtype: torch.dtype, device: str
) -> None:
    counts = [5, 177, 90]
    tensors = [correlated(sum(counts), d, device, seed).to(dtype) for seed in (0, 5)]
    found = [fused.moments([x.split(counts)[rank] for x in tensors]) for rank in range(3)]
    means, scatters = (torch.stack(parts) for parts in zip(*found, strict=True))
    merged = fused.merged_moments(means, scatters, torch.tensor(counts, device=device).double())
    truth, eager = reference.moments([x.double() for x in tensors]), reference.moments(tensors)
    largest = max(float(x.abs().max()) for x in tensors)
    for name, value, e, t in zip(("mean", "scatter"), merged, eager, truth, strict=True):
        scale = largest if name == "mean" else None
        assert_as_exact_as_eager(value.float(), e, t, name, precision=torch.float32, scale=scale)
    assert torch.equal(
        merged[0], fused.merged_moments(means, scatters, torch.tensor(counts, device=device).double())[0]
    )


@pytest.mark.parametrize("counts", [[7], [1, 1], [1, 100, 30], [3] * 70, list(range(1, 150))])
@pytest.mark.parametrize("d", [1, 5, 33])
def test_merged_moments_are_exact_in_float64(d: int, counts: list[int], device: str) -> None:
    x = correlated(sum(counts), d, device)
    mean, scatter = fused.merged_moments(*moments_of_parts(x, counts))
    exact_mean, exact_scatter = reference.moments([x])
    assert_close_to_truth(mean, exact_mean, "mean", limit=WIDE)
    # One row has no scatter.
    assert_close_to_truth(scatter, exact_scatter, "scatter", limit=WIDE)


def test_merged_moments_far_from_zero_and_from_each_other(device: str) -> None:
    """The first part, whose mean is the origin, lies far from the others."""
    counts = [20, 300, 50]
    x = correlated(sum(counts), 6, device) + 1e3
    x[:20] += 1e3
    x[:, 1] = 7.0
    mean, scatter = (m[0] for m in fused.merged_moments(*moments_of_parts(x, counts)))
    exact_mean, exact_scatter = (m[0] for m in reference.moments([x]))
    assert_close_to_truth(mean, exact_mean, "mean", limit=WIDE)
    assert_close_to_truth(scatter, exact_scatter, "scatter", limit=WIDE)
    assert not scatter[1].any()
    assert not scatter[:, 1].any()


@pytest.mark.parametrize("d", [5, 16, 32, 40])
def test_partials_of_many_programs(d: int, device: str) -> None:
    """The last program has fewer rows than the others."""
    x = correlated(1300, d, device).float()
    partials = scatter_pass.scatter_partials([x])
    n_parts = partials.centre.shape[1]
    assert n_parts > 5
    assert 1300 % partials.rows_per_program
    mean, scatter = (m[0] for m in fused.moments([x]))
    # The same parts, with their numbers of rows given.
    counts = [partials.rows_per_program] * (n_parts - 1)
    given = torch.tensor([*counts, 1300 - sum(counts)], device=device).double()
    for value, again in zip(
        (mean, scatter),
        merge.merge_moments(partials.centre, partials.residual, partials.scatter, given, d),
        strict=True,
    ):
        assert torch.equal(value, again[0])
    exact_mean, exact_scatter = (m[0] for m in reference.moments([x.double()]))
    assert_close_to_truth(scatter, exact_scatter, "scatter", limit=1e-6)
    assert ((mean - exact_mean).abs() / x.double().std(0)).max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_nan_spoils_its_own_channel_only(dtype: torch.dtype, device: str) -> None:
    x = correlated(300, 6, device).to(dtype)
    clean = fused.moments([x])
    x[200, 2] = float("nan")
    mean, scatter = fused.moments([x])
    others = torch.tensor([0, 1, 3, 4, 5], device=device)
    assert mean[0, 2].isnan()
    assert scatter[0, 2].isnan().all()
    assert scatter[0, :, 2].isnan().all()
    assert torch.equal(mean[:, others], clean[0][:, others])
    assert torch.equal(scatter[:, others][:, :, others], clean[1][:, others][:, :, others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("groups", "parts", "size"), [(1, 1, 1), (3, 5, 7), (2, 300, 33), (1, 129, 64), (2, 8, 5000)])
def test_sums_over_parts(groups: int, parts: int, size: int, dtype: torch.dtype, device: str) -> None:
    x = draw(groups, parts, size, device=device).to(dtype)
    found = merge.merge_sums(x)
    # Of terms that cancel, a sum is as exact as the largest of them.
    assert (found - x.double().sum(1)).abs().max() <= 1e-15 * parts * float(x.abs().max())
    assert torch.equal(found, merge.merge_sums(x))
    gathered = x.transpose(0, 1).contiguous()  # as devices' tensors are gathered
    assert torch.equal(found, merge.merge_sums(gathered.transpose(0, 1)))


def test_merged_sums_are_those_of_all_devices(device: str) -> None:
    x = draw(3, 2, 5, 4, device=device)
    assert_close_to_truth(fused.merged_sums(x), x.sum(0), "sums", limit=1e-15)
    assert fused.merged_sums(draw(3, device=device)).shape == ()


def test_merges_refuse_what_they_would_get_wrong(device: str) -> None:
    mean, scatter, count = (torch.rand(s, device=device).double() for s in ((3, 2, 4), (3, 2, 4, 4), (3,)))
    bad: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((mean.float(), scatter, count), TypeError, r"merged_moments: mean has dtype torch.float32"),
        ((mean[0], scatter, count), ValueError, r"mean has shape \(2, 4\); accepted: \(any, any, any\)"),
        ((mean, scatter[:, :1], count), ValueError, r"scatter has shape \(3, 1, 4, 4\); accepted: \(3, 2, 4, 4\)"),
        ((mean, scatter.mT, count), ValueError, r"scatter has strides"),
        ((mean, scatter, count[:2]), ValueError, r"count has shape \(2,\); accepted: \(3\)"),
        ((mean, scatter, count.to("meta")), ValueError, r"count is on meta"),
        ((mean[:0], scatter[:0], count[:0]), ValueError, r"mean has shape \(0, 2, 4\); accepted: at least one part"),
    ]
    for arguments, error, message in bad:
        with pytest.raises(error, match=message):
            fused.merged_moments(*arguments)
    for parts, error, message in (
        (mean.float(), TypeError, r"merged_sums: parts has dtype torch.float32"),
        (mean.mT, ValueError, r"parts has strides"),
        (mean[:, :0], ValueError, r"parts has strides|parts has shape"),
        (mean.new_zeros(()), ValueError, r"parts has shape \(\)"),
        (mean.to("meta"), RuntimeError, r"device type 'meta' is not supported"),
    ):
        with pytest.raises(error, match=message):
            fused.merged_sums(parts)


def test_the_narrow_kernel_takes_what_the_wide_one_does_not(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 32 channels, where either could be used, both find the same."""
    x = correlated(260, 32, device).float()
    of_narrow = fused.moments([x])
    exact = reference.moments([x.double()])
    monkeypatch.setattr(scatter_pass, "MAX_NARROW_D", 0)
    monkeypatch.setattr(scatter_pass, "padded_size", lambda _: 64)
    of_wide = fused.moments([x])
    assert not torch.equal(of_narrow[1], of_wide[1])
    for found in (of_narrow, of_wide):
        assert_close_to_truth(found[1], exact[1], "scatter", limit=1e-6)
    assert narrow.MAX_NARROW_D == 32
