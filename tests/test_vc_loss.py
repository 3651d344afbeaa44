from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compare import assert_as_exact_as_eager, assert_close_to_truth
from fastjepa.kernels import vc_loss as fused
from fastjepa.kernels.moments import fused as moments
from fastjepa.kernels.projected_losses import reference


def _rows(n: int, d: int, dtype: torch.dtype, device: str) -> Tensor:
    g = torch.Generator().manual_seed(n + d)
    mixing = (
        0.5 * torch.eye(d, dtype=torch.float64) + 0.3 * torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5
    )
    return (torch.randn(n, d, generator=g, dtype=torch.float64) @ mixing + 0.4).to(device, dtype)


def _loss_and_gradient(function: object, f: Tensor) -> dict[str, Tensor]:
    f = f.detach().requires_grad_()
    std_loss, cov_loss = function(f)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(1.7 * std_loss + 33.0 * cov_loss, f)
    return {"std_loss": std_loss.detach(), "cov_loss": cov_loss.detach(), "gradient": gradient}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(2, 2), (257, 64), (97, 5), (130, 31), (70, 200), (40, 512)])
def test_as_exact_as_eager(n: int, d: int, dtype: torch.dtype, device: str) -> None:
    f = _rows(n, d, dtype, device)
    truth = _loss_and_gradient(reference.vc_loss, f.double())
    # Eager at bf16 as autocast runs it: the loss itself in fp32, its gradient rounded to bf16.
    eager = _loss_and_gradient(lambda x: reference.vc_loss(x.float()), f)
    for name, value in _loss_and_gradient(fused.vc_loss, f).items():
        assert_as_exact_as_eager(value, eager[name], truth[name], name, precision=dtype)


def test_offset_constant_and_dead_columns(device: str) -> None:
    f = _rows(300, 16, torch.float32, device)
    f[:, 0] = 1e3 + 1e-2 * f[:, 0]
    f[:, 1], f[:, 2] = 7.0, 0.0
    truth = _loss_and_gradient(reference.vc_loss, f.double())
    for name, value in _loss_and_gradient(fused.vc_loss, f).items():
        assert_close_to_truth(value, truth[name], name)


def test_first_tile_far_from_the_rest(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # One program, centred at its first tile: the worst case of moments.py's bound.
    monkeypatch.setattr(moments, "_MAX_PROGRAMS", 1)
    f = _rows(330, 16, torch.float32, device)
    f[:32] += 100.0
    mean, scatter = (m[0] for m in moments.moments([f]))
    double = f.double()
    centred = double - double.mean(0)
    # The sum of x − centre is as large as the data's spread, and the mean is as exact as that.
    assert ((mean - double.mean(0)).abs() / double.std(0)).max() < 1e-6
    assert_close_to_truth(scatter, centred.T @ centred, "scatter")


def test_twice_the_same_bits_and_nothing_left_unwritten(device: str, request: pytest.FixtureRequest) -> None:
    f = _rows(97, 70, torch.float32, device)
    first = _loss_and_gradient(fused.vc_loss, f)
    request.getfixturevalue("nan_filled_empty")
    for name, value in _loss_and_gradient(fused.vc_loss, f).items():
        assert torch.equal(value, first[name]), name


def test_strided_rows_and_expanded_gradients(device: str) -> None:
    f = _rows(97, 10, torch.float32, device)
    wide = torch.stack([f, -f], -1)[..., 0]
    assert not wide.is_contiguous()
    first, second = _loss_and_gradient(fused.vc_loss, f), _loss_and_gradient(fused.vc_loss, wide)
    assert all(torch.equal(first[name], second[name]) for name in first)
    f.requires_grad_()
    stacked = torch.stack(fused.vc_loss(f))
    (gradient,) = torch.autograd.grad(stacked, f, torch.full((1,), 2.0, device=device).expand(2))
    double = f.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(
        torch.stack(reference.vc_loss(double)), double, torch.full((2,), 2.0, device=device).double()
    )
    assert_close_to_truth(gradient, truth, "gradient")


def test_opcheck_and_compile(device: str) -> None:
    f = _rows(40, 6, torch.float32, device).requires_grad_()
    torch.library.opcheck(fused._forward, (f,))
    _std, _cov, mean, cov = (x.detach() for x in fused._forward(f))
    torch.library.opcheck(fused._backward, (torch.tensor(1.0), torch.tensor(2.0), f.detach(), mean, cov))
    compiled = torch.compile(fused.vc_loss, fullgraph=True, backend="aot_eager")
    expected = _loss_and_gradient(fused.vc_loss, f)
    assert all(torch.equal(value, expected[name]) for name, value in _loss_and_gradient(compiled, f).items())


def test_refusals(device: str) -> None:
    f = _rows(40, 6, torch.float32, device).requires_grad_()
    with pytest.raises(ValueError, match="f has shape"):
        fused.vc_loss(f[:1])
    with pytest.raises(ValueError, match="f has shape"):
        fused.vc_loss(f[:, :1])
    with pytest.raises(ValueError, match="f has shape"):
        fused.vc_loss(f.repeat(1, 100))
    with pytest.raises(TypeError, match="float64"):
        fused.vc_loss(f.double())
    (gradient,) = torch.autograd.grad(fused.vc_loss(f)[0], f, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [16, 64, 512])
def test_every_audited_configuration_on_hardware(d: int, dtype: torch.dtype, device: str) -> None:
    f = _rows(64 * 1000 + 7, d, dtype, device)
    truth = _loss_and_gradient(reference.vc_loss, f.double())
    eager = _loss_and_gradient(lambda x: reference.vc_loss(x.float()), f)
    for name, value in _loss_and_gradient(fused.vc_loss, f).items():
        assert_as_exact_as_eager(value, eager[name], truth[name], name, precision=dtype)
