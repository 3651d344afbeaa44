"""Several ranks in one process: threads that take turns, so that a test sees all, and nothing runs twice at once.

A rank runs until it gives a tensor to the others or ends; then the next one runs. So no two threads are in a kernel,
in the interpreter, or between two statements that change something global.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from fastjepa.kernels import shares as batch_shares
from fastjepa.kernels.shares import Shares

Result = TypeVar("Result")

_PATIENCE = 120.0  # seconds for a turn; a test that would hang fails


class Ranks(Generic[Result]):
    """What `function(shares)` gives on each rank of a batch with these counts.

    Attributes:
        results: of each rank.
        gathered: the shapes of what was gathered, in order; the same on every rank.
    """

    def __init__(self, counts: Sequence[int], function: Callable[[Shares], Result]) -> None:
        self._counts = tuple(counts)
        n = len(self._counts)
        self._turns = [threading.Semaphore(0) for _ in range(n)]
        self._given: list[list[Tensor]] = [[] for _ in range(n)]
        self._errors: list[BaseException] = []
        found: dict[int, Result] = {}

        def run(rank: int) -> None:
            try:
                self._wait(rank)
                batch_shares._current = None  # a process has one, and each rank its own
                # Backward runs in this thread, also on a GPU, whose thread all ranks would share.
                with torch.autograd.set_multithreading_enabled(False):
                    shares = Shares(self._counts, rank, lambda tensor: self._collect(rank, tensor))
                    found[rank] = function(shares)
            except BaseException as error:
                self._errors.append(error)
            finally:
                self._pass_on(rank)

        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(n)]
        for thread in threads:
            thread.start()
        self._turns[0].release()
        for thread in threads:
            thread.join(_PATIENCE)
        if self._errors:
            raise self._errors[0]
        self.results = [found[rank] for rank in range(n)]
        self.gathered = [tuple(tensor.shape) for tensor in self._given[0]]
        for rank, given in enumerate(self._given):
            assert [tuple(tensor.shape) for tensor in given] == self.gathered, f"rank {rank} gave something else"

    def _pass_on(self, rank: int) -> None:
        self._turns[(rank + 1) % len(self._turns)].release()

    def _wait(self, rank: int) -> None:
        if not self._turns[rank].acquire(timeout=_PATIENCE):
            raise TimeoutError(f"rank {rank} had no turn")
        if self._errors:
            raise RuntimeError(f"rank {rank}: another rank failed") from self._errors[0]

    def _collect(self, rank: int, tensor: Tensor) -> Tensor:
        assert not tensor.requires_grad
        current = batch_shares._current
        self._given[rank].append(tensor.clone())
        i = len(self._given[rank]) - 1
        self._pass_on(rank)
        self._wait(rank)
        batch_shares._current = current
        assert all(len(given) > i for given in self._given), f"rank {rank} gathered something that others did not"
        return torch.stack([given[i] for given in self._given])


def split(whole: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """This rank's entries of a batch whose first dimension `counts` divide; of an empty one, an entry of noise."""
    if counts[rank] == 0:
        g = torch.Generator().manual_seed(rank + 99)
        noise = 3.0 + 50.0 * torch.randn(1, *whole.shape[1:], generator=g, dtype=torch.float64)
        noise = noise.to(whole.device, whole.dtype)
        return noise.contiguous(memory_format=torch.channels_last) if whole.dim() == 4 else noise
    start = sum(counts[:rank])
    return whole[start : start + counts[rank]].detach()


def joined(parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The rows of all ranks, in order, but not those of empty ones."""
    return torch.cat([part for part, count in zip(parts, counts, strict=True) if count > 0])


def total(parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The sum over ranks of a parameter's gradient, in float64; what an empty one computed is dropped."""
    return torch.stack([part.double() for part, count in zip(parts, counts, strict=True) if count > 0]).sum(0)


def assert_same_bits(results: Sequence[Tensor], name: str) -> None:
    """All ranks have the same numbers, bit for bit."""
    for rank, result in enumerate(results):
        assert torch.equal(result, results[0]), f"{name} of rank {rank} is not that of rank 0"
