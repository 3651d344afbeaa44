from __future__ import annotations

import pytest
import torch

from fastjepa.kernels.projected_losses.reference import std_and_cov_loss
from fastjepa.model.losses import SquareLossSeq, VCLoss, state_rows
from fastjepa.model.networks import Projector


def test_rows_are_pixels() -> None:
    state = torch.arange(2 * 3 * 2 * 2 * 2.0).view(2, 3, 2, 2, 2)
    rows = state_rows(state)
    assert rows.shape == (16, 3)
    assert torch.equal(rows[5], state[0, :, 1, 0, 1])


def test_std_and_cov_against_torch() -> None:
    features = torch.randn(50, 7, dtype=torch.float64) * torch.linspace(0.1, 2, 7)
    std, cov = std_and_cov_loss(features)
    expected_std = torch.relu(1 - (features.var(dim=0) + 1e-4).sqrt()).mean()
    matrix = torch.cov(features.T)
    off = matrix[~torch.eye(7, dtype=torch.bool)]
    torch.testing.assert_close(std, expected_std, rtol=1e-12, atol=0)
    torch.testing.assert_close(cov, off.square().mean(), rtol=1e-12, atol=0)


def test_vc_loss_weighs_its_parts() -> None:
    state = torch.rand(2, 4, 3, 5, 5, dtype=torch.float64)
    weighted, unweighted, parts = VCLoss(3.0, 7.0, Projector("4-6-5").double())(state)
    torch.testing.assert_close(weighted, 3 * parts["std_loss"] + 7 * parts["cov_loss"])
    torch.testing.assert_close(unweighted, parts["std_loss"] + parts["cov_loss"])


def test_square_loss_sends_gradients_both_ways_and_projects_the_state_first() -> None:
    proj = Projector("3-4-2").double()
    a = torch.rand(1, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    b = torch.rand(1, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = SquareLossSeq(proj)(a, b)
    loss.backward()
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.abs().sum() > 0
    assert b.grad.abs().sum() > 0
    reference = Projector("3-4-2").double()
    reference.load_state_dict(proj.state_dict())
    for name, buffer in reference.named_buffers():
        buffer.fill_(1.0 if name.endswith("var") else 0)
    target, prediction = reference(state_rows(a)), reference(state_rows(b))
    torch.testing.assert_close(loss, (target - prediction).square().mean())
    torch.testing.assert_close(dict(proj.named_buffers()), dict(reference.named_buffers()))


def test_losses_are_fp32_under_autocast() -> None:
    state = torch.rand(2, 4, 3, 5, 5)
    proj = Projector("4-6-5")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = VCLoss(1.0, 1.0, proj)(state)[0]
    assert inside.dtype == torch.float32
    assert torch.equal(inside, VCLoss(1.0, 1.0, proj)(state)[0])


def test_one_feature_has_no_covariance() -> None:
    assert std_and_cov_loss(torch.rand(5, 1))[1] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: std_and_cov_loss(torch.rand(1, 4)), "variance of 1 row"),
        (lambda: VCLoss(1, 1)(torch.rand(2, 4, 8, 8)), r"expected a state \(B, D, T, H, W\)"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
