from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fastjepa.fused.swap import accelerate
from fastjepa.graphs import GraphedRollout
from fastjepa.model.jepa import eval_mode
from fastjepa.model.networks import ResUNet, StateOnlyPredictor
from fastjepa.storage.export import PretrainedJEPA
from fastjepa.training.evaluation import rollout_tails
from graph_cases import EVERY_DEVICE, literal_rollout, same, some_states, trained_jepa
from tiny import tiny_jepa


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@EVERY_DEVICE
@pytest.mark.parametrize("size", [(16, 16), (9, 7)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_graph_plain_and_literal_rollout_are_one(device: str, size: tuple[int, int], channels_last: bool) -> None:
    jepa, states = trained_jepa(device), some_states(device, size=size)
    if channels_last:
        jepa = jepa.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    expected = literal_rollout(jepa, states, 50)
    assert expected.shape == (2, 4, 52, *size)
    actual = GraphedRollout(jepa)(states, 50)
    assert actual.is_contiguous()
    assert torch.equal(actual, expected)
    model = PretrainedJEPA(jepa.encoder, jepa.predictor)  # type: ignore[arg-type]
    assert torch.equal(model.rollout(states=states[:, :, -2:], steps=50), expected)


@EVERY_DEVICE
def test_rollout_in_bf16(device: str) -> None:
    jepa, states = trained_jepa(device), some_states(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        expected = literal_rollout(jepa, states, 5)
    rollout = GraphedRollout(jepa, 5, autocast_dtype=torch.bfloat16)
    assert torch.equal(rollout(states), expected)
    # An autocast around the call is part of the signature.
    plain = GraphedRollout(jepa, 5)
    assert torch.equal(plain(states), literal_rollout(jepa, states, 5))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(plain(states), expected)
    assert plain.recordings_made == 2
    with torch.no_grad():
        jepa.predictor.predictor.head.weight.mul_(2)  # type: ignore[union-attr, operator]
    with torch.autocast(device, dtype=torch.bfloat16):  # no cast of the old weight was baked in
        assert torch.equal(plain(states), literal_rollout(jepa, states, 5))
    assert plain.recordings_made == 2


@EVERY_DEVICE
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_tails_are_those_of_the_evaluation(device: str, steps: int) -> None:
    jepa, states = trained_jepa(device), some_states(device, frames=7)
    rollout = GraphedRollout(jepa)
    for _ in range(2):  # the second call finds the windows as the first has left them
        with eval_mode(jepa):
            expected = list(rollout_tails(jepa.predictor, states, steps))
        tails = rollout.tails(states, steps)
        assert [tail.shape for tail in tails] == [tail.shape for tail in expected]
        for tail, wanted in zip(tails, expected, strict=True):
            # Frames are batched in another order, which a convolution may round differently.
            torch.testing.assert_close(tail, wanted, rtol=1e-5, atol=1e-6)
        states = states.flip(0)
    assert rollout.recordings_made == 1


@pytest.mark.parametrize("size", [(16, 16), (9, 7)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_on_a_cpu_tails_are_those_of_the_evaluation_bit_for_bit(
    size: tuple[int, int], channels_last: bool, autocast_dtype: torch.dtype | None
) -> None:
    """And lie in memory as those do: frame by frame in the order of the clips, in the layout of the network."""
    jepa, states = trained_jepa(), some_states(batch=3, frames=7, size=size)
    if channels_last:
        jepa = jepa.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.autocast("cpu", dtype=autocast_dtype, enabled=autocast_dtype is not None):
        states = states if autocast_dtype is None else states.to(autocast_dtype)
        with eval_mode(jepa):
            expected = list(rollout_tails(jepa.predictor, states, 4))
        tails = GraphedRollout(jepa).tails(states, 4, copy=False)
    for tail, wanted in zip(tails, expected, strict=True):
        assert torch.equal(tail, wanted)
        assert tail.dtype == wanted.dtype
        assert tail.stride() == wanted.stride()


def test_a_rollout_says_whose_it_is() -> None:
    jepa, other = trained_jepa(), trained_jepa()
    rollout = GraphedRollout(jepa)
    assert rollout.predictor is jepa.predictor
    jepa.predictor = other.predictor
    assert rollout.predictor is other.predictor
    assert GraphedRollout(other.predictor).predictor is other.predictor


@pytest.mark.parametrize("context", [1, 3])
def test_other_context_lengths(context: int) -> None:
    torch.manual_seed(0)
    predictor = StateOnlyPredictor(ResUNet(context * 4, 2, 4), context).eval()
    states = some_states(frames=6)
    expected = states[:, :, -context:]
    with torch.no_grad():
        for _ in range(4):
            expected = torch.cat((expected, predictor(expected[:, :, -context:])), dim=2)
        current, tails = states, []
        for s in range(3):
            tails.append(predictor(current[:, :, s:-1]))
            current = torch.cat((current[:, :, : s + context], tails[-1]), dim=2)
    rollout = GraphedRollout(predictor, 4)
    torch.testing.assert_close(rollout(states), expected)
    for tail, wanted in zip(rollout.tails(states, 3), tails, strict=True):
        torch.testing.assert_close(tail, wanted)


@EVERY_DEVICE
def test_a_rollout_is_a_copy_or_a_view_of_static_memory(device: str) -> None:
    rollout = GraphedRollout(trained_jepa(device), 3)
    first, second = some_states(device), some_states(device) + 1
    copied, view = rollout(first), rollout(first, copy=False)
    assert torch.equal(copied, view)
    last = rollout(second, copy=False)
    assert last.data_ptr() == view.data_ptr()
    assert torch.equal(last, view)
    assert not torch.equal(copied, last)
    other = rollout(first, steps=2, copy=False)  # another signature: memory of its own
    assert torch.equal(last, rollout(second))
    assert torch.equal(other, rollout(first, steps=2))
    assert not copied.requires_grad


@EVERY_DEVICE
def test_weights_of_a_rollout(device: str) -> None:
    jepa, states = trained_jepa(device), some_states(device)
    rollout = GraphedRollout(jepa, 3)
    rollout(states)
    with torch.no_grad():
        for parameter in jepa.predictor.parameters():
            parameter.mul_(1.1)
    jepa.train()  # the recording is in eval mode whatever the JEPA is in
    counts = [b.clone() for b in jepa.buffers()]
    assert torch.equal(rollout(states), literal_rollout(jepa, states, 3))
    assert rollout.recordings_made == 1
    assert same(counts, list(jepa.buffers()))
    assert jepa.predictor.training
    jepa.predictor.predictor.head = copy.deepcopy(jepa.predictor.predictor.head)  # type: ignore[union-attr]
    with torch.no_grad():
        jepa.predictor.predictor.head.weight.add_(1)  # type: ignore[union-attr, operator]
    assert torch.equal(rollout(states), literal_rollout(jepa, states, 3))
    assert rollout.recordings_made == 2


@EVERY_DEVICE
def test_a_rollout_after_accelerate(device: str, request: pytest.FixtureRequest) -> None:
    if device == "cpu":
        request.getfixturevalue("interpreted")
    jepa, states = trained_jepa(device), some_states(device, batch=1, size=(8, 8))
    rollout = GraphedRollout(jepa, 1)
    eager = rollout(states)
    accelerate(jepa, backend="fused", verbose=False)
    fused = rollout(states)
    assert rollout.recordings_made == 2  # modules were swapped
    torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5)
    assert not torch.equal(fused, eager)  # it is another computation


@EVERY_DEVICE
def test_folded_batch_norm_follows_the_weights(device: str) -> None:
    jepa, states = trained_jepa(device), some_states(device)
    rollout = GraphedRollout(jepa, 3, fold_batch_norm=True)
    before = rollout(states)
    # Folding rounds the weights once more: some ten roundings over the layers of three steps.
    torch.testing.assert_close(before, literal_rollout(jepa, states, 3), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for parameter in jepa.predictor.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(rollout(states), literal_rollout(jepa, states, 3), rtol=1e-4, atol=1e-5)
    assert rollout.recordings_made == 1
    jepa.double()
    torch.testing.assert_close(rollout(states.double()), literal_rollout(jepa, states.double(), 3))


def test_the_least_recently_used_recording_goes() -> None:
    rollout = GraphedRollout(trained_jepa(), max_recordings=2)
    states = some_states()
    for steps in (1, 2, 1, 3, 1):
        rollout(states, steps)
    assert rollout.recordings_made == 3
    rollout(states, 2)
    assert rollout.recordings_made == 4
    with pytest.raises(ValueError, match="max_recordings must be at least 1, got 0"):
        GraphedRollout(trained_jepa(), max_recordings=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: r(some_states(), 0), ValueError, "steps must be at least 1, got 0"),
        (lambda r: r(some_states()[0]), ValueError, r"states has shape \(4, 3, 16, 16\)"),
        (lambda r: r(some_states()[:, :, :1]), ValueError, "at least 2 frames, got 1"),
        (lambda r: r(some_states().long()), TypeError, "states has dtype torch.int64"),
        (lambda r: r(some_states().to("meta")), ValueError, "states is on meta, but the other arguments are on cpu"),
        (lambda r: r(some_states()[:0]), ValueError, "states is empty"),
        (lambda r: r.tails(some_states(), 2), ValueError, r"between 1 and T - 2 = 1, got 2"),
        (lambda r: r.tails(some_states()[:, :, :2], 1), ValueError, "at least 3 frames, got 2"),
        (lambda r: GraphedRollout(tiny_jepa(), 0), ValueError, "steps must be at least 1"),
        (lambda r: GraphedRollout(nn.Linear(1, 1)), ValueError, "a JEPA with one as `predictor`; got Linear"),
    ],
)
def test_bad_arguments_of_a_rollout(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(GraphedRollout(tiny_jepa()))
