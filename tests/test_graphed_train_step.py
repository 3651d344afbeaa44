from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastjepa.graphs import GraphedTrainStep, make_capturable, train_step
from fastjepa.graphs.capture import Recording
from fastjepa.model.jepa import eval_mode
from fastjepa.model.step import TrainStep, build_optimizer
from graph_cases import EVERY_DEVICE, batches, everything, same, some_clips, some_step
from tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.parametrize(("device", "count"), [("cpu", 8), pytest.param("cuda", 120, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_the_graphed_step_is_the_plain_step(device: str, count: int, autocast_dtype: torch.dtype | None) -> None:
    clips = some_clips(device)
    plain, graphed_step = (some_step(device, autocast_dtype=autocast_dtype) for _ in range(2))
    total = torch.zeros(9, dtype=torch.float64, device=device)
    graphed = GraphedTrainStep(graphed_step, clips, accumulators=[total])
    expected_total = torch.zeros_like(total)
    for i, indices in enumerate(batches(count, device)):
        graphed.set_lr(1e-3 / (1 + i))
        assert plain.optimizer is not None
        for group, other in zip(plain.optimizer.param_groups, graphed.optimizer.param_groups, strict=True):
            group["lr"].copy_(other["lr"])
        expected, losses = plain(*clips.batch(indices)), graphed(indices)
        assert all(torch.equal(x, y) for x, y in zip(expected, losses, strict=True)), i
        expected_total += torch.stack(expected)
    assert same(everything(plain), everything(graphed_step))
    assert torch.equal(total, expected_total)
    assert graphed.recordings_made == 2  # full and ragged


@EVERY_DEVICE
def test_several_steps_in_one_launch(device: str) -> None:
    clips = some_clips(device)
    one, several = (GraphedTrainStep(some_step(device), clips) for _ in range(2))
    indices = torch.stack(batches(6, device, ragged=False)).view(2, 3, 3)
    for launch in indices:
        expected = [one(batch) for batch in launch]
        losses = several(launch)
        assert losses.total.shape == (3,)
        for i in range(3):
            assert all(torch.equal(x, y[i]) for x, y in zip(expected[i], losses, strict=True))
    assert same(everything(one.step), everything(several.step))


@EVERY_DEVICE
def test_warm_up_leaves_no_trace(device: str) -> None:
    clips = some_clips(device)
    step, reference = some_step(device), some_step(device)
    total = torch.ones(9, dtype=torch.float64, device=device)
    for _ in range(2):  # once with an optimizer that has no state yet, once with one that has
        numbers = torch.get_rng_state()
        graphed = GraphedTrainStep(step, clips, accumulators=[total], warmup_runs=2)
        before, total_before = [t.clone() for t in everything(step)], total.clone()
        seen: list[tuple[list[Tensor], Tensor]] = []
        replay = Recording.replay

        def look_first(self: Recording, seen: Any = seen, replay: Any = replay) -> None:
            seen.append(([t.clone() for t in everything(step)], total.clone()))
            replay(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Recording, "replay", look_first)
            graphed(batches(1, device)[0])
        after, total_after = seen[0]
        assert torch.equal(total_after, total_before)
        assert same(after[: len(before)], before)
        assert all(not t.any() for t in after[len(before) :])  # Adam's state, as it starts
        assert torch.equal(torch.get_rng_state(), numbers)
        reference(*clips.batch(batches(1, device)[0]))
        assert same(everything(step), everything(reference))


def parameters(step: TrainStep) -> list[nn.Parameter]:
    return [p for module in (step.jepa, step.image_decoder, step.detection_head) for p in module.parameters()]


def assert_same_gradients(step: TrainStep, plain: TrainStep) -> None:
    for found, expected in zip(parameters(step), parameters(plain), strict=True):
        assert (found.grad is None) == (expected.grad is None)
        assert found.grad is None or torch.equal(found.grad, expected.grad)
    assert any(p.grad is not None and p.grad.any() for p in parameters(step))


class EmulatedGraph(Recording):
    """A recording as a graph is one, on a CPU: each replay writes gradients where the capture left them, and `.grad` of
    the parameters is none of its business.
    """

    def __init__(self, body: Any, device: torch.device, *, no_trace: Any, **_: Any) -> None:
        self._run, self._recorded = body, body.__self__
        with no_trace():
            body()
        self.captured = [(p, g) for p, g in self._recorded._gradients if g is not None]

    def replay(self) -> None:
        seen = [(p, p.grad) for p, _ in self._recorded._gradients]
        with torch.no_grad():
            handed_out = self._recorded._gradients
            self._run()
            for parameter, memory in self.captured:
                assert parameter.grad is not None
                memory.copy_(parameter.grad)
        self._recorded._gradients = handed_out
        for parameter, gradient in seen:
            parameter.grad = gradient


@pytest.mark.parametrize("device", ["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_are_those_of_the_last_step(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With plain steps in between, which leave gradients of their own, with several shapes, and with frozen parts."""
    static = device != "cpu"
    if device == "emulated":
        monkeypatch.setattr(train_step, "Recording", EmulatedGraph)
        device = "cpu"
    clips, step, plain = some_clips(device), some_step(device), some_step(device)
    graphed, addresses = GraphedTrainStep(step, clips), []
    full, ragged = batches(6, device)[1:3]
    weight: Any = step.jepa.encoder.conv1.weight
    for indices in (full, ragged, full, ragged):
        graphed(indices)
        plain(*clips.batch(indices))
        assert_same_gradients(step, plain)
        addresses.append(weight.grad.data_ptr())
        for either in (step, plain):  # a plain step in between
            either(*clips.batch(full))
        assert_same_gradients(step, plain)
    if static:
        assert addresses[0] == addresses[2] != addresses[1] == addresses[3]
    several = torch.stack([full, full.flip(0)])
    graphed(several)
    for indices in several:
        plain(*clips.batch(indices))
    assert_same_gradients(step, plain)
    for either in (step, plain):
        either.jepa.predictor.requires_grad_(False)
    graphed(full)
    plain(*clips.batch(full))
    assert all(p.grad is None for p in step.jepa.predictor.parameters())
    assert_same_gradients(step, plain)


@EVERY_DEVICE
def test_losses_are_copies_or_views_of_static_memory(device: str) -> None:
    graphed = GraphedTrainStep(some_step(device), some_clips(device))
    first, second = batches(2, device, ragged=False)
    copied, view = graphed(first), graphed(second, copy=False)
    kept = [loss.clone() for loss in view]
    last = graphed(first, copy=False)
    assert view.total.data_ptr() == last.total.data_ptr()
    assert not torch.equal(view.total, kept[0])  # overwritten
    assert not torch.equal(copied.total, last.total)
    assert not any(loss.requires_grad for loss in (*copied, *view))


def changed_parameter(step: TrainStep) -> None:
    step.jepa.encoder.conv1.weight = nn.Parameter(step.jepa.encoder.conv1.weight.detach().clone())  # type: ignore[union-attr, operator]


def moved_parameter(step: TrainStep) -> None:
    weight = step.jepa.encoder.conv1.weight  # type: ignore[union-attr]
    weight.data = weight.data.clone()  # type: ignore[operator]


def reload_optimizer(step: TrainStep) -> None:
    assert step.optimizer is not None
    step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))


def other_betas(step: TrainStep) -> None:
    assert step.optimizer is not None
    step.optimizer.param_groups[0]["betas"] = (0.8, 0.9)


CHANGES: dict[str, Callable[[TrainStep], object]] = {
    "a parameter is replaced": changed_parameter,
    "the memory of a parameter is replaced": moved_parameter,
    "parameters and buffers are moved": lambda s: s.jepa.double().float(),
    "a module is swapped": lambda s: setattr(s.jepa.encoder, "layer1", copy.deepcopy(s.jepa.encoder.layer1)),
    "a module is frozen": lambda s: s.jepa.predictor.requires_grad_(False),
    "a BatchNorm is put in eval mode": lambda s: s.jepa.encoder.bn1.eval(),  # type: ignore[union-attr]
    "the optimizer is reloaded": reload_optimizer,
    "other betas": other_betas,
    "another weight of a loss": lambda s: setattr(s.jepa.regularizer, "std_coeff", 3.0),
    "more prediction steps": lambda s: setattr(s, "steps", 3),
}


@EVERY_DEVICE
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_recording_would_not_see_is_recorded_anew(device: str, change: str) -> None:
    clips, (first, second) = some_clips(device), batches(2, device, ragged=False)
    step, plain = some_step(device), some_step(device)
    graphed = GraphedTrainStep(step, clips)
    for i in range(2):
        graphed((first, second)[i])
        plain(*clips.batch((first, second)[i]))
    assert graphed.recordings_made == 1
    for changed in (step, plain):
        CHANGES[change](changed)
    losses, expected = graphed(first), plain(*clips.batch(first))
    assert graphed.recordings_made == 2
    assert all(torch.equal(x, y) for x, y in zip(losses, expected, strict=True))
    graphed(second)
    assert graphed.recordings_made == 2


@EVERY_DEVICE
def test_what_changes_in_place_needs_no_new_recording(device: str) -> None:
    clips, (indices, _) = some_clips(device), batches(2, device, ragged=False)
    step, plain = some_step(device), some_step(device)
    graphed = GraphedTrainStep(step, clips)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(graphed.optimizer, 0.5)
    graphed(indices)
    step.jepa.load_state_dict(plain.jepa.state_dict())
    with torch.no_grad():
        step.image_decoder.load_state_dict(plain.image_decoder.state_dict())
        step.detection_head.load_state_dict(plain.detection_head.state_dict())
    scheduler.step()
    with eval_mode(step.jepa):
        pass  # an evaluation in between
    losses = graphed(indices)
    assert torch.equal(losses.total, plain(*clips.batch(indices)).total)
    assert graphed.recordings_made == 1
    assert graphed.optimizer.param_groups[1]["lr"].item() == pytest.approx(5e-5)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (torch.tensor(1), ValueError, r"indices must be \(B,\) or, for K steps in one launch, \(K, B\); got \(\)"),
        (torch.zeros(1, 1, 1, dtype=torch.int64), ValueError, r"got \(1, 1, 1\)"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "no clip in it"),
        (torch.zeros(2, dtype=torch.int32), TypeError, "indices has dtype torch.int32; accepted: torch.int64"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "indices is on meta"),
        ([0, 1], TypeError, "indices must be a tensor, got list"),
    ],
)
def test_bad_indices(indices: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GraphedTrainStep(some_step(), some_clips())(indices)


def test_bad_arguments_of_a_graphed_step() -> None:
    step, clips = some_step(), some_clips()
    with pytest.raises(ValueError, match="accumulators\\[0\\] has shape \\(3,\\)"):
        GraphedTrainStep(step, clips, accumulators=[torch.zeros(3, dtype=torch.float64)])
    with pytest.raises(ValueError, match="clips are on meta, the parameters on cpu"):
        GraphedTrainStep(step, clips.to("meta"))
    with pytest.raises(ValueError, match="lr must be a positive number, got nan"):
        GraphedTrainStep(step, clips).set_lr(float("nan"))
    step.optimizer = torch.optim.SGD(step.jepa.parameters(), lr=1.0)
    with pytest.raises(TypeError, match=r"needs torch.optim.Adam, got SGD"):
        GraphedTrainStep(step, clips)
    step.optimizer = None
    with pytest.raises(ValueError, match="has no optimizer"):
        GraphedTrainStep(step, clips)
    with pytest.raises(ValueError, match="warmup_runs must be at least 0 on cpu, got -1"):
        GraphedTrainStep(some_step(), clips, warmup_runs=-1)(torch.tensor([0]))


def test_adam_is_made_capturable_once() -> None:
    model = tiny_model()
    optimizer = build_optimizer(*model, lr=1e-3)
    assert make_capturable(optimizer) is optimizer
    rates = [group["lr"] for group in optimizer.param_groups]
    assert [rate.item() for rate in rates] == pytest.approx([1e-3, 1e-4, 1e-3])
    make_capturable(optimizer)
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    GraphedTrainStep(TrainStep(*model, optimizer, steps=1), some_clips()).set_lr(5e-3)
    assert [rate.item() for rate in rates] == pytest.approx([5e-3, 5e-4, 5e-3])
    assert all(group["fused"] and group["capturable"] for group in optimizer.param_groups)
