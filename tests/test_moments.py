"""The two passes over rows, alone and as a loss and its gradient, against plain torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compare import assert_as_exact_as_eager, assert_close_to_truth
from fastjepa.kernels.launch import LaunchConfig
from fastjepa.kernels.moments import fused, narrow, reference
from fastjepa.kernels.projected_losses import algebra
from fastjepa.kernels.projected_losses.reference import std_and_cov_loss

SIZES = [(2, 2), (257, 64), (97, 5), (130, 31), (70, 200), (40, 512)]
DTYPES = [torch.float32, torch.bfloat16]


def rows(n: int, d: int, dtype: torch.dtype, device: str) -> Tensor:
    # On the CPU, so that a seed means the same numbers everywhere; but what is large is drawn where it is needed.
    g = torch.Generator(device if n * d > 2**20 else "cpu").manual_seed(n + d)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64, device=g.device)

    mixing = 0.5 * torch.eye(d, dtype=torch.float64, device=g.device) + 0.3 * randn(d, d) / d**0.5
    return (randn(n, d) @ mixing + 0.4).to(device, dtype)


def apply_linear(x: Tensor, mean: Tensor, constant: Tensor | None, linear: Tensor, base: Tensor | None) -> Tensor:
    """The fused `reference.subtract_centred_linear` of one tensor."""
    constants = None if constant is None else constant.unsqueeze(0)
    operands = fused.linear_operands(mean.unsqueeze(0), constants, linear.unsqueeze(0), x.dtype)
    return fused.subtract_centred_linear(x, operands, 0, base, torch.empty_like(x))


def vc_by_passes(f: Tensor) -> dict[str, Tensor]:
    """std_loss, cov_loss and the gradient of a weighted sum of both, of rows f: one pass each way."""
    mean, scatter = (m[0] for m in fused.moments([f]))
    cov = scatter / (f.shape[0] - 1)
    std_loss, cov_loss = algebra.std_and_cov_from_moments(cov.diagonal(), cov)
    gradient = algebra.vc_covariance_gradient(cov, torch.tensor(1.7).to(cov), torch.tensor(33.0).to(cov))
    linear = gradient * (-2.0 / (f.shape[0] - 1))
    return {
        "std_loss": std_loss.float(),
        "cov_loss": cov_loss.float(),
        "gradient": apply_linear(f, mean, None, linear, None),
    }


def vc_by_definition(f: Tensor) -> dict[str, Tensor]:
    """The same by autograd. At bf16 as autocast runs it: the loss itself in fp32, its gradient rounded to bf16."""
    f = f.detach().requires_grad_()
    std_loss, cov_loss = std_and_cov_loss(f.to(torch.promote_types(f.dtype, torch.float32)))
    (gradient,) = torch.autograd.grad(1.7 * std_loss + 33.0 * cov_loss, f)
    return {"std_loss": std_loss.detach(), "cov_loss": cov_loss.detach(), "gradient": gradient}


def check_loss_and_gradient(f: Tensor) -> None:
    truth, eager = vc_by_definition(f.double()), vc_by_definition(f)
    for name, value in vc_by_passes(f).items():
        assert_as_exact_as_eager(value, eager[name], truth[name], name, precision=f.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_a_loss_and_its_gradient_are_as_exact_as_eager(n: int, d: int, dtype: torch.dtype, device: str) -> None:
    check_loss_and_gradient(rows(n, d, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_of_several_tensors(dtype: torch.dtype, device: str) -> None:
    tensors = [rows(n, 20, dtype, device)[:97] for n in (97, 98, 99)]
    truth, eager = reference.moments([x.double() for x in tensors]), reference.moments(tensors)
    largest = max(float(x.abs().max()) for x in tensors)
    for name, value, e, t in zip(("mean", "scatter"), fused.moments(tensors), eager, truth, strict=True):
        assert value.dtype == torch.float64
        # A mean is a sum of values that cancel.
        scale = largest if name == "mean" else None
        assert_as_exact_as_eager(value.float(), e, t, name, precision=torch.float32, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [16, 31, 200])
def test_linear_map_with_base_and_constant(d: int, dtype: torch.dtype, device: str) -> None:
    x, base = rows(77, d, dtype, device), rows(77, d, dtype, device).flip(0).contiguous()
    g = torch.Generator().manual_seed(d)
    mean, constant = (torch.randn(d, generator=g, dtype=torch.float64).to(device) for _ in range(2))
    linear = (torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5).to(device)
    truth = reference.subtract_centred_linear(x.double(), mean, constant, linear, base.double())
    eager = reference.subtract_centred_linear(x, mean, constant, linear, base)
    out = apply_linear(x, mean, constant, linear, base)
    assert_as_exact_as_eager(out, eager, truth, "out")
    in_place = fused.linear_operands(mean.unsqueeze(0), constant.unsqueeze(0), linear.unsqueeze(0), dtype)
    assert torch.equal(fused.subtract_centred_linear(x, in_place, 0, base, base), out)


def test_offset_constant_and_dead_columns(device: str) -> None:
    f = rows(300, 16, torch.float32, device)
    f[:, 0] = 1e3 + 1e-2 * f[:, 0]
    f[:, 1], f[:, 2] = 7.0, 0.0
    truth = vc_by_definition(f.double())
    for name, value in vc_by_passes(f).items():
        assert_close_to_truth(value, truth[name], name)
    # Against each column's own spread, not against the largest: a column that hardly varies is as exact as the others.
    scatter, expected = fused.moments([f])[1][0], reference.moments([f.double()])[1][0]
    spread = expected.diagonal().sqrt()
    unit = torch.outer(spread, spread)
    assert not scatter[unit == 0].any()
    assert ((scatter - expected).abs()[unit > 0] / unit[unit > 0]).max() < 1e-5


def test_first_tile_far_from_the_rest(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # One program, centred at its first tile: the worst case of the bound in the package's docstring.
    monkeypatch.setattr(narrow, "_MAX_PROGRAMS", 1)
    monkeypatch.setitem(narrow.NARROW_CONFIGS, 16, LaunchConfig(blocks={"BLOCK_N": 64, "BLOCK_D": 16}))
    f = rows(330, 16, torch.float32, device)
    f[:64] += 100.0
    mean, scatter = (m[0] for m in fused.moments([f]))
    double = f.double()
    # The sum of x − centre is as large as the data's spread, and the mean is as exact as that.
    assert ((mean - double.mean(0)).abs() / double.std(0)).max() < 1e-6
    assert_close_to_truth(scatter, reference.moments([double])[1][0], "scatter")


def test_twice_the_same_bits_and_nothing_left_unwritten(device: str, request: pytest.FixtureRequest) -> None:
    f = rows(97, 70, torch.float32, device)
    first = vc_by_passes(f)
    request.getfixturevalue("nan_filled_empty")
    for name, value in vc_by_passes(f).items():
        assert torch.equal(value, first[name]), name


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ([], ValueError, "moments: no tensors were given"),
        ([None], TypeError, r"tensors\[0\] must be a tensor, got NoneType"),
        ([torch.rand(16, 70).T], ValueError, r"moments: tensors\[0\] has strides \(1, 70\); accepted: contiguous"),
        ([torch.rand(70, 32)[:, ::2]], ValueError, r"tensors\[0\] has strides \(32, 2\)"),
        ([torch.rand(4, 5, 6)], ValueError, r"tensors\[0\] has shape \(4, 5, 6\); accepted: \(any, any\)"),
        ([torch.rand(0, 16)], ValueError, r"rows have shape \(0, 16\); accepted: 1 row or more of 1 to 512"),
        ([torch.rand(4, 513)], ValueError, r"rows have shape \(4, 513\)"),
        (
            [torch.rand(4, 16).double()],
            TypeError,
            r"tensors\[0\] has dtype torch.float64; accepted: torch.float32",
        ),
        ([torch.rand(4, 16), torch.rand(4, 16).bfloat16()], TypeError, r"tensors\[1\] has dtype torch.bfloat16"),
        ([torch.rand(4, 16), torch.rand(5, 16)], ValueError, r"tensors\[1\] has shape \(5, 16\); accepted: \(4, 16\)"),
    ],
)
def test_moments_refuse_what_they_would_get_wrong(
    tensors: list[Any], error: type[Exception], message: str, device: str
) -> None:
    # .to() would make strided rows contiguous on its way to a GPU.
    moved: list[Any] = [
        x if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
        for x in tensors
    ]
    with pytest.raises(error, match=message):
        fused.moments(moved)


def test_moments_need_tensors_of_one_device_that_runs_kernels(device: str) -> None:
    here, nowhere = torch.rand(4, 16, device=device), torch.rand(4, 16, device="meta")
    with pytest.raises(ValueError, match=r"tensors\[1\] is on meta, but the other arguments are on"):
        fused.moments([here, nowhere])
    for call in (
        lambda: fused.moments([nowhere]),
        lambda: fused.subtract_centred_linear(nowhere, fused.LinearOperands(here, here, here), 0, None, nowhere),
    ):
        with pytest.raises(RuntimeError, match="device type 'meta' is not supported"):
            call()


def test_the_linear_map_refuses_what_it_would_get_wrong(device: str) -> None:
    x, mean, linear = torch.rand(7, 16, device=device), torch.rand(1, 16).double(), torch.rand(1, 16, 16).double()
    mean, linear = mean.to(device), linear.to(device)
    for arguments, message in (
        ((mean, mean[:, :3], linear), r"constant has shape \(1, 3\); accepted: \(1, 16\)"),
        ((mean, None, linear[:, :, :3]), r"linear has shape \(1, 16, 3\); accepted: \(1, 16, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fused.linear_operands(*arguments, x.dtype)
    with pytest.raises(TypeError, match=r"mean has dtype torch.float32; accepted: torch.float64"):
        fused.linear_operands(mean.float(), None, linear, x.dtype)
    with pytest.raises(TypeError, match=r"dtype is torch.float16; accepted: torch.float32, torch.bfloat16"):
        fused.linear_operands(mean, None, linear, torch.float16)
    operands = fused.linear_operands(mean, None, linear, x.dtype)
    for t in (-1, 1):
        with pytest.raises(ValueError, match=rf"t is {t}; accepted: 0 to 0"):
            fused.subtract_centred_linear(x, operands, t, None, torch.empty_like(x))
    twice = operands._replace(constant=operands.constant.repeat(2, 1))
    with pytest.raises(ValueError, match=r"operands.constant has shape \(2, 16\); accepted: \(1, 16\)"):
        fused.subtract_centred_linear(x, twice, 0, None, torch.empty_like(x))
    with pytest.raises(TypeError, match=r"operands.linear has dtype torch.float32; accepted: torch.bfloat16"):
        fused.subtract_centred_linear(x.bfloat16(), operands, 0, None, torch.empty_like(x))
    with pytest.raises(ValueError, match=r"operands.centre has shape \(1, 16\); accepted: \(1, 64\)"):
        fused.subtract_centred_linear(x.repeat(1, 4), operands, 0, None, torch.empty_like(x))
    with pytest.raises(ValueError, match=r"out has shape \(7, 15\); accepted: \(7, 16\)"):
        fused.subtract_centred_linear(x, operands, 0, None, torch.empty_like(x)[:, :15])
    strided = torch.empty(16, 7, device=device).T
    for base, out, name in ((None, strided, "out"), (strided, x, "base")):
        with pytest.raises(ValueError, match=rf"{name} has strides \(1, 7\)"):
            fused.subtract_centred_linear(x, operands, 0, base, out)
    with pytest.raises(ValueError, match=r"x has strides \(1, 7\)"):
        fused.subtract_centred_linear(strided, operands, 0, None, torch.empty_like(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [16, 64, 512])
def test_every_audited_configuration_on_hardware(d: int, dtype: torch.dtype, device: str) -> None:
    check_loss_and_gradient(rows(64 * 1000 + 7, d, dtype, device))
