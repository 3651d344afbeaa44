"""A step of the original's JEPA and probes is the original's own training loop, and no loss is taken for another."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjepa
from fastjepa.eb_jepa import OriginalStep, TrainStep
from fastjepa.graphs import GraphedTrainStep, make_capturable
from fastjepa.model.losses import VCLoss
from fastjepa.model.probes import JEPAProbe, probe_head
from fastjepa.model.step import build_optimizer
from graph_cases import some_clips
from original import (
    MLP,
    ActionRegularizer,
    Detector,
    OriginalJEPA,
    Painter,
    PredictionCost,
    Probe,
    Regularizer,
    _rows,
    action_jepa,
    original_jepa,
)
from tiny import tiny_batch, tiny_model

STATES = 5  # channels, which the image decoder of the original must be told twice
Model = tuple[OriginalJEPA, Probe, Probe, torch.optim.Adam]
Tensors = dict[str, Tensor]


class StoppedCost(PredictionCost):
    """The same number, with another gradient."""

    def forward(self, state: Tensor, predi: Tensor) -> Tensor:
        return super().forward(state.detach(), predi)


class SwappedCost(PredictionCost):
    """The same number and gradients; the projector's buffers remember another order."""

    def forward(self, state: Tensor, predi: Tensor) -> Tensor:
        prediction = self.proj(_rows(predi))
        return F.mse_loss(self.proj(_rows(state)), prediction)


class AbsoluteCost(PredictionCost):
    def forward(self, state: Tensor, predi: Tensor) -> Tensor:
        return F.l1_loss(self.proj(_rows(state)), self.proj(_rows(predi)))


class NoisyCost(PredictionCost):
    def forward(self, state: Tensor, predi: Tensor) -> Tensor:
        return super().forward(state, predi) + torch.rand(())


class DoubledRegularizer(Regularizer):
    def forward(self, x: Tensor, actions: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, float]]:
        loss, unweighted, parts = super().forward(x, actions)
        return 2 * loss, unweighted, parts


def other_margin(jepa: OriginalJEPA) -> None:
    jepa.regularizer.std_loss_fn.std_margin = 2.0  # type: ignore[union-attr]


def several_losses(jepa: OriginalJEPA) -> None:
    jepa.regularizer = ActionRegularizer(8.0, 16.0, 12.0, idm=nn.Linear(1, 1)).double()


def hooked(jepa: OriginalJEPA) -> None:
    jepa.regularizer.register_forward_hook(lambda _module, _inputs, output: (output[0] * 3, *output[1:]))


def replaced(name: str, kind: Callable[..., nn.Module], *arguments: Any) -> Callable[[OriginalJEPA], None]:
    return lambda jepa: setattr(jepa, name, kind(*arguments, getattr(jepa, name).proj))


def without_projector(jepa: OriginalJEPA) -> None:
    jepa.regularizer, jepa.predcost = Regularizer(10.0, 100.0), PredictionCost()


# What is changed in the published JEPA → the reason for which its losses are called as they are, or "".
JEPAS: dict[str, tuple[Callable[[OriginalJEPA], object], str]] = {
    "published": (lambda _: None, ""),
    "no projector": (without_projector, ""),
    "another margin": (other_margin, "regularizer: its std_margin is 2.0, and the published one is 1"),
    "another regularizer": (replaced("regularizer", DoubledRegularizer, 10.0, 100.0), "regularizer: .*something else"),
    "several losses": (several_losses, "regularizer: ActionRegularizer has no proj"),
    "hooks": (hooked, "regularizer: Regularizer has hooks"),
    "a stopped gradient": (replaced("predcost", StoppedCost), "predcost: .*something else"),
    "another order": (replaced("predcost", SwappedCost), "predcost: .*something else"),
    "another cost": (replaced("predcost", AbsoluteCost), "predcost: .*something else"),
}


def model(change: Callable[[OriginalJEPA], object] = lambda _: None) -> Model:
    """As the original's script builds it, in float64."""
    torch.manual_seed(0)
    jepa = original_jepa(d=STATES).double()
    change(jepa)
    pixel_decoder = Probe(jepa, Painter(STATES, 1, hidden_dim=STATES), nn.MSELoss()).double()
    detection_head = Probe(jepa, Detector(STATES, 3, 1), nn.BCELoss()).double()
    optimizer = torch.optim.Adam(
        [
            {"params": jepa.parameters(), "lr": 1e-3},
            {"params": pixel_decoder.head.parameters(), "lr": 1e-4},
            {"params": detection_head.head.parameters(), "lr": 1e-3},
        ]
    )
    return jepa, pixel_decoder, detection_head, optimizer


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [tuple(t.double() for t in tiny_batch(2, 4, (11, 13), seed)) for seed in range(count)]  # type: ignore[misc]


def their_loop(parts: Model, steps: int) -> list[Tensors]:
    """The training loop of the original's script."""
    jepa, pixel_decoder, detection_head, optimizer = parts
    losses = []
    for x, loc_map in batches():
        optimizer.zero_grad()
        _, (jepa_loss, regl, unweighted, regldict, pl) = jepa.unroll(x, actions=None, nsteps=steps)
        recon_loss = pixel_decoder(x, x)
        det_loss = detection_head(x, loc_map)
        total_loss = jepa_loss + recon_loss + det_loss
        total_loss.backward()
        optimizer.step()
        named = {"total": total_loss, "jepa": jepa_loss, "vc": regl, "vc_unweighted": unweighted, "pred": pl}
        named |= {
            name.removesuffix("_loss"): torch.tensor(regldict[name], dtype=torch.float64)
            for name in ("std_loss", "cov_loss")
        }
        losses.append(named | {"recon": recon_loss, "det": det_loss})
    return losses


def everything(parts: Model, losses: list[Tensors]) -> Tensors:
    """Losses; gradients of the last step; parameters and buffers afterwards."""
    found = {f"{i} {name}": value.detach().double() for i, named in enumerate(losses) for name, value in named.items()}
    for root, module in zip(("jepa", "decoder", "head"), (parts[0], parts[1].head, parts[2].head), strict=True):
        found |= {f"{root}.{name}": value.double() for name, value in module.state_dict().items()}
        found |= {f"gradient {root}.{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return found


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(value.norm()), 1e-3)  # gradients that are analytically 0 are noise around 1e-17
        assert float((found[name] - value).norm()) <= 1e-9 * scale, name


@pytest.mark.parametrize("kind", [TrainStep, OriginalStep])
@pytest.mark.parametrize("case", JEPAS)
def test_a_step_is_the_original_loop(case: str, kind: type[TrainStep]) -> None:
    change, problem = JEPAS[case]
    theirs, ours = model(change), model(change)
    expected = everything(theirs, their_loop(theirs, steps=3))
    numbers = torch.get_rng_state()
    step = kind(*ours, steps=3)
    assert torch.equal(torch.get_rng_state(), numbers)  # looking at the losses leaves them alone
    if problem and kind is not OriginalStep:
        assert re.match(problem, step.loss_problem or "")
    elif kind is not OriginalStep:
        assert step.jepa_problem is None
        assert step.loss_problem is None
    found = everything(ours, [step(*batch)._asdict() for batch in batches()])
    assert_equal(found, expected)


@pytest.mark.parametrize("as_probes", [True, False])
def test_heads_and_probes(as_probes: bool) -> None:
    jepa, *probes, optimizer = model()
    heads = [probe.head for probe in probes]
    step = TrainStep(jepa, *(probes if as_probes else heads), optimizer, steps=1)
    assert [step.image_decoder, step.detection_head] == heads
    built = build_optimizer(jepa, *(probes if as_probes else heads), lr=1e-3)
    assert [len(group["params"]) for group in built.param_groups] == [
        len(list(module.parameters())) for module in (jepa, *heads)
    ]


def test_our_own_probes_are_taken_too() -> None:
    jepa, decoder, head = tiny_model()
    step = TrainStep(jepa, JEPAProbe(jepa, decoder, nn.MSELoss()), JEPAProbe(jepa, head, nn.BCELoss()), steps=1)
    assert (step.image_decoder, step.detection_head) == (decoder, head)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("image_decoder", lambda jepa, head: Probe(original_jepa(), head, nn.MSELoss()), "a probe of another JEPA"),
        ("image_decoder", lambda jepa, head: Probe(jepa, head, nn.L1Loss()), r"is L1Loss\(\), and .* MSELoss\(\)"),
        ("image_decoder", lambda jepa, head: Probe(jepa, head, nn.MSELoss(reduction="sum")), r"is MSELoss\(\)"),
        ("detection_head", lambda jepa, head: Probe(jepa, head, nn.MSELoss()), r"is MSELoss\(\), and .* BCELoss\(\)"),
        ("detection_head", lambda jepa, head: Probe(jepa, head, nn.BCELoss(torch.ones(1))), "give its head alone"),
    ],
)
def test_probes_that_a_step_would_compute_wrongly(name: str, make: Any, message: str) -> None:
    jepa, pixel_decoder, detection_head, _ = model()
    probes = {"image_decoder": pixel_decoder, "detection_head": detection_head}
    probes[name] = make(jepa, probes[name].head)
    with pytest.raises(ValueError, match=rf"{name} .*{message}"):
        TrainStep(jepa, **probes, steps=1)


def test_a_head_with_a_head_is_no_probe() -> None:
    head = Detector(STATES, 3, 1)
    assert probe_head("detection_head", head, original_jepa(), nn.BCELoss) is head


def test_models_that_a_step_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"jepa.predictor is recurrent \(GRUPredictor\)"):
        TrainStep(action_jepa(), nn.Identity(), nn.Identity(), steps=1)
    with pytest.raises(ValueError, match="jepa has no module 'encoder'"):
        TrainStep(nn.Linear(1, 1), nn.Identity(), nn.Identity(), steps=1)


def test_an_explicit_projection_that_the_losses_do_not_have() -> None:
    jepa, *rest = model(other_margin)
    with pytest.raises(ValueError, match="projection='closed_form' is not supported: regularizer: its std_margin"):
        TrainStep(jepa, *rest, steps=1, projection="closed_form")
    assert TrainStep(jepa, *rest, steps=1, projection="eager").loss_problem is not None


def test_losses_that_change_later_are_looked_at_again() -> None:
    theirs, ours = model(), model()
    step = TrainStep(*ours, steps=1)
    assert step.loss_problem is None
    for jepa in (theirs[0], ours[0]):
        other_margin(jepa)
    assert_equal(everything(ours, [step(*b)._asdict() for b in batches()]), everything(theirs, their_loop(theirs, 1)))
    ours[0].regularizer = VCLoss(1.0, 1.0)
    assert step.loss_problem is None
    step.projection = "closed_form"
    ours[0].predcost = StoppedCost()
    with pytest.raises(ValueError, match="is not supported: predcost"):
        step(*batches()[0])


@pytest.mark.parametrize(
    ("case", "swapped"), [("published", ("regularizer", "predcost")), ("another margin", ("predcost",))]
)
def test_an_accelerated_jepa_trains_as_before(case: str, swapped: tuple[str, ...]) -> None:
    """Also where one of two losses that share a projector is swapped: each moves the buffers that the other used."""
    change, problem = JEPAS[case]
    theirs, ours = model(change), model(change)
    expected = everything(theirs, their_loop(theirs, steps=2))
    fastjepa.accelerate(ours[0], verbose=False)
    assert ours[0].acceleration.swapped == swapped
    step = TrainStep(*ours, steps=2)
    assert re.match(problem or "$", step.loss_problem or "")
    assert_equal(everything(ours, [step(*batch)._asdict() for batch in batches()]), expected)


class FrameByFrame(nn.Module):
    """Calls its BatchNorm once for each frame, so that its buffers remember the frames' order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, STATES, 3, padding=1), nn.BatchNorm2d(STATES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.norm(self.conv(frame)) for frame in x.unbind(2)], 2).relu()


def frame_by_frame(jepa: OriginalJEPA) -> None:
    jepa.encoder = jepa.action_encoder = FrameByFrame().double()


def two_projectors(jepa: OriginalJEPA) -> None:
    jepa.predcost = PredictionCost(MLP(f"{STATES}-6-5").double())


def frozen_projector(jepa: OriginalJEPA) -> None:
    jepa.predcost.proj.eval()  # type: ignore[union-attr]


def cost_without_projector(jepa: OriginalJEPA) -> None:
    jepa.predcost = PredictionCost()


@pytest.mark.parametrize("change", [frame_by_frame, two_projectors, frozen_projector, cost_without_projector])
@pytest.mark.parametrize("accelerated", [False, True])
def test_unusual_models_train_as_in_their_loop(change: Callable[[OriginalJEPA], None], accelerated: bool) -> None:
    theirs, ours = model(change), model(change)
    for group in theirs[-1].param_groups + ours[-1].param_groups:
        group["eps"] = 1e-3  # with less, Adam makes steps of gradients that are analytically 0
    expected = everything(theirs, their_loop(theirs, steps=2))
    if accelerated:
        fastjepa.accelerate(ours[0], verbose=False)
        assert "regularizer" in ours[0].acceleration.swapped
    step = TrainStep(*ours, steps=2)
    assert_equal(everything(ours, [step(*batch)._asdict() for batch in batches()]), expected)


def test_an_explicit_path_that_does_not_cover_the_projectors() -> None:
    jepa, *rest = model(frozen_projector)
    with pytest.raises(ValueError, match="'closed_form' is not supported: the projector is in eval mode"):
        TrainStep(jepa, *rest, steps=1, projection="closed_form")(*batches()[0])


def test_probabilities_in_bf16() -> None:
    """A sigmoid of bf16 numbers is 1 from 0.998 on: an empty cell then costs 100 and teaches nothing."""
    jepa, pixel_decoder, detection_head, _ = (part.float() if isinstance(part, nn.Module) else part for part in model())
    with torch.no_grad():
        detection_head.head.head[0][2].bias.fill_(9.0)
    step = TrainStep(jepa, pixel_decoder, detection_head, steps=1, autocast_dtype=torch.bfloat16)
    video, _ = tiny_batch(2, 4, (11, 13))
    losses = step(video, torch.zeros(2, 4, 8, 8))
    assert losses.det.item() == pytest.approx(9.0, abs=0.2)
    bias = detection_head.head.head[0][2].bias
    assert bias.grad.item() == pytest.approx(1.0, abs=0.01)


def test_looking_at_a_loss_leaves_random_numbers_alone() -> None:
    jepa, *rest = model(replaced("predcost", NoisyCost))
    numbers = torch.get_rng_state()
    assert TrainStep(jepa, *rest, steps=1).loss_problem is not None
    assert torch.equal(torch.get_rng_state(), numbers)


@pytest.mark.parametrize("accelerated", [False, True])
def test_nothing_in_a_step_waits_for_the_device(accelerated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it can be captured: the numbers that the original's losses read on the host are not asked for."""
    jepa, *rest = model()
    if accelerated:
        fastjepa.accelerate(jepa, verbose=False)
    step = TrainStep(jepa, *rest, steps=2)
    video, digit_location = batches(1)[0]

    def waits(*_: Any) -> Any:
        raise AssertionError("a wait")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, waits)
    losses = step.losses(video, digit_location)
    losses.total.backward()
    with pytest.raises(AssertionError, match="a wait"):
        losses.total.item()


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize("case", ["published", "another margin"])
def test_the_graphed_step_is_the_plain_step(case: str) -> None:
    """On a CPU the same code runs plainly, on static memory."""
    change, _ = JEPAS[case]
    clips, indices = some_clips(), torch.tensor([4, 0, 5])
    plain, graphed = model(change), model(change)
    step = GraphedTrainStep(TrainStep(*graphed, steps=2), clips, dtype=torch.float64)
    make_capturable(plain[-1])  # the same arithmetic
    expected = TrainStep(*plain, steps=2)
    for _ in range(2):
        found, losses = step(indices), expected(*clips.batch(indices, torch.float64))
        assert all(torch.equal(x, y) for x, y in zip(found, losses, strict=True))
    assert step.recordings_made == 1
    graphed[0].regularizer.std_loss_fn.std_margin = 3.0  # type: ignore[union-attr]
    step(indices)
    assert step.recordings_made == 2
