"""Several tensors of rows in one launch: up to `MAX_TENSORS` pointers, of which each program takes one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl  # noqa: F401, the interpreter looks for it beside a device function
from torch import Tensor

MAX_TENSORS = 5  # pointers x0_ptr to x4_ptr: a state and four predictions


@triton.jit
def tensor_of(x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, t):  # type: ignore[no-untyped-def]
    """The pointer to tensor t, a program's own number; pointers that the launch was not given are None."""
    x_ptr = x0_ptr
    if x1_ptr is not None:  # noqa: SIM102, one is decided when the kernel is compiled, the other when it runs
        if t == 1:
            x_ptr = x1_ptr
    if x2_ptr is not None:  # noqa: SIM102
        if t == 2:
            x_ptr = x2_ptr
    if x3_ptr is not None:  # noqa: SIM102
        if t == 3:
            x_ptr = x3_ptr
    if x4_ptr is not None:  # noqa: SIM102
        if t == 4:
            x_ptr = x4_ptr
    return x_ptr


def launches_of(n_tensors: int) -> Iterator[slice]:
    """The tensors of each launch."""
    return (slice(start, min(start + MAX_TENSORS, n_tensors)) for start in range(0, n_tensors, MAX_TENSORS))


def pointers(name: str, tensors: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """`{name}0_ptr` and so on: the tensors of one launch, then None."""
    return {f"{name}{i}_ptr": tensors[i] if i < len(tensors) else None for i in range(MAX_TENSORS)}
