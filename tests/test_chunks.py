from __future__ import annotations

import pytest
import torch

from compare import assert_close_to_truth
from fastjepa.kernels.projected_losses import chunks
from fastjepa.kernels.projected_losses.chunks import (
    BLOCK,
    LARGE,
    SMALL,
    Chunking,
    chunking_for,
    columns,
    row_products,
    row_sums,
    same_layout,
)


def state(batch: int, *, channels_last: bool = False) -> torch.Tensor:
    """A state of the default recipe: 16 channels, 10 frames of 64×64. It has a shape and strides, and no memory."""
    if channels_last:
        return torch.empty(batch, 10, 64, 64, 16, device="meta").movedim(-1, 1)
    return torch.empty(batch, 16, 10, 64, 64, device="meta")


@pytest.mark.parametrize(("batch", "expected"), [(1, 1), (8, 1), (64, 5), (65, 6), (256, 20)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_on_a_gpu_chunks_are_few_and_large(batch: int, expected: int, channels_last: bool) -> None:
    chunking = chunking_for("cuda", compiling=False)
    assert not chunking.threads
    (x,) = same_layout([state(batch, channels_last=channels_last)], chunking)
    found = columns(x, chunking)
    assert len(found) == expected
    lengths = [chunk.shape[1] for chunk in found]
    assert sum(lengths) == batch * 10 * 64 * 64
    assert max(lengths) <= LARGE
    assert min(lengths) > max(lengths) * 0.9  # no short last one
    (everything,) = columns(x, chunking_for("cuda", compiling=True))
    assert everything.shape == (16, batch * 10 * 64 * 64)


def test_on_a_cpu_chunks_fit_into_cache() -> None:
    for compiling in (False, True):
        chunking = chunking_for("cpu", compiling=compiling)
        assert chunking == (SMALL, True)
    assert len(columns(state(64), chunking)) == 1280


def test_columns_are_views_that_cover_every_pixel() -> None:
    chunking = Chunking(3 * SMALL, threads=False)
    for shape in ((1, 2, 3, 64, 50), (3, 2, 110, 70), (20_000, 2)):
        (x,) = same_layout([torch.zeros(shape)], chunking)
        for chunk in columns(x, chunking):
            assert chunk.shape[1] <= chunking.most
            chunk += 1
        assert (x == 1).all()


def test_maps_are_walked_in_place_where_there_is_one_or_they_are_long() -> None:
    chunking = Chunking(SMALL, threads=False)
    for shape, in_place in (((1, 2, 9, 9), True), ((2, 2, 64, 33), True), ((2, 2, 9, 9), False)):
        x = torch.rand(shape)
        assert (same_layout([x], chunking)[0].data_ptr() == x.data_ptr()) == in_place


def test_large_chunks_are_walked_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "map_groups", lambda *_: pytest.fail("the pool was asked"))
    assert chunking_for("cuda", compiling=False).map(list, range(30)) == [list(range(30))]


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 17])
@pytest.mark.parametrize("transposed", [False, True])
def test_sums_in_blocks(length: int, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, length, generator=generator, dtype=torch.float64) for rows in (5, 3))
    if transposed:
        a = a.T.contiguous().T
    for found, truth, name in ((row_sums(a), a.sum(1), "sums"), (row_products(a, b), a @ b.T, "products")):
        assert_close_to_truth(found, truth, name, limit=1e-13)


def test_sums_over_millions_of_pixels_keep_their_precision() -> None:
    """Positive terms, so that nothing cancels: one fp32 accumulator for all of them would be off by 3e-5."""
    x = torch.rand(2, 2_600_003, generator=torch.Generator().manual_seed(0))
    for found, truth in ((row_sums(x), x.double().sum(1)), (row_products(x, x), x.double() @ x.double().T)):
        assert found.dtype == torch.float64
        assert_close_to_truth(found, truth, "sum", limit=1e-6)


def test_a_few_thousand_pixels_are_not_added_one_after_the_other() -> None:
    """2048 terms in a row put products of channels-last pixels 1e-6 off on some CPUs, and on an H100."""
    x = (torch.rand(6144, 7, generator=torch.Generator().manual_seed(0)) + 0.5).T
    assert_close_to_truth(row_products(x, x), x.double() @ x.double().T, "products", limit=1e-7)
