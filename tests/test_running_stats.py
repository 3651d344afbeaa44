from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastjepa.model.running_stats import BatchStatistics, advance_buffers, calls_in_order


def layer(momentum: float | None, **options: bool) -> nn.BatchNorm1d:
    torch.manual_seed(0)
    bn = nn.BatchNorm1d(3, momentum=momentum, **options).double()
    if bn.running_mean is not None:
        bn.running_mean.normal_()
    return bn


def rows(seed: int) -> Tensor:
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(seed)).double() * (seed + 1)


def assert_same_buffers(actual: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(dict(actual.named_buffers()), dict(expected.named_buffers()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, 0.9, 1.0, None])
@pytest.mark.parametrize("earlier_calls", [0, 2])
@pytest.mark.parametrize("order", [[0, 0, 0], [0, 0, 1, 0, 2], [0, 1, 2]])
@pytest.mark.parametrize("called", [True, False])
def test_each_called_once_counts_as_the_original_order(
    momentum: float | None, earlier_calls: int, order: list[int], called: bool
) -> None:
    """z, z, p¹, z, p², as a training step makes them; by calls or by what is known of their statistics."""
    single, original = layer(momentum), layer(momentum)
    for bn in (single, original):
        for _ in range(earlier_calls):
            bn(rows(5))
    inputs = [rows(1 + i) for i in range(1 + max(order))]
    if called:
        outputs = calls_in_order(single, order, [lambda x=x: single(x) for x in inputs])
    else:
        advance_buffers(single, order, [BatchStatistics(x.mean(0), x.var(0)) for x in inputs])
    expected = [original(inputs[i]) for i in order]
    assert_same_buffers(single, original)
    assert single.momentum == momentum
    if called:
        for i, output in enumerate(outputs):
            assert torch.equal(output, expected[order.index(i)])


def test_autograd_stays_intact() -> None:
    bn = layer(0.1)
    x = rows(1).requires_grad_()
    out, other = calls_in_order(bn, [0, 1, 0], [lambda: bn(x), lambda: bn(rows(2))])
    advance_buffers(bn, [0, 0], [BatchStatistics(x.mean(0), x.var(0))])
    (out.square() + other).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("bn", [layer(0.1).eval(), layer(0.1, track_running_stats=False)], ids=["eval", "untracked"])
def test_layers_without_moving_buffers_are_left_alone(bn: nn.BatchNorm1d) -> None:
    before = {name: buffer.clone() for name, buffer in bn.named_buffers()}
    calls_in_order(bn, [0, 0, 0], [lambda: bn(rows(1))])
    advance_buffers(bn, [0, 0], [BatchStatistics(rows(1).mean(0), rows(1).var(0))])
    assert all(torch.equal(buffer, before[name]) for name, buffer in bn.named_buffers())
