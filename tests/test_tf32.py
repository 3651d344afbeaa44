"""fp32 operands in two parts: what a matrix instruction reads of them is all that a product needs."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from compare import assert_close_to_truth
from fastjepa.kernels.projected_losses.parts import parts_of_matrix
from fastjepa.kernels.tf32 import dot_tf32x3, split_tf32

SIZE = 16


@triton.jit
def _split_kernel(x_ptr, high_ptr, low_ptr):  # type: ignore[no-untyped-def]
    offs = tl.arange(0, 256)
    high, low = split_tf32(tl.load(x_ptr + offs))
    tl.store(high_ptr + offs, high)
    tl.store(low_ptr + offs, low)


@triton.jit
def _parts_kernel(x_ptr, first_ptr, second_ptr):  # type: ignore[no-untyped-def]
    offs = tl.arange(0, 256)
    first, second = parts_of_matrix(tl.load(x_ptr + offs), first_ptr.dtype.element_ty)
    tl.store(first_ptr + offs, first)
    tl.store(second_ptr + offs, second)


@triton.jit
def _dot_kernel(a_high_ptr, a_low_ptr, b_high_ptr, b_low_ptr, out_ptr):  # type: ignore[no-untyped-def]
    offs = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    parts = tl.load(a_high_ptr + offs), tl.load(a_low_ptr + offs), tl.load(b_high_ptr + offs), tl.load(b_low_ptr + offs)
    out = dot_tf32x3(parts[0], parts[1], parts[2], parts[3], tl.full([16, 16], 2.0, tl.float32))
    tl.store(out_ptr + offs, out)


def numbers(device: str) -> Tensor:
    """Of both signs, large and small, and halfway between two of 11 bits."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, generator=g) * torch.logspace(-30, 30, 256)
    x[:4] = torch.tensor([0.0, -0.0, 1 + 2.0**-12, -1 - 3 * 2.0**-12])
    return x.to(device)


def seen(x: Tensor) -> Tensor:
    """What a "tf32" dot reads of fp32 x: the first 11 bits."""
    return (x.view(torch.int32) & -8192).view(torch.float32)


def test_the_parts_of_fp32(device: str) -> None:
    x = numbers(device)
    high, low = torch.empty_like(x), torch.empty_like(x)
    _split_kernel[(1,)](x, high, low)
    assert torch.equal(high, seen(high))
    assert torch.equal(high.double() + low.double(), x.double())
    assert (low.abs() <= 2.0**-11 * x.abs()).all()  # the nearest: half of the last bit


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_what_is_not_a_number_stays_so(device: str) -> None:
    x = numbers(device)
    bits = torch.tensor([0x7F800000, 0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32)  # infinity, NaNs
    x[:4] = bits.view(torch.float32).to(device)
    high, low = torch.empty_like(x), torch.empty_like(x)
    _split_kernel[(1,)](x, high, low)
    assert not (high[:4] + low[:4]).isfinite().any()
    assert (high[4:] + low[4:]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_parts_of_a_float64_matrix(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(256, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    first, second = (torch.empty(256, device=device, dtype=dtype) for _ in range(2))
    _parts_kernel[(1,)](x, first, second)
    if dtype == torch.float32:
        assert torch.equal(first, seen(first))
    error = (first.double() + second.double() - x).abs()
    assert (error <= 2.0 ** (-36 if dtype == torch.float32 else -17) * x.abs()).all()


def test_a_product_of_what_matrix_instructions_read(device: str) -> None:
    """The parts are cut to 11 bits by hand, as the interpreter's dots read all of them."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIZE, SIZE, generator=g).to(device) for _ in range(2))
    parts = []
    for x in (a, b):
        high, low = torch.empty_like(x), torch.empty_like(x)
        _split_kernel[(1,)](x, high, low)
        parts += [seen(high), seen(low)]
    out = torch.empty_like(a)
    _dot_kernel[(1,)](*parts, out)
    assert_close_to_truth(out, 2 + a.double() @ b.double(), "product", limit=1e-6)
