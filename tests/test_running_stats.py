from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastjepa.model.running_stats import BatchStatisticsRecorder, advance_buffers, repeated_updates


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
def test_one_call_counts_as_many(momentum: float | None, earlier_calls: int) -> None:
    once, often = layer(momentum), layer(momentum)
    for bn in (once, often):
        for _ in range(earlier_calls):
            bn(rows(5))
    with repeated_updates(once, 3):
        once(rows(1))
    for _ in range(3):
        often(rows(1))
    assert_same_buffers(once, often)
    assert once.momentum == momentum


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
def test_advanced_by_several_calls(momentum: float | None) -> None:
    """z, z, p¹, z, p², as a training step makes them: projected once each, advanced in the original's order."""
    single, original = layer(momentum), layer(momentum)
    z, p1, p2 = rows(1), rows(2), rows(3)
    before = {name: buffer.clone() for name, buffer in single.named_buffers()}
    with BatchStatisticsRecorder(single) as recorder:
        outputs, statistics = zip(*(recorder.call(lambda x=x: single(x)) for x in (z, p1, p2)), strict=True)
    assert all(torch.equal(buffer, before[name]) for name, buffer in single.named_buffers())
    assert single.momentum == momentum
    (sz,), (s1,), (s2,) = statistics
    advance_buffers(single, [sz, sz, s1, sz, s2])
    expected = [original(x) for x in (z, z, p1, z, p2)]
    assert_same_buffers(single, original)
    for output, index in zip(outputs, (0, 2, 4), strict=True):
        assert torch.equal(output, expected[index])


def test_recording_leaves_autograd_intact() -> None:
    bn = layer(0.1)
    x = rows(1).requires_grad_()
    with BatchStatisticsRecorder(bn) as recorder:
        out, statistics = recorder.call(lambda: bn(x))
    advance_buffers(bn, [statistics[0]] * 2)
    out.square().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("bn", [layer(0.1).eval(), layer(0.1, track_running_stats=False)], ids=["eval", "untracked"])
def test_layers_without_moving_buffers_are_left_alone(bn: nn.BatchNorm1d) -> None:
    before = {name: buffer.clone() for name, buffer in bn.named_buffers()}
    with repeated_updates(bn, 3), BatchStatisticsRecorder(bn) as recorder:
        _, statistics = recorder.call(lambda: bn(rows(1)))
    assert statistics == []
    assert all(torch.equal(buffer, before[name]) for name, buffer in bn.named_buffers())
