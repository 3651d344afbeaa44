"""The fused blocks and networks against the eager ones they are made from: results, gradients and buffers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compare import assert_near
from fastjepa.fused.networks import FusedResidualBlock, FusedResNet5, FusedResUNet, FusedStateOnlyPredictor
from fastjepa.model.networks import ResidualBlock, ResNet5, ResUNet, StateOnlyPredictor

# The contract for whole models in fp32: results and buffers to 1e-5 of their norm, gradients to 1e-4.
RESULT, GRADIENT = 1e-5, 1e-4

CASES: dict[str, tuple[nn.Module, Any, tuple[int, ...]]] = {
    "identity block": (ResidualBlock(3, 3), FusedResidualBlock, (2, 3, 7, 5)),
    "block with a shortcut": (ResidualBlock(3, 4), FusedResidualBlock, (2, 3, 7, 5)),
    "block with a stride": (ResidualBlock(3, 4, stride=2), FusedResidualBlock, (2, 3, 7, 5)),
    "encoder of frames": (ResNet5(1, 3, 4), FusedResNet5, (3, 1, 9, 10)),
    "encoder of a video": (ResNet5(2, 3, 4), FusedResNet5, (2, 2, 3, 8, 8)),
    "unet": (ResUNet(4, 3, 2), FusedResUNet, (2, 4, 16, 16)),
    "unet of an odd size": (ResUNet(4, 3, 2), FusedResUNet, (3, 4, 11, 9)),
    "predictor": (StateOnlyPredictor(ResUNet(6, 2, 3)), FusedStateOnlyPredictor, (2, 3, 4, 12, 10)),
}


def run(network: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(result and buffers, gradients) of one training-mode call under a fixed random weighting."""
    x = x.clone().requires_grad_()
    network.train()
    out = network(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    (out * weight).sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"out": out.detach(), **dict(network.named_buffers())}, {"x": x.grad, **gradients}


@pytest.mark.parametrize("case", CASES)
def test_results_gradients_and_buffers(case: str, device: str) -> None:
    torch.manual_seed(0)
    network, kind, shape = CASES[case]
    eager = copy.deepcopy(network).to(device)
    for layer in eager.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
    fused = kind.from_eager(copy.deepcopy(eager))
    x = torch.rand(shape, generator=torch.Generator().manual_seed(2)).to(device)  # ≥ 0, as videos and states are
    (results, gradients), (expected, wanted) = run(fused, x), run(eager, x)
    assert_near(results, expected, RESULT)
    assert_near(gradients, wanted, GRADIENT)
    fused.eval()
    eager.eval()
    with torch.no_grad():
        assert_near({"eval": fused(x)}, {"eval": eager(x)}, RESULT)


def test_a_fused_network_shares_everything_with_the_eager_one(device: str) -> None:
    eager = ResUNet(4, 2, 3).to(device)
    fused = FusedResUNet.from_eager(eager)
    for own, shared in (
        (eager.named_parameters(), fused.named_parameters()),
        (eager.named_buffers(), fused.named_buffers()),
    ):
        assert {name: id(t) for name, t in own} == {name: id(t) for name, t in shared}


def test_no_second_derivative(device: str) -> None:
    x = torch.rand(1, 2, 8, 8, device=device, requires_grad=True)
    block = FusedResidualBlock.from_eager(ResidualBlock(2, 2).to(device))
    (gradient,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again|double backward"):
        gradient.sum().backward()


def test_under_torch_compile(device: str) -> None:
    """As one graph, with the gradients of the block it replaces."""
    torch.manual_seed(0)
    block = ResidualBlock(2, 3, stride=2).to(device)
    compiled = torch.compile(FusedResidualBlock.from_eager(block), backend="aot_eager", fullgraph=True)
    x = torch.rand(2, 2, 6, 6, device=device)
    weight = torch.rand(2, 3, 3, 3, device=device)
    found = torch.autograd.grad((compiled(x) * weight).sum(), list(block.parameters()))
    expected = torch.autograd.grad((block(x) * weight).sum(), list(block.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=GRADIENT, atol=GRADIENT)
