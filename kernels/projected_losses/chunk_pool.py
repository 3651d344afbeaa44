"""Work on many small chunks with one thread per chunk, not several threads inside each small operation.

Torch splits an operation over threads and waits for all of them at its end. For chunks that fit in cache such an
operation lasts some 0.1 ms, so the waiting costs more than the splitting gains, and on a machine that has other work
it costs a time slice each: we saw 50 times slower. Here every thread takes whole groups of chunks. Groups are fixed,
so results do not depend on the number of threads.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

GROUP = 8  # chunks: enough to make handing over a group cheap, few enough that threads end together


def map_groups(function: Callable[[Sequence[Item]], Result], items: Sequence[Item]) -> list[Result]:
    """`function` of each group of up to `GROUP` consecutive items, in order; in parallel if torch has several threads.

    Inside, torch uses one thread, and gradients are not recorded, as in any autograd.Function.
    """
    groups = [items[i : i + GROUP] for i in range(0, len(items), GROUP)]
    threads = torch.get_num_threads()
    if threads == 1 or len(groups) == 1:
        return [function(group) for group in groups]

    def call(group: Sequence[Item]) -> Result:
        with torch.no_grad():  # the mode belongs to a thread
            return function(group)

    return list(_pool(threads).map(call, groups))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    all_started = threading.Barrier(threads)

    def start() -> None:
        torch.get_num_threads()  # the first call of a thread takes over torch's setting; only then does its own last
        torch.set_num_threads(1)
        all_started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="fastjepa", initializer=start)
    # Each submit starts one thread while the others wait at the barrier.
    for future in [pool.submit(int) for _ in range(threads)]:
        future.result()
    # The setting is a thread's own, but also what threads that start later begin with: put that back.
    torch.set_num_threads(threads)
    return pool


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
