from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from fastjepa.fused.recompute import Recomputation, Registered
from fastjepa.fused.swap import accelerate
from fastjepa.model.networks import ResUNet
from fastjepa.model.step import TrainStep, build_optimizer
from tiny import tiny_batch, tiny_model


def test_a_tensor_is_computed_once_for_its_users_and_then_freed() -> None:
    computed = []

    def compute() -> Tensor:
        computed.append(1)
        return torch.rand(3)

    registered = Registered((), compute)
    registered.add_user()
    registered.add_user()
    for _ in range(2):  # two backward passes
        first = registered.take()
        assert registered.once() is first
        assert registered.take() is first
        assert registered._tensor is None
    assert len(computed) == 2
    registered.once()
    assert registered._tensor is None


def test_views_come_back_as_they_were() -> None:
    memory = Recomputation()
    (base,) = memory.register((torch.arange(24.0).view(2, 3, 4),), lambda: torch.arange(24.0).view(2, 3, 4))
    view = base[1:, :, ::2].transpose(1, 2)
    packed = memory.pack(view)
    assert not isinstance(packed, Tensor)
    assert torch.equal(memory.unpack(packed), view)
    assert memory.unpack(packed).stride() == view.stride()


def test_a_reused_address_is_not_mistaken_for_the_registered_tensor() -> None:
    memory = Recomputation()
    base = torch.zeros(1000)
    tensor, alias = memory.register((base, base.detach()), lambda: torch.zeros(1000))
    del base
    key = tensor.untyped_storage()._cdata
    other = torch.ones(1000)
    memory._registered[other.untyped_storage()._cdata] = memory._registered.pop(key)
    assert memory.registered(other) is not None
    del tensor
    gc.collect()
    assert memory.registered(other) is not None  # another tensor is the same memory
    del alias
    gc.collect()
    assert memory.registered(other) is None


def test_nothing_is_recorded_without_gradients() -> None:
    with torch.no_grad(), (memory := Recomputation()).hooks():
        (x,) = memory.register((torch.rand(3),), lambda: pytest.fail("never asked for"))
        (x * 2).sum()


@pytest.mark.usefixtures("ordered_sums")
def test_gradients_are_bitwise_those_of_kept_activations(device: str) -> None:
    """Also the second time, with retain_graph, and for odd sizes, where skips are resized."""
    from fastjepa.fused import networks as fused_module  # only here: it needs Triton

    torch.manual_seed(0)
    eager = ResUNet(4, 2, 3).to(device)
    network = fused_module.FusedResUNet.from_eager(eager, recompute=True)
    x = torch.rand(2, 4, 11, 9, device=device)
    weight = torch.rand(2, 3, 11, 9, device=device)
    parameters = list(network.parameters())
    loss = (network(x) * weight).sum()
    found = [torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2)]
    keeping = fused_module.FusedResUNet.from_eager(eager)
    assert not keeping.recompute
    kept = torch.autograd.grad((keeping(x) * weight).sum(), parameters)
    for again in found:
        assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))


@pytest.mark.usefixtures("ordered_sums")
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_a_training_step_is_bitwise_the_same(device: str, autocast_dtype: torch.dtype | None) -> None:
    """Losses, gradients, buffers and weights of the published step, also of the second, which begins where the first
    has moved them.
    """
    found = []
    for recompute in ("on", "off"):
        model = [module.to(device) for module in tiny_model()]
        accelerate(model[0], backend="fused", recompute=recompute, verbose=False)  # type: ignore[arg-type]
        assert model[0].encoder.recompute == (recompute == "on")
        step = TrainStep(*model, build_optimizer(*model, 1e-3), steps=2, autocast_dtype=autocast_dtype)  # type: ignore[arg-type]
        tensors: list[Tensor] = []
        for seed in (1, 2):
            losses = step(*(t.to(device) for t in tiny_batch(2, 4, (8, 8), seed)))
            gradients = [p.grad for module in model for p in module.parameters() if p.grad is not None]
            state = [value for module in model for value in module.state_dict().values()]
            tensors += [value.clone() for value in (*losses, *gradients, *state)]
        found.append(tensors)
    assert len(found[0]) == len(found[1]) > 100
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_without_recomputation_nothing_is_remembered() -> None:
    with (memory := Recomputation(False)).hooks():
        (x,) = memory.register((torch.rand(3, requires_grad=True) * 1,), lambda: pytest.fail("never asked for"))
        assert memory.registered(x) is None
        (x * x).sum().backward()
