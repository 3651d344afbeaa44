"""Parameters that calls share: casts and gradients as autocast and autograd make them, in fewer kernels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.traffic.counting import TrafficCounter
from compare import assert_near
from fastjepa.fused import networks
from fastjepa.fused.networks import FusedResUNet, FusedStateOnlyPredictor
from fastjepa.fused.shared_parameters import _copy_all, is_plain_convolution, share_parameters
from fastjepa.model.jepa import parallel_unroll
from fastjepa.model.networks import ResUNet, StateOnlyPredictor

LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}
GRADIENT = 1e-4  # of the norm: the contract for whole models in fp32


class Layers(nn.Module):
    """A convolution, a transposed one and a BatchNorm, called K times in a row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.up = nn.ConvTranspose2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)


def run(layers: Layers, x: Tensor, calls: int, shared: bool) -> list[Tensor]:
    """Gradients of all parameters that are trained."""
    parameters = share_parameters(layers, "cpu") if shared else None
    for _ in range(calls):
        p = parameters() if parameters is not None else (lambda parameter: parameter)
        x = nn.functional.conv2d(x, _tensor(p, layers.conv.weight), p(layers.conv.bias), padding=1)
        x = nn.functional.conv_transpose2d(x, _tensor(p, layers.up.weight), p(layers.up.bias))
        x = nn.functional.batch_norm(x, None, None, p(layers.norm.weight), p(layers.norm.bias), training=True)
    trained = [p for p in layers.parameters() if p.requires_grad]
    return list(torch.autograd.grad((x * x.detach().sin()).sum(), trained))


def _tensor(parameter_of: Any, parameter: Tensor) -> Tensor:
    found = parameter_of(parameter)
    assert found is not None
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("frozen", [(), ("conv.weight", "norm.bias")], ids=["trained", "partly frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_several_calls(dtype: torch.dtype, frozen: tuple[str, ...], layout: torch.memory_format) -> None:
    layers = Layers().to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
    for name in frozen:
        layers.get_parameter(name).requires_grad_(False)
    x = torch.randn(2, 3, 5, 4, dtype=dtype)
    trained = [p for p in layers.parameters() if p.requires_grad]
    for found, expected, p in zip(run(layers, x, 3, True), run(layers, x, 3, False), trained, strict=True):
        torch.testing.assert_close(found, expected, rtol=LIMIT[dtype], atol=LIMIT[dtype])
        assert (found.dtype, found.stride()) == (p.dtype, p.stride())
        assert found.storage_offset() % 64 == 0  # gathered in one tensor, and aligned there


def test_the_gradients_of_a_call_are_one_copy() -> None:
    """Of a parameter that two convolutions have, too; and what has none is no work, but for zeros in its place."""
    layers = Layers()
    layers.tied = nn.Conv2d(3, 3, 3, padding=1)
    layers.tied.weight = layers.conv.weight
    parameters = list(layers.parameters())
    p = share_parameters(layers, "cpu")()
    outs = [_tensor(p, parameter) for parameter in parameters]
    assert all(out.data_ptr() == parameter.data_ptr() for out, parameter in zip(outs, parameters, strict=True))
    grads = [torch.randn_like(parameter) for parameter in parameters]
    with TrafficCounter(lambda *_: "") as counter:
        found = torch.autograd.grad(outs, parameters, grads, retain_graph=True)
        assert [event.name for event in counter.events] == ["aten._foreach_copy_"]
        counter.events.clear()
        torch.autograd.grad(outs[0], parameters, grads[0])
    assert [event.name for event in counter.events] == ["aten.zeros", "aten._foreach_copy_"]
    for value, grad in zip(found, grads, strict=True):
        assert torch.equal(value, grad)


def test_the_casts_are_those_of_autocast_and_gradients_come_back_in_fp32() -> None:
    layers = Layers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        p = share_parameters(layers, "cpu")()
        for conv in (layers.conv, layers.up):
            assert torch.equal(_tensor(p, conv.weight), conv.weight.to(torch.bfloat16))
            assert torch.equal(_tensor(p, conv.bias), conv.bias.to(torch.bfloat16))  # type: ignore[arg-type,union-attr]
        weight = _tensor(p, layers.norm.weight)
        assert weight.dtype == torch.float32
        assert weight.data_ptr() == layers.norm.weight.data_ptr()
        wide = Layers().double()
        assert _tensor(share_parameters(wide, "cpu")(), wide.conv.weight).dtype == torch.float64
    (3 * _tensor(p, layers.conv.weight)).sum().backward()
    assert layers.conv.weight.grad is not None
    assert layers.conv.weight.grad.dtype == torch.float32
    assert torch.equal(layers.conv.weight.grad, torch.full_like(layers.conv.weight, 3.0))
    assert layers.up.weight.grad is not None  # one tensor is the gradient of all
    assert not layers.up.weight.grad.any()


def test_one_copy_for_each_dtype_and_one_for_what_lies_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    together = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda a, b: (copied.append(len(a)), together(a, b))[1])
    shapes = [(2, 3), (4, 2, 1, 1), (4, 3, 3, 3), (5,)]
    sources = [torch.randn(shape) for shape in shapes]
    sources[1] = sources[1].as_strided((4, 2, 1, 1), (2, 1, 2, 2))  # the same memory, in other words
    sources[2] = sources[2].contiguous(memory_format=torch.channels_last)
    sources[3] = sources[3].to(torch.bfloat16)
    targets = [torch.zeros(shape) for shape in shapes]
    _copy_all(zip(targets, sources, strict=True))
    assert copied == [2, 1]
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source.float())


def test_calls_add_up_in_fp32() -> None:
    """In bf16, 256 + 1 is 256: eager adds the gradients of calls there, and casts the sum."""
    layers = Layers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parameters = share_parameters(layers, "cpu")
        calls = [_tensor(parameters(), layers.conv.weight) for _ in range(2)]
    (256 * calls[0] + calls[1]).sum().backward()
    assert layers.conv.weight.grad is not None
    assert torch.equal(layers.conv.weight.grad, torch.full_like(layers.conv.weight, 257.0))


def test_without_gradients_there_are_casts_only() -> None:
    layers = Layers()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        weight = _tensor(share_parameters(layers, "cpu")(), layers.conv.weight)
    assert weight.dtype == torch.bfloat16
    assert not weight.requires_grad
    with (
        torch.no_grad(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):  # which keeps casts itself, if it is the caller's
        assert share_parameters(layers, "cpu", callers_autocast=True)()(layers.conv.weight) is layers.conv.weight
    frozen = Layers().requires_grad_(False)
    assert not _tensor(share_parameters(frozen, "cpu")(), frozen.conv.weight).requires_grad
    frozen.up.requires_grad_(True)
    p = share_parameters(frozen, "cpu")()
    assert _tensor(p, frozen.up.weight).requires_grad
    assert not _tensor(p, frozen.conv.weight).requires_grad


def test_a_convolution_of_another_kind_is_called_itself() -> None:
    class Own(nn.Conv2d):
        pass

    hooked = nn.Conv2d(2, 2, 1)
    hooked.register_forward_hook(lambda *_: None)
    others = (Own(2, 2, 1), hooked, nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.Linear(2, 2))
    assert not any(is_plain_convolution(module) for module in others)
    assert is_plain_convolution(nn.Conv2d(2, 2, 1))
    p = share_parameters(nn.ModuleList(others), "cpu")()
    assert all(p(parameter) is parameter for module in others for parameter in module.parameters())


def test_hooks_of_inner_convolutions_are_called(device: str) -> None:
    seen = []
    fused = FusedResUNet.from_eager(ResUNet(4, 2, 3).to(device))
    fused.up2.register_forward_hook(lambda *_: seen.append(1))
    fused(torch.rand(2, 4, 8, 8, device=device))
    assert seen == [1]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (11, 9)])
def test_an_unroll_of_its_own_is_the_unroll(size: tuple[int, int], recompute: bool, steps: int, device: str) -> None:
    """Sequences, gradients of the state and of every parameter, and buffers: those of eager's steps one by one."""
    torch.manual_seed(0)
    eager = StateOnlyPredictor(ResUNet(6, 2, 3)).to(device)
    fused = FusedStateOnlyPredictor.from_eager(copy.deepcopy(eager), recompute=recompute)
    # As the encoder leaves it; windows of another layout would be copied, and the copies kept.
    video = torch.rand(2, 3, 4, *size, device=device).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(2, 3, 4, *size, device=device)

    def run(predictor: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        state = video.clone().requires_grad_()
        same, sequences = parallel_unroll(predictor, state, None, steps)
        loss = (same * weight).sum() + sum((s * weight).square().sum() for s in sequences)
        loss.backward()
        assert state.grad is not None
        gradients = {name: p.grad for name, p in predictor.named_parameters() if p.grad is not None}
        results = {f"p{k}": s.detach() for k, s in enumerate(sequences)} | dict(predictor.named_buffers())
        return results, gradients | {"state": state.grad}

    (results, gradients), (expected, wanted) = run(fused), run(eager)
    assert_near(results, expected, LIMIT[torch.float32])
    assert_near(gradients, wanted, GRADIENT)


def test_the_last_step_joins_no_windows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = []
    next_windows = networks.next_windows
    monkeypatch.setattr(networks, "next_windows", lambda *a: (joined.append(1), next_windows(*a))[1])
    fused = FusedStateOnlyPredictor.from_eager(StateOnlyPredictor(ResUNet(6, 2, 3)).to(device))
    with torch.no_grad():
        parallel_unroll(fused, torch.rand(2, 3, 4, 8, 8, device=device), None, 3)
    assert len(joined) == 2


@pytest.mark.parametrize("wrapped", ["hook", "compiled"])
def test_what_waits_for_calls_of_the_predictor_gets_them(wrapped: str, device: str) -> None:
    predictor: Any = FusedStateOnlyPredictor.from_eager(StateOnlyPredictor(ResUNet(6, 2, 3)).to(device))
    calls = []
    if wrapped == "hook":
        predictor.register_forward_hook(lambda *_: calls.append(1))
    else:

        def counting(graph: Any, _: Any) -> Any:
            return lambda *inputs: (calls.append(1), graph(*inputs))[1]

        predictor = torch.compile(predictor, backend=counting)
    with torch.no_grad():
        parallel_unroll(predictor, torch.rand(2, 3, 4, 8, 8, device=device), None, 2)
    assert len(calls) >= 2


def test_gradients_accumulate_over_backward_passes(device: str) -> None:
    """Two calls with a backward pass each, as with gradient accumulation; then both graphs at once."""
    torch.manual_seed(0)
    network = FusedResUNet.from_eager(ResUNet(4, 2, 3).to(device))
    x = torch.rand(2, 4, 8, 8, device=device)
    for _ in range(2):
        network(x).sum().backward()
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    (network(x).sum() + network(x).sum()).backward()
    together = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert_near(together, found, 1e-6)
    assert len(found) == len(list(network.parameters()))
