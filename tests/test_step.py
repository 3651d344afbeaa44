"""The de-duplicated step computes what the literal one computes: losses, gradients, buffers, and so whole trainings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastjepa.eb_jepa import OriginalStep
from fastjepa.model.step import TrainStep, build_optimizer
from tiny import tiny_batch, tiny_model

RELATIVE_ERROR = 1e-9  # float64; the two orders of summation differ by rounding only


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(value.double().norm().item(), 1e-3)  # gradients that are analytically 0 are noise around 1e-17
        assert (actual[name].double() - value.double()).norm() <= RELATIVE_ERROR * scale, name


def outcome(step: TrainStep, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    found = {}
    for i, (video, digit_location) in enumerate(batches):
        losses = step(video, digit_location)
        found |= {f"{i}/{name}": value for name, value in losses._asdict().items()}
    for root, module in (("jepa", step.jepa), ("decoder", step.image_decoder), ("head", step.detection_head)):
        found |= {f"{root}.{name}": value for name, value in module.state_dict().items()}
        found |= {f"grad/{root}.{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return found


def make(literal: bool, *, steps: int = 3, momentum: float | None = 0.1, projector: str | None = None) -> TrainStep:
    jepa, decoder, head = (module.double() for module in tiny_model(projector=projector))
    for module in jepa.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = momentum
    # SGD, because Adam makes full-size steps of gradients that are only noise (a bias in front of a BatchNorm).
    parameters = [p for m in (jepa, decoder, head) for p in m.parameters()]
    kind = OriginalStep if literal else TrainStep
    return kind(jepa, decoder, head, torch.optim.SGD(parameters, lr=1e-2), steps=steps)


@pytest.mark.parametrize("projector", [None, "4-5", "4-7-6-5"], ids=["one hidden", "linear", "two hidden"])
@pytest.mark.parametrize(("steps", "momentum", "size"), [(1, 0.1, (16, 16)), (3, 0.37, (11, 13)), (2, None, (8, 8))])
def test_deduplicated_equals_literal(
    steps: int, momentum: float | None, size: tuple[int, int], projector: str | None
) -> None:
    batches = [tuple(t.double() for t in tiny_batch(2, 4, size, seed)) for seed in range(3)]
    literal = outcome(make(True, steps=steps, momentum=momentum, projector=projector), batches)  # type: ignore[arg-type]
    single = outcome(make(False, steps=steps, momentum=momentum, projector=projector), batches)  # type: ignore[arg-type]
    assert_same(single, literal)


def test_calls_are_counted_as_the_originals() -> None:
    step = make(False, steps=3)
    step(*(t.double() for t in tiny_batch()))
    assert step.jepa.encoder.bn1.num_batches_tracked == 3
    assert step.jepa.predictor.predictor.bn1.num_batches_tracked == 3
    assert step.jepa.regularizer.proj.net[1].num_batches_tracked == 7  # 1 + 2·steps


def test_separate_projectors() -> None:
    """A user may give the two losses different projectors; the buffers of each are advanced for themselves."""
    results = []
    for literal in (True, False):
        step = make(literal)
        torch.manual_seed(5)
        step.jepa.predcost.proj = type(step.jepa.regularizer.proj)("4-3-2").double()
        step.optimizer = None
        results.append(outcome(step, [tuple(t.double() for t in tiny_batch())]))  # type: ignore[list-item]
    assert_same(results[1], results[0])


def test_probes_do_not_move_the_jepa() -> None:
    jepa, decoder, head = tiny_model()
    losses = TrainStep(jepa, decoder, head, steps=1).losses(*tiny_batch())
    (losses.recon + losses.det).backward()
    assert all(p.grad is None for p in jepa.parameters())
    assert all(p.grad is not None for m in (decoder, head) for p in m.parameters())


def test_learning_rates_of_the_three_parts() -> None:
    groups = build_optimizer(*tiny_model(), lr=1e-3).param_groups
    assert [group["lr"] for group in groups] == [1e-3, 1e-4, 1e-3]


def test_bf16_takes_effect() -> None:
    """The networks really run in bf16: states are bf16, the losses fp32 and near those of fp32, but not equal."""
    seen = []
    losses = {}
    for dtype in (None, torch.bfloat16):
        jepa, decoder, head = tiny_model()
        jepa.predictor.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        losses[dtype] = TrainStep(jepa, decoder, head, steps=1, autocast_dtype=dtype)(*tiny_batch())
    assert seen == [torch.float32, torch.bfloat16]
    for name, full in losses[None]._asdict().items():
        half = getattr(losses[torch.bfloat16], name)
        assert half.dtype == torch.float32
        # 2^-8 per rounding, through about ten layers
        assert half.item() == pytest.approx(full.item(), rel=0.1), name
    assert losses[None].total != losses[torch.bfloat16].total


@pytest.mark.parametrize(
    ("video", "digit_location", "error", "message"),
    [
        (torch.rand(1, 1, 2, 8, 8), torch.zeros(1, 2, 8, 8), ValueError, "at least 3 frames .* got T = 2"),
        (torch.rand(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), ValueError, r"video must be \(B, C, T, H, W\)"),
        (
            torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8),
            torch.zeros(1, 3, 8, 8),
            TypeError,
            "divide uint8 video by 255",
        ),
        (torch.rand(1, 1, 3, 8, 8), torch.zeros(1, 3, 4, 4), ValueError, r"\(1, 3, 8, 8\), got shape \(1, 3, 4, 4\)"),
    ],
)
def test_bad_batches_change_nothing(
    video: torch.Tensor, digit_location: torch.Tensor, error: type[Exception], message: str
) -> None:
    jepa, decoder, head = tiny_model()
    before = {name: value.clone() for name, value in jepa.state_dict().items()}
    with pytest.raises(error, match=message):
        TrainStep(jepa, decoder, head, steps=1)(video, digit_location)
    assert all(torch.equal(value, before[name]) for name, value in jepa.state_dict().items())


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        TrainStep(*tiny_model(), steps=0)
