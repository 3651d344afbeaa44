from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastjepa.kernels import launch


@pytest.mark.parametrize("n_rows", [1, 63, 64, 65, 640, 641, 2_621_440, 1_474_560, 2**31 + 1])
@pytest.mark.parametrize("max_programs", [1, 7, 528])
def test_row_split_covers_every_row_once(n_rows: int, max_programs: int) -> None:
    split = launch.RowSplit.of(n_rows, 64, max_programs)
    rows_per_program = split.tiles * 64
    assert 1 <= split.programs <= max_programs
    assert (split.programs - 1) * rows_per_program < n_rows <= split.programs * rows_per_program
    assert split.even == (split.programs * rows_per_program == n_rows)
    # Balance: no more than twice the fewest tiles a program could have.
    assert split.tiles <= 2 * -(-n_rows // (64 * max_programs))


def test_row_split_of_the_default_recipe_needs_no_mask() -> None:
    for batch in (1, 8, 64):
        assert launch.RowSplit.of(batch * 10 * 64 * 64, 64, 528).even


@triton.jit
def _round_kernel(x_ptr, y_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, launch.round_to(tl.load(x_ptr + offs), tl.bfloat16).to(tl.float32))


def test_round_to_rounds_to_nearest_even(device: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, generator=g) * torch.logspace(-30, 30, 256)
    x[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 0.0, -(1 + 2**-8)])  # ties to even, zero, negative tie
    y = torch.empty_like(x, device=device)
    _round_kernel[(1,)](x.to(device), y, N=256)
    assert torch.equal(y.cpu(), x.bfloat16().float())


@triton.jit
def _add_dot_kernel(a_ptr, b_ptr, out_ptr, ORDERED: tl.constexpr):  # type: ignore[no-untyped-def]
    offs = tl.arange(0, 16)
    grid = offs[:, None] * 16 + offs[None, :]
    acc = tl.full([16, 16], 3.0, dtype=tl.float32)
    acc = launch.add_dot(acc, tl.load(a_ptr + grid), tl.load(b_ptr + grid), "ieee", ORDERED)
    tl.store(out_ptr + grid, acc)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ordered", [True, False])
def test_add_dot(ordered: bool, dtype: torch.dtype, device: str) -> None:
    if ordered and dtype == torch.bfloat16:
        pytest.skip("ordered sums are for fp32 operands only")
    # Small integers: every product and sum is exact, so the result must be too.
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (16, 16), generator=g).to(device, dtype) for _ in range(2))
    out = torch.empty(16, 16, device=device)
    _add_dot_kernel[(1,)](a, b, out, ORDERED=ordered)
    assert torch.equal(out.double(), 3.0 + a.double() @ b.double())


def test_dot_precision() -> None:
    assert launch.dot_precision(torch.float32) == "tf32x3"
    assert launch.dot_precision(torch.bfloat16) == "ieee"
