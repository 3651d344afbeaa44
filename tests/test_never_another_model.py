"""What is not known to be the published model is computed as its author wrote it, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import fastjepa
from fastjepa.model.jepa import JEPA
from fastjepa.model.networks import Projector
from fastjepa.model.probes import JEPAProbe
from fastjepa.model.step import TrainStep
from tiny import tiny_batch, tiny_jepa, tiny_model

STEPS = 2


def double_model() -> tuple[JEPA, nn.Module, nn.Module]:
    jepa, decoder, head = (module.double() for module in tiny_model())
    return jepa, decoder, head  # type: ignore[return-value]


def double_batch() -> tuple[Tensor, Tensor]:
    video, digit_location = tiny_batch()
    return video.double(), digit_location.double()


def as_its_author_wrote(jepa: Any, decoder: Any, head: Any) -> dict[str, Tensor]:
    """Losses, gradients and buffers of a step that calls everything as eb_jepa's training loop does."""
    video, digit_location = double_batch()
    _, losses = jepa.unroll(video, None, nsteps=STEPS)
    recon = decoder(video, video) if isinstance(decoder, JEPAProbe) else F.mse_loss(decoder(jepa.encode(video)), video)
    det = F.binary_cross_entropy(head(jepa.encode(video)), digit_location)
    (losses[0] + recon + det).backward()
    return {"jepa": losses[0].detach(), "recon": recon.detach(), "det": det.detach()} | state_of(jepa)


def of_a_step(jepa: Any, decoder: Any, head: Any) -> dict[str, Tensor]:
    losses = TrainStep(jepa, decoder, head, steps=STEPS)(*double_batch())
    return {"jepa": losses.jepa, "recon": losses.recon, "det": losses.det} | state_of(jepa)


def state_of(jepa: nn.Module) -> dict[str, Tensor]:
    gradients = {f"gradient {name}": p.grad for name, p in jepa.named_parameters() if p.grad is not None}
    return gradients | {name: buffer.double() for name, buffer in jepa.named_buffers()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-9 * max(float(value.norm()), 1e-3), name


# ---- compositions ----


class OtherUnroll(JEPA):
    def unroll(self, *arguments: Any, **options: Any) -> Any:
        states, losses = super().unroll(*arguments, **options)
        assert losses is not None
        return states, (losses[0] + 1, *losses[1:])


class OtherEncode(JEPA):
    @torch.no_grad()
    def encode(self, observations: Tensor) -> Tensor:
        return 2 * super().encode(observations)


def set_unroll(jepa: Any) -> None:
    unroll = jepa.unroll

    def doubled(*arguments: Any, **options: Any) -> Any:
        states, losses = unroll(*arguments, **options)
        return states, (2 * losses[0], *losses[1:])

    jepa.unroll = doubled


def of_class(kind: type[JEPA]) -> Callable[[Any], None]:
    def change(jepa: Any) -> None:
        jepa.__class__ = kind

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (of_class(OtherUnroll), "OtherUnroll has its own unroll"),
        (of_class(OtherEncode), "OtherEncode has its own encode"),
        (set_unroll, "JEPA has its own unroll"),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_another_composition_is_computed_as_written(change: Any, problem: str, later: bool) -> None:
    theirs, ours = double_model(), double_model()
    change(theirs[0])
    expected = as_its_author_wrote(*theirs)
    if later:
        step = TrainStep(*ours, steps=STEPS)
        assert step.jepa_problem is None
        change(ours[0])
        losses = step(*double_batch())
        found = {"jepa": losses.jepa, "recon": losses.recon, "det": losses.det} | state_of(ours[0])
    else:
        change(ours[0])
        found = of_a_step(*ours)
    assert_same(found, expected)
    assert TrainStep(*ours, steps=STEPS).jepa_problem == problem


def test_an_unroll_without_the_losses_is_refused_by_name() -> None:
    jepa, *heads = double_model()
    object.__setattr__(jepa, "unroll", lambda *_, **__: (None, None))
    with pytest.raises(TypeError, match=r"JEPA.unroll must return \(states, losses\)"):
        TrainStep(jepa, *heads, steps=1)(*double_batch())


class ScaledProbe(JEPAProbe):
    def forward(self, observations: Tensor, targets: Tensor) -> Tensor:
        return 3 * super().forward(observations, targets)


def test_a_probe_with_a_forward_of_its_own_is_called() -> None:
    theirs, ours = double_model(), double_model()
    expected = as_its_author_wrote(theirs[0], ScaledProbe(theirs[0], theirs[1], nn.MSELoss()), theirs[2])
    assert_same(of_a_step(ours[0], ScaledProbe(ours[0], ours[1], nn.MSELoss()), ours[2]), expected)


class UnitProjector(Projector):
    def forward(self, rows: Tensor) -> Tensor:
        return F.normalize(super().forward(rows), dim=1)


@pytest.mark.parametrize("spec", ["4-6-6-5", "4-5", "4-6-1"])
def test_projectors_of_any_depth(spec: str) -> None:
    theirs, ours = double_model(), double_model()
    torch.manual_seed(0)
    projector = Projector(spec).double()
    for jepa in (theirs[0], ours[0]):
        jepa.regularizer.proj = jepa.predcost.proj = copy.deepcopy(projector)
        jepa.predcost.proj = jepa.regularizer.proj
    assert_same(of_a_step(*ours), as_its_author_wrote(*theirs))


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_projector_that_is_not_its_net(accelerated: bool) -> None:
    theirs, ours = double_model(), double_model()
    for jepa in (theirs[0], ours[0]):
        jepa.regularizer.proj.__class__ = UnitProjector
    expected = as_its_author_wrote(*theirs)
    if accelerated:
        fastjepa.accelerate(ours[0], verbose=False)
    assert_same(of_a_step(*ours), expected)


# ---- what is registered later ----


def hook_that_doubles(jepa: Any, name: str) -> None:
    jepa.get_submodule(name).register_forward_hook(lambda module, args, out: 2 * out)


def other_weights(jepa: Any, name: str) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    module = jepa.get_submodule(name)
    if hasattr(module, "weight"):
        parametrize.register_parametrization(module, "weight", Doubled())


def set_forward(jepa: Any, name: str) -> None:
    module = jepa.get_submodule(name)
    forward = module.forward
    module.forward = lambda *arguments: 2 * forward(*arguments)


@pytest.mark.parametrize("register", [hook_that_doubles, other_weights, set_forward])
@pytest.mark.parametrize("name", ["regularizer.proj.net.0", "regularizer.proj"])
def test_what_is_registered_on_a_projector_later_acts(register: Any, name: str) -> None:
    theirs, ours = double_model(), double_model()
    register(theirs[0], name)
    expected = as_its_author_wrote(*theirs)
    fastjepa.accelerate(ours[0], verbose=False)
    step = TrainStep(*ours, steps=STEPS)
    register(ours[0], name)
    losses = step(*double_batch())
    assert losses.jepa.item() == pytest.approx(expected["jepa"].item(), rel=1e-9)


@pytest.mark.parametrize("register", [hook_that_doubles, other_weights, set_forward])
@pytest.mark.parametrize(
    "name",
    ["encoder.layer1.conv1", "encoder.layer2", "predictor.predictor.bn1", "predictor.predictor.dec1", "encoder"],
)
def test_what_is_registered_on_a_fused_network_later_acts(register: Any, name: str, device: str) -> None:
    plain = tiny_jepa().to(device)
    fused = fastjepa.accelerate(copy.deepcopy(plain), backend="fused", verbose=False)
    video = tiny_batch(1, 4, (8, 8))[0].to(device)
    for jepa in (plain, fused):
        register(jepa, name)
    expected, found = (jepa.unroll(video, compute_loss=False)[0] for jepa in (plain, fused))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_hook_of_all_modules_acts_on_fused_networks(device: str) -> None:
    jepa = fastjepa.accelerate(tiny_jepa().to(device), backend="fused", verbose=False)
    called: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, args, out: called.append(module))
    try:
        jepa.encode(tiny_batch(1, 3, (8, 8))[0].to(device))
    finally:
        handle.remove()
    assert jepa.encoder.layer1.conv1 in called


def test_a_copy_of_a_fused_network_watches_its_own_modules(device: str) -> None:
    jepa = fastjepa.accelerate(tiny_jepa().to(device), backend="fused", verbose=False)
    twin = copy.deepcopy(jepa)
    called: list[nn.Module] = []
    twin.encoder.layer1.conv1.register_forward_hook(lambda module, args, out: called.append(module))
    for model in (jepa, twin):
        model.encode(tiny_batch(1, 3, (8, 8))[0].to(device))
    assert called == [twin.encoder.layer1.conv1]


# ---- precisions ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", ["plain", "accelerated", "restored"])
def test_models_in_another_precision(dtype: torch.dtype, training: bool, way: str) -> None:
    truth, jepa = (tiny_jepa().to(dtype) for _ in range(2))
    truth = truth.double().train(training)
    if way != "plain":
        fastjepa.accelerate(jepa, verbose=False)
    if way == "restored":
        fastjepa.restore(jepa)
    jepa.train(training)
    video = tiny_batch()[0].to(dtype)
    expected, found = (model.unroll(x, None, nsteps=STEPS)[1] for model, x in ((truth, video.double()), (jepa, video)))
    assert expected is not None
    assert found is not None
    assert found[0].dtype == torch.promote_types(dtype, torch.float32)
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-9}[dtype]
    assert found[0].item() == pytest.approx(expected[0].item(), rel=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_step_in_another_precision(dtype: torch.dtype) -> None:
    step = TrainStep(*(module.to(dtype) for module in tiny_model()), steps=STEPS)  # type: ignore[arg-type]
    losses = step(*(tensor.to(dtype) for tensor in tiny_batch()))
    assert all(loss.isfinite() for loss in losses)
    assert losses.total.dtype == torch.promote_types(dtype, torch.float32)


# ---- one clear error ----


def test_a_video_with_time_before_channels() -> None:
    video = torch.rand(2, 5, 1, 8, 8)
    with pytest.raises(ValueError, match=r"\(B, C, T, H, W\).* C = 1, got shape \(2, 5, 1, 8, 8\)"):
        tiny_jepa().encode(video)
