from __future__ import annotations

import threading

import pytest
import torch

from fastjepa.kernels.projected_losses.chunk_pool import GROUP, map_groups


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_groups_in_order_each_in_a_thread_with_one_torch_thread() -> None:
    seen = []

    def note(group: list[int]) -> tuple[list[int], int, bool]:
        seen.append(threading.current_thread() is threading.main_thread())
        return list(group), torch.get_num_threads(), torch.is_grad_enabled()

    found = map_groups(note, list(range(3 * GROUP + 1)))
    assert [x for group, _, _ in found for x in group] == list(range(3 * GROUP + 1))
    assert {(threads, grad) for _, threads, grad in found} == {(1, False)}
    assert not any(seen)
    assert torch.get_num_threads() == 2
    # Threads that start now have torch's setting, not the pool's.
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


@pytest.mark.usefixtures("two_threads")
def test_an_error_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        map_groups(lambda group: 1 // (group[0] - GROUP), list(range(2 * GROUP)))


def test_the_same_bits_whatever_the_number_of_threads() -> None:
    items = list(torch.randn(5 * GROUP, 1000).unbind())

    def total(group: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(group)).sum()

    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.stack(map_groups(total, items)))
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)
