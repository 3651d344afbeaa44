"""BatchNorm in train mode on a CPU, channels-last: statistics, gradients and buffers against float64, by the policy."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from compare import FP32_RELATIVE_LIMIT, largest_entry, max_error
from fastjepa.model.batch_norm import normalize
from fastjepa.model.jepa import build_jepa
from fastjepa.model.probes import build_probes
from fastjepa.model.step import TrainStep

SHAPES = [(3, 5, 7, 11), (2, 8, 64, 64), (40, 8, 64, 64), (1, 3, 1, 17), (9, 70, 5, 3), (2, 2100, 3, 3)]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def some_norm(channels: int, *, affine: bool = True, momentum: float | None = 0.1) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, affine=affine, momentum=momentum)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


def some_input(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = (1 + torch.randn(shape)).to(memory_format=torch.channels_last)
    return x, torch.randn(shape).to(memory_format=torch.channels_last)


def outcome(norm: nn.BatchNorm2d, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Everything that a call leaves, by `normalize` in the dtype of x."""
    norm = copy.deepcopy(norm).to(x.dtype)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = normalize(norm, x)
    out.backward(grad.to(x.dtype))
    assert x.grad is not None
    parameters = {name: p.grad for name, p in norm.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **parameters, **dict(norm.named_buffers())}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_result_is_within_the_policy(shape: tuple[int, ...], threads: int) -> None:
    x, grad = some_input(shape)
    norm = some_norm(shape[1])
    truth, found = outcome(norm, x.double(), grad), outcome(norm, x, grad)
    assert found.keys() == truth.keys()
    for name, exact in truth.items():
        assert max_error(found[name], exact) <= FP32_RELATIVE_LIMIT * largest_entry(exact), name


def test_statistics_of_many_rows_are_exact_where_torch_is_not(threads: int) -> None:
    x, grad = some_input((40, 8, 64, 64))
    norm = some_norm(8, momentum=1.0)
    truth = outcome(norm, x.double(), grad)["running_var"]
    found = outcome(norm, x, grad)["running_var"]
    assert max_error(found, truth) <= 1e-6 * largest_entry(truth)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("affine", [False, True])
def test_buffers_move_as_those_of_batch_norm(affine: bool, momentum: float | None) -> None:
    x, _ = some_input((4, 6, 9, 8))
    ours, theirs = (some_norm(6, affine=affine, momentum=momentum) for _ in range(2))
    for _ in range(3):
        normalize(ours, x)
        theirs(x.contiguous())
    for (name, buffer), expected in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-6, atol=1e-7, msg=name)


def test_the_layout_stays() -> None:
    x, grad = some_input((4, 6, 9, 8))
    found = outcome(some_norm(6), x, grad.contiguous())
    assert found["out"].is_contiguous(memory_format=torch.channels_last)
    assert found["x"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["hook", "eval", "contiguous", "subclass", "global hook"])
def test_a_call_that_somebody_waits_for_or_that_is_exact_anyway_is_the_modules_own(kind: str) -> None:
    x, _ = some_input((4, 6, 9, 8))
    calls: list[str] = []

    class Norm(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            calls.append("forward")
            return super().forward(x)

    norm = Norm(6) if kind == "subclass" else nn.BatchNorm2d(6)
    handle = None
    if kind == "hook":
        norm.register_forward_hook(lambda *_: calls.append("hook"))
    if kind == "global hook":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append("global hook"))
    try:
        out = normalize(norm.eval() if kind == "eval" else norm, x.contiguous() if kind == "contiguous" else x)
        expected = norm(x.contiguous() if kind == "contiguous" else x)
    finally:
        if handle is not None:
            handle.remove()
    assert torch.equal(out, expected)
    assert len(calls) == (0 if kind in ("eval", "contiguous") else 2)


def some_batch(side: int, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    video = torch.zeros(batch, 1, 6, side, side)
    for clip in video:
        top, left = torch.randint(0, side - 8, (2,), generator=generator).tolist()
        for t in range(6):
            clip[0, t, top : top + 8, left : min(left + t + 8, side)] = 0.5 + t / 12
    return video, (torch.rand(batch, 6, 8, 8, generator=generator) < 0.03).float()


def gradient_error(layout: torch.memory_format, threads: int) -> float:
    """Of all gradients of the JEPA in one step, by norm, against float64."""
    torch.manual_seed(3)
    jepa = build_jepa(dobs=1, henc=8, hpre=8, dstc=16, std_coeff=10.0, cov_coeff=100.0)
    probes = build_probes(dobs=1, dstc=16)
    video, maps = some_batch(32, 8)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        model = copy.deepcopy(jepa).to(dtype)
        if dtype == torch.float32:
            model.to(memory_format=layout)  # type: ignore[call-overload]
        TrainStep(model, *(copy.deepcopy(probe).to(dtype) for probe in probes), steps=2)(
            video.to(dtype), maps.to(dtype)
        )
        gradients.append(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]))
    truth, found = gradients
    return float((found - truth).norm() / truth.norm())


def test_a_step_is_as_exact_channels_last_as_contiguous(threads: int) -> None:
    assert gradient_error(torch.channels_last, threads) <= 2 * gradient_error(torch.contiguous_format, threads)


def test_gradients_can_be_differentiated_again() -> None:
    found = []
    for function in (normalize, nn.BatchNorm2d.forward):
        norm, (x, _) = copy.deepcopy(some_norm(6)).train(), some_input((4, 6, 9, 8))
        torch.manual_seed(1)
        nn.init.normal_(norm.weight)
        x.requires_grad_()
        (grad,) = torch.autograd.grad(function(norm, x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), [x, norm.weight]))
    for ours, theirs in zip(*found, strict=True):
        assert max_error(ours, theirs.double()) <= 1e-4 * largest_entry(theirs)


@pytest.mark.parametrize("kind", ["forward of its own", "vmap", "jvp", "trace"])
def test_whatever_takes_batch_norm_apart_meets_the_module(kind: str) -> None:
    x, tangent = some_input((4, 6, 9, 8))
    norm = nn.BatchNorm2d(6, track_running_stats=False)
    if kind == "forward of its own":
        norm.forward = lambda x: 2 * x  # type: ignore[method-assign]
        assert torch.equal(normalize(norm, x), 2 * x)
    elif kind == "vmap":
        many = torch.stack((x, 2 * x)).to(torch.float32)
        found = torch.func.vmap(lambda one: normalize(norm, one))(many)
        torch.testing.assert_close(found, torch.stack([norm(one.contiguous()) for one in many]))
    elif kind == "jvp":
        found, _ = torch.func.jvp(lambda one: normalize(norm, one), (x,), (tangent,))
        torch.testing.assert_close(found, norm(x.contiguous()))
    else:
        norm.requires_grad_(False)
        traced = torch.jit.trace(lambda one: normalize(norm, one), x)
        torch.testing.assert_close(traced(2 * x), norm(2 * x))
