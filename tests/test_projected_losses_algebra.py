"""The four kernels between the passes over the rows, against `algebra` in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from compare import assert_close_to_truth
from fastjepa.kernels.moments.blocks import n_summands
from fastjepa.kernels.projected_losses import algebra, products
from fastjepa.kernels.projected_losses import hidden_affine as affine_kernel
from fastjepa.kernels.projected_losses import input_gradients as input_kernel
from fastjepa.kernels.projected_losses import losses as losses_kernel
from fastjepa.kernels.projected_losses import output_gradients as output_kernel
from fastjepa.kernels.projected_losses.activations import block_sizes
from fastjepa.kernels.projected_losses.algebra import ProjectorParameters
from fastjepa.kernels.projected_losses.parts import n_parts
from fastjepa.kernels.projected_losses.products import add_outer_products, add_product

N_ROWS, EPS = 977, 3e-4
WIDE = 1e-12  # of results in float64
FP32, BF16 = torch.float32, torch.bfloat16
# channels, hidden, out, predictions
SIZES = [(16, 64, 64, 4), (1, 7, 5, 0), (5, 1, 2, 1), (64, 128, 128, 2), (33, 65, 17, 5)]
DTYPES = [FP32, BF16]
TWO_PARTS = {FP32: 2.0**-35, BF16: 2.0**-16}  # rounding of a sum of two: 11 and 24 bits, 8 and 8 bits, one a sign


def rounding(dtype: torch.dtype) -> float:
    """Of a float64 result that is stored as one, or as the sum of two, of `dtype`."""
    return float(torch.finfo(dtype).eps) ** (2 if dtype == BF16 else 1)


class Draw:
    """Small matrices in float64, drawn on the CPU."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(seed)

    def __call__(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, dtype=torch.float64).to(self.device)

    def scatter(self, *size: int) -> Tensor:
        """N·(a covariance): symmetric, without negative eigenvalues."""
        root = self(*size, size[-1] + 3)
        return N_ROWS / size[-1] * root @ root.mT

    def parameters(self, d: int, h: int, out: int, dtype: torch.dtype) -> ProjectorParameters:
        weight2 = self(out, h) * 0.5 / h**0.5
        found = (self(h, d) * 0.4, self(h) * 0.3, 1 + 0.2 * self(h), 0.3 * self(h), weight2)
        return ProjectorParameters(*(x.to(dtype) for x in found))


def padded_sums(second: Tensor, total: Tensor, size_h: int) -> Tensor:
    """What `activation_moments` returns: the second moments (T, H, H), and z's first (H,)."""
    n_tensors, h, _ = second.shape
    sums = second.new_zeros(n_tensors, size_h + 1, size_h)
    sums[:, :h, :h], sums[0, size_h, :h] = second, total
    return sums


@pytest.mark.parametrize("params_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "h", "out", "k"), SIZES)
def test_hidden_affine(
    d: int, h: int, out: int, k: int, dtype: torch.dtype, params_dtype: torch.dtype, device: str
) -> None:
    draw = Draw(device)
    params, mean, scatter = draw.parameters(d, h, out, params_dtype), 3 * draw(1 + k, d), draw.scatter(1 + k, d)
    scatter[:, 0] = scatter[:, :, 0] = 0  # a constant channel
    truth = algebra.hidden_affine(params, mean, scatter, N_ROWS, EPS)
    found = affine_kernel.hidden_affine(params, mean, scatter, N_ROWS, EPS, dtype)
    assert_close_to_truth(found.inv_std, truth.inv_std, "inv_std", limit=WIDE)
    assert_close_to_truth(
        found.weight1_scatter, params.weight1.double() @ scatter, "weight1_scatter", limit=WIDE if d > 1 else 0.0
    )
    assert_close_to_truth(found.batch_mean, truth.hidden_mean, "batch_mean", limit=rounding(FP32))
    assert_close_to_truth(found.batch_var, truth.hidden_var, "batch_var", limit=rounding(FP32))
    assert torch.equal(found.wide_weight2, params.weight2.double())
    assert found.shift.shape[0] == found.operands.offset.shape[1] == block_sizes(d, h)[1]
    assert_close_to_truth(found.shift[:h], truth.shift, "shift", limit=4 * rounding(FP32))
    centre, slope, offset = (x.double() for x in found.operands)
    assert_close_to_truth(centre.sum(1)[:, :d], mean, "centre", limit=rounding(FP32) ** 2)
    assert_close_to_truth(slope.sum(1)[:, :d, :h].mT, truth.slope, "slope", limit=TWO_PARTS[dtype])
    # With the rounded slope, y is β where x is μ.
    at_mean = offset[:, :h] + (torch.einsum("td,tdh->th", mean, slope.sum(1)[:, :d, :h]) if dtype == BF16 else 0)
    scale = float(offset.abs().max())
    assert (at_mean - params.bn_bias.double()).abs().max() <= rounding(FP32) * scale
    for padding in (found.shift[h:], centre[..., d:], slope[..., d:, :], slope[..., h:], offset[:, h:]):
        assert not padding.any()


@pytest.mark.parametrize(("d", "h", "out", "k"), SIZES)
def test_losses(d: int, h: int, out: int, k: int, device: str) -> None:
    draw, size_h = Draw(device), block_sizes(d, h)[1]
    weight2, shift = draw.parameters(d, h, out, FP32).weight2.double(), draw(h).float()
    residual, scatter_r, delta = 0.3 * draw(h), draw.scatter(h), draw.scatter(k, h)
    second = torch.cat([(scatter_r + N_ROWS * torch.outer(residual, residual)).unsqueeze(0), delta])
    sums = padded_sums(second, N_ROWS * residual, size_h)
    padded_shift = torch.nn.functional.pad(shift, (0, size_h - h))
    found = losses_kernel.losses(sums, padded_shift, weight2, N_ROWS)
    cov = algebra.covariance(weight2, scatter_r, N_ROWS)
    assert_close_to_truth(found.covariance, cov, "covariance", limit=WIDE)
    projected = weight2 @ torch.cat([scatter_r.unsqueeze(0), delta])
    assert_close_to_truth(found.projected, projected, "projected", limit=WIDE)
    std_loss, cov_loss = algebra.std_and_cov_from_moments(cov.diagonal(), cov)
    for name, value, truth in (
        ("std_loss", found.std_loss, std_loss),
        ("cov_loss", found.cov_loss, cov_loss),
        ("prediction_losses", found.prediction_losses, algebra.prediction_losses(weight2, delta, N_ROWS)),
        ("mean_r", found.mean_r[:h], shift.double() + residual),
    ):
        assert value.dtype == FP32
        assert_close_to_truth(value, truth, name, limit=rounding(FP32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "given"),
    [*((s, "all") for s in SIZES), *itertools.product([SIZES[1], SIZES[4]], ["std", "cov", "predictions", "expanded"])],
)
def test_output_gradients(sizes: tuple[int, int, int, int], given: str, dtype: torch.dtype, device: str) -> None:
    d, h, out, k = sizes
    draw, size_h = Draw(device), block_sizes(d, h)[1]
    params = draw.parameters(d, h, out, dtype)
    weight2, scatter_r, delta = params.weight2.double(), draw.scatter(h), draw.scatter(k, h)
    cov = algebra.covariance(weight2, scatter_r, N_ROWS)
    grads = [torch.tensor(1.7, device=device), torch.tensor(33.0, device=device), draw(k).float()]
    if given == "expanded":
        grads[2] = grads[0].expand(k)
    absent = {"std": (1, 2), "cov": (0, 2), "predictions": (0, 1)}.get(given, ())
    truth = algebra.output_gradients(
        weight2, scatter_r, delta, N_ROWS, *(torch.zeros_like(g) if i in absent else g for i, g in enumerate(grads))
    )
    projected = weight2 @ torch.cat([scatter_r.unsqueeze(0), delta])
    passed: list[Any] = [None if i in absent else g for i, g in enumerate(grads)]
    found = output_kernel.output_gradients(
        *passed, cov, projected, weight2, N_ROWS, size_h, dtype, params.weight2.dtype
    )
    assert found.variance.dtype == found.weight2.dtype == dtype
    assert found.weight2.is_contiguous()
    once = float(torch.finfo(dtype).eps) / 2 + WIDE
    as_passed = once if dtype == BF16 else TWO_PARTS[dtype]
    assert found.variance.shape == (n_parts(dtype), size_h, size_h)
    variance = found.variance.double().sum(0)
    assert_close_to_truth(variance[:h, :h], truth.variance, "variance", limit=as_passed)
    assert_close_to_truth(found.weight2, truth.weight2, "weight2", limit=once)
    assert not variance[h:].any()
    assert not variance[:, h:].any()
    if k == 0:
        assert found.gram is None
        return
    assert found.gram is not None
    assert found.gram.shape == (k, n_parts(dtype), size_h, size_h)
    gram = found.gram.double().sum(1)
    for of_prediction, c in zip(gram, truth.prediction, strict=True):
        assert_close_to_truth(of_prediction[:h, :h], c * truth.gram, "gram", limit=as_passed)
    assert not gram[:, h:].any()
    assert not gram[:, :, h:].any()


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "h", "out", "k"), SIZES)
def test_input_gradients(d: int, h: int, out: int, k: int, dtype: torch.dtype, group: int, device: str) -> None:
    draw, (block_d, size_h), n_tensors = Draw(device), block_sizes(d, h), 1 + k
    params = draw.parameters(d, h, out, dtype)
    mean, scatter = 3 * draw(n_tensors, d), draw.scatter(n_tensors, d)
    sum_dy, dy_x = draw(n_tensors, h), 20 * draw(n_tensors, h, d)
    affine = algebra.hidden_affine(params, mean, scatter, N_ROWS, EPS)
    slope = affine_kernel.hidden_affine(params, mean, scatter, N_ROWS, EPS, dtype).operands.slope
    # With bf16 rows the pass over the activations multiplies dy by the first part of A alone.
    slope_of_pass = slope[:, : n_parts(dtype), :d, :h].double().sum(1)
    slope_sum = torch.einsum("tdh,th->td", slope_of_pass, sum_dy)
    truth = algebra.input_gradients(params, affine, scatter, sum_dy.sum(0), dy_x, slope_sum, N_ROWS)
    # Every group of predictions has a record of z, and they add up.
    starts, records = range(0, max(1, k), group), []
    for start in starts:
        for t in (0, *range(start + 1, min(start + group, k) + 1)):
            part = 1.0 / len(starts) if t == 0 else 1.0
            record = draw(0).new_zeros(size_h * block_d + size_h)
            record[: size_h * block_d].view(size_h, block_d)[:h, :d] = part * dy_x[t]
            record[size_h * block_d :][:h] = part * sum_dy[t]
            records.append(record)
    found = input_kernel.input_gradients(
        params,
        torch.stack(records),
        group,
        mean,
        affine.inv_std.contiguous(),
        params.weight1.double() @ scatter,
        slope,
        N_ROWS,
    )
    once = float(torch.finfo(dtype).eps) / 2 + WIDE
    for name in ("weight1", "bn_weight", "bn_bias"):
        value = getattr(found, name)
        assert value.dtype == getattr(params, name).dtype
        assert value.is_contiguous()
        assert_close_to_truth(value, getattr(truth, name), name, limit=once)
    assert found.bias1.dtype == params.bias1.dtype
    assert torch.equal(found.bias1, torch.zeros_like(params.bias1))
    linear = found.correction.linear.double().sum(1).mT
    assert_close_to_truth(linear[:, :d, :d], truth.linear, "linear", limit=rounding(dtype))
    assert found.correction.linear.shape[1] == n_summands(dtype)
    # The constant is for a pass that centres at the rounded mean.
    assert torch.equal(found.correction.centre[:, :d], mean.float())
    rest = torch.einsum("tde,te->td", truth.linear, mean - mean.float().double())
    constant = found.correction.constant[:, :d]
    assert_close_to_truth(constant, truth.constant - rest, "constant", limit=rounding(FP32))
    for padding in (constant[:, d:], found.correction.centre[:, d:], linear[:, d:], linear[:, :, d:]):
        assert not padding.any()


def test_a_nan_reaches_every_loss_it_should(device: str) -> None:
    """torch's relu and clamp let a NaN through, Triton's maximum does not."""
    draw = Draw(device)
    params, mean, scatter = draw.parameters(5, 7, 4, FP32), draw(2, 5), draw.scatter(2, 5)
    scatter[1, 2, 3] = float("nan")
    found = affine_kernel.hidden_affine(params, mean, scatter, N_ROWS, EPS, FP32)
    truth = algebra.hidden_affine(params, mean, scatter, N_ROWS, EPS)
    for value, exact in ((found.batch_var, truth.hidden_var), (found.inv_std, truth.inv_std)):
        assert torch.equal(value.isnan(), exact.isnan())
    second = draw.scatter(2, 7)
    second[0, 0, 0] = float("nan")
    sums = padded_sums(second, draw(7), 64)
    losses = losses_kernel.losses(sums, found.shift, params.weight2.double(), N_ROWS)
    assert losses.std_loss.isnan()
    assert losses.cov_loss.isnan()
    assert losses.prediction_losses.isfinite().all()


@triton.jit
def _product_kernel(a_ptr, b_ptr, out_ptr, M, N, COUNT: tl.constexpr, LOOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """out (16, 32) = 1 + A·Bᵀ from A (M, COUNT) and B (COUNT, N), which are smaller."""
    offs_m, offs_n = tl.arange(0, 16), tl.arange(0, 32)
    acc = tl.full([16, 32], 1.0, dtype=tl.float64)
    if LOOP:
        acc = add_outer_products(acc, a_ptr, b_ptr, offs_m * COUNT, offs_n, offs_m < M, offs_n < N, 1, N, COUNT)
    else:
        acc = add_product(acc, a_ptr, b_ptr, offs_m * COUNT, offs_n, offs_m < M, offs_n < N, 1, N, COUNT)
    tl.store(out_ptr + offs_m[:, None] * 32 + offs_n[None, :], acc)


@pytest.mark.parametrize("count", [1, 4, 7, 64])
@pytest.mark.parametrize("dtype", [FP32, torch.float64])
def test_a_product_and_the_loop_that_is_compiled(dtype: torch.dtype, count: int, device: str) -> None:
    """The interpreter takes another way; both ways are tested here."""
    draw = Draw(device)
    a, b = draw(13, count).to(dtype), draw(count, 29).to(dtype)
    for loop in (False, True):
        out = torch.empty(16, 32, device=device, dtype=torch.float64)
        _product_kernel[(1,)](a, b, out, 13, 29, COUNT=count, LOOP=loop)
        assert_close_to_truth(out[:13, :29], 1 + a.double() @ b.double(), "product", limit=1e-14)
        assert (out[13:] == 1).all()
        assert (out[:, 29:] == 1).all()


def test_every_kernel_with_the_loop_that_is_compiled(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    d, h, out, k = SIZES[4]
    draw = Draw("cpu")
    params, mean, scatter = draw.parameters(d, h, out, FP32), draw(1 + k, d), draw.scatter(1 + k, d)
    sums = padded_sums(draw.scatter(1 + k, h), draw(h), 128)
    grads = (torch.tensor(1.7), torch.tensor(33.0), draw(k).float())
    records = draw(2 * k, 128 * 64 + 128)

    def everything() -> list[Tensor]:
        affine = affine_kernel.hidden_affine(params, mean, scatter, N_ROWS, EPS, FP32)
        losses = losses_kernel.losses(sums, affine.shift, affine.wide_weight2, N_ROWS)
        last = (N_ROWS, 128, FP32, FP32)
        out = output_kernel.output_gradients(*grads, losses.covariance, losses.projected, affine.wide_weight2, *last)
        grad = input_kernel.input_gradients(
            params, records, 1, mean, affine.inv_std, affine.weight1_scatter, affine.operands.slope, N_ROWS
        )
        tensors = [*affine, *affine.operands, *losses, *out, *grad, *grad.correction]
        return [x for x in tensors if isinstance(x, Tensor)]

    by_dots = everything()
    monkeypatch.setattr(products, "_INTERPRET", tl.constexpr(False))
    by_loops = everything()
    assert not all(map(torch.equal, by_loops, by_dots))  # in the last bits, as another way was taken
    for i, (value, expected) in enumerate(zip(by_loops, by_dots, strict=True)):
        limit = WIDE if value.dtype == torch.float64 else rounding(FP32)
        assert_close_to_truth(value, expected.double(), f"result {i}", limit=limit)
