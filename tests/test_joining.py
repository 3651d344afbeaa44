"""Concatenated skips that are used twice: eager's numbers, and gradients that nobody copied or added."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.traffic.counting import TrafficCounter
from fastjepa.fused import joining
from fastjepa.fused.joining import join_forked
from fastjepa.model.networks import join_skip

Join = Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]


def eager(x: Tensor, skip: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    joined = join_skip(x, skip[0])
    return joined, joined


def leaves(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, skip = (torch.randn(2, c, *hw, generator=generator) for c, hw in ((3, (4, 6)), (5, size)))
    return tuple(t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, skip))  # type: ignore[return-value]


@pytest.mark.parametrize("size", [(4, 6), (5, 7)], ids=["equal sizes", "resized"])
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=str)
def test_numbers(size: tuple[int, int], used: tuple[int, ...]) -> None:
    weights = [torch.randn(2, 8, *size, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]

    def run(join: Join) -> list[Tensor]:
        x, skip = leaves(size)
        outs = join(x, (skip, skip))
        loss = sum((outs[i] * weights[i]).sum() for i in used)
        assert isinstance(loss, Tensor)
        return [*outs, *torch.autograd.grad(loss, (x, skip))]

    for found, expected in zip(run(join_forked), run(eager), strict=True):
        assert torch.equal(found, expected)


def test_each_use_of_the_skip_gets_a_view_of_its_gradient() -> None:
    x, skip = leaves((4, 6))
    same = skip.detach().requires_grad_()
    outs = join_forked(x, (skip, same))
    assert outs[0].data_ptr() == outs[1].data_ptr()
    grads = [torch.randn(2, 8, 4, 6).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    grad_x, *to_skips = torch.autograd.grad(outs, (x, skip, same), grads)
    assert torch.equal(grad_x, grads[0][:, :3] + grads[1][:, :3])
    assert grad_x.is_contiguous(memory_format=torch.channels_last)
    for to_skip, grad in zip(to_skips, grads, strict=True):
        assert torch.equal(to_skip, grad[:, 3:])
        assert to_skip.untyped_storage().data_ptr() == grad.untyped_storage().data_ptr()


def test_what_needs_no_gradient_gets_none() -> None:
    x, skip = leaves((4, 6))
    out, _ = join_forked(x.detach(), (skip, skip.detach()))
    out.sum().backward()
    assert skip.grad is not None
    assert x.grad is None


def test_nothing_is_computed_for_what_needs_no_gradient() -> None:
    x, skip = leaves((4, 6))
    same = skip.detach().requires_grad_()
    grad = torch.randn(2, 8, 4, 6).contiguous(memory_format=torch.channels_last)
    without_x = join_forked(x.detach(), (skip, same))
    with TrafficCounter(lambda *_: "") as counter:
        torch.autograd.grad(without_x, (skip, same), (grad, grad))
    assert counter.events == []


def test_under_torch_compile_it_is_a_plain_concatenation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_Join", None)
    compiled = torch.compile(join_forked, backend="aot_eager", fullgraph=True)
    x, skip = leaves((4, 6))
    for found, expected in zip(compiled(x, (skip, skip)), eager(x, (skip, skip)), strict=True):
        assert torch.equal(found, expected)
