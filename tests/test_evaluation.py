from __future__ import annotations

import pytest
import torch
from sklearn.metrics import average_precision_score

from fastjepa.fused.inference import Convolutions, InferenceEncoder, InferencePredictor, for_evaluation
from fastjepa.fused.swap import accelerate
from fastjepa.graphs import GraphedRollout
from fastjepa.model.jepa import JEPA
from fastjepa.model.step import TrainStep
from fastjepa.moving_mnist import ClipSet
from fastjepa.training import evaluation
from fastjepa.training.evaluation import average_precision, eval_mode, evaluate, horizons_of, rollout_tails
from graph_cases import EVERY_DEVICE
from tiny import tiny_batch, tiny_model


def trained(dtype: torch.dtype = torch.float64):  # type: ignore[no-untyped-def]
    """A tiny model whose running statistics are not the initial ones."""
    model = tuple(module.to(dtype) for module in tiny_model())
    step = TrainStep(*model, steps=1)  # type: ignore[arg-type]
    for seed in range(3):
        step(*(t.to(dtype) for t in tiny_batch(seed=seed)))
    return model


def clips(n: int, frames: int = 6, size: int = 16) -> ClipSet:
    generator = torch.Generator().manual_seed(3)
    video = torch.randint(0, 256, (n, frames, size, size), generator=generator, dtype=torch.uint8)
    return ClipSet(video, (torch.rand(n, frames, 8, 8, generator=generator) > 0.9).to(torch.uint8))


@pytest.mark.parametrize(("frames", "size"), [(10, (8, 8)), (6, (11, 9)), (3, (8, 8))])
def test_tails_equal_the_original_rollout(frames: int, size: tuple[int, int]) -> None:
    jepa, decoder, head = trained()
    video = tiny_batch(2, frames, size)[0].double()
    calls = []
    with eval_mode(jepa, decoder, head):
        steps, _ = jepa.unroll(video, nsteps=frames - 2, compute_loss=False, return_all_steps=True)
        jepa.predictor.predictor.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].shape[2]))
        tails = list(rollout_tails(jepa.predictor, jepa.encode(video), horizons_of(frames)))
    assert len(tails) == horizons_of(frames)
    for s, tail in enumerate(tails):
        torch.testing.assert_close(tail, steps[s][:, :, s:], rtol=1e-12, atol=1e-12)
    if frames == 10:
        assert sum(calls) == 35  # predictor frames per clip; the original computes 72


def test_rollout_needs_eval_mode() -> None:
    jepa, _, _ = trained()
    with pytest.raises(RuntimeError, match="eval mode"):
        next(rollout_tails(jepa.predictor, torch.rand(1, 4, 5, 8, 8, dtype=torch.float64), 1))
    with eval_mode(jepa), pytest.raises(ValueError, match="between 1 and T - 2 = 3, got 4"):
        next(rollout_tails(jepa.predictor, torch.rand(1, 4, 5, 8, 8, dtype=torch.float64), 4))


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_sklearns(ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    if ties:
        probabilities = (probabilities * 5).round() / 5
    targets = (torch.rand(4, 3, 8, 8, generator=generator) > 0.8).float()
    ap = average_precision(probabilities, targets)
    assert ap.dtype == torch.float64
    expected = average_precision_score(targets.flatten().numpy(), probabilities.flatten().numpy())
    assert ap.item() == pytest.approx(expected, rel=1e-12)
    assert torch.get_default_dtype() == torch.float32


def test_average_precision_without_digits_is_nan() -> None:
    with pytest.warns(UserWarning, match="No positive samples"):
        assert average_precision(torch.rand(10), torch.zeros(10)).isnan()


def test_folding_keeps_the_numbers() -> None:
    jepa, _, _ = trained()
    video = tiny_batch()[0].double()
    with eval_mode(jepa):
        inputs = {"encoder": video, "predictor": jepa.encode(video)}
        for name, x in inputs.items():
            network = jepa.get_submodule(name)
            folded = for_evaluation(network, name)  # type: ignore[arg-type]
            assert folded.folds_now()  # type: ignore[operator]
            torch.testing.assert_close(folded(x), network(x), rtol=1e-12, atol=1e-12)


def test_deduplicated_evaluation_equals_original() -> None:
    jepa, decoder, head = trained(torch.float32)
    data = clips(5)
    original = evaluate(jepa, decoder, head, data, 2, original=True)
    single = evaluate(jepa, decoder, head, data, 2)
    assert single.recon_loss == pytest.approx(original.recon_loss, rel=1e-5)
    assert single.det_loss == pytest.approx(original.det_loss, rel=1e-5)
    # A rank changes only where two probabilities differ by rounding; there are none here.
    assert single.ap == pytest.approx(original.ap, rel=1e-6)
    assert single.pooled_ap == pytest.approx(original.pooled_ap, rel=1e-6)
    assert single.positive_share == pytest.approx(data.digit_maps[:, 2:].float().mean().item(), rel=1e-6)
    assert single.map == pytest.approx(sum(single.ap) / 3)
    assert single.as_row().keys() >= {"ap_0", "ap_2", "map", "pooled_map", "val_det_loss", "positive_share"}


def test_pooled_ap_and_losses_do_not_depend_on_the_batch_size() -> None:
    jepa, decoder, head = trained(torch.float32)
    data = clips(5)
    one, two = evaluate(jepa, decoder, head, data, 5), evaluate(jepa, decoder, head, data, 2)
    assert one.pooled_ap == pytest.approx(two.pooled_ap, rel=1e-6)
    assert one.recon_loss == pytest.approx(two.recon_loss, rel=1e-6)
    assert one.ap == pytest.approx(one.pooled_ap)  # one batch is the whole set
    assert one.ap != two.ap


# ---- rolled out in one launch ----


@EVERY_DEVICE
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("fold", [False, True])
def test_a_rollout_in_one_launch_gives_the_same_numbers(
    device: str, autocast_dtype: torch.dtype | None, fold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit without folding; with it, but for the layout in which a CPU convolves. The last batch is ragged.
    Recordings serve the next evaluation too, after the weights have changed in place.
    """
    jepa, decoder, head = (module.to(device) for module in trained(torch.float32))
    data = clips(5).to(device)
    if not fold:
        monkeypatch.setattr(evaluation, "for_evaluation", lambda network, _: network)
    rollout = GraphedRollout(jepa, fold_batch_norm=fold)
    before = None
    for _ in range(2):
        expected = evaluate(jepa, decoder, head, data, 2, autocast_dtype=autocast_dtype)
        found = evaluate(jepa, decoder, head, data, 2, autocast_dtype=autocast_dtype, rollout=rollout)
        assert found != before
        if not fold and device == "cpu":
            assert found == expected
        assert found.as_row() == pytest.approx(expected.as_row(), rel=1e-5 if autocast_dtype is None else 0.1)
        before = found
        with torch.no_grad():
            for module in (jepa.predictor, head):
                for parameter in module.parameters():
                    parameter.mul_(1.5)
    assert rollout.recordings_made == 2  # full and ragged


def test_a_fused_model_is_rolled_out_in_one_launch(device: str) -> None:
    jepa, decoder, head = (module.to(device) for module in trained(torch.float32))
    accelerate(jepa, backend="fused", verbose=False)
    data, rollout = clips(3, frames=4, size=8).to(device), GraphedRollout(jepa, fold_batch_norm=True)
    expected = evaluate(jepa, decoder, head, data, 2)
    found = evaluate(jepa, decoder, head, data, 2, rollout=rollout)
    if device == "cpu":
        assert found == expected
    assert found.as_row() == pytest.approx(expected.as_row(), rel=1e-5)


def test_a_rollout_that_is_of_no_use_is_refused() -> None:
    model, other = trained(torch.float32), trained(torch.float32)
    with pytest.raises(ValueError, match="`rollout` is of another predictor than that of `jepa`"):
        evaluate(*model, clips(2), 2, rollout=GraphedRollout(other[0]))
    with pytest.raises(ValueError, match="original=True rolls every frame out at every step"):
        evaluate(*model, clips(2), 2, original=True, rollout=GraphedRollout(model[0]))
    with pytest.raises(ValueError, match="there are no clips to evaluate"):
        evaluate(*model, clips(0), 2)


def test_evaluation_changes_nothing() -> None:
    jepa, decoder, head = trained(torch.float32)
    decoder.eval()
    before = {name: value.clone() for name, value in jepa.state_dict().items()}
    evaluate(jepa, decoder, head, clips(3), 2)
    assert jepa.training
    assert not decoder.training
    assert all(torch.equal(value, before[name]) for name, value in jepa.state_dict().items())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least 3 frames, got T = 2"):
        horizons_of(2)
    assert [horizons_of(t) for t in (3, 4, 6, 10, 30)] == [1, 1, 3, 7, 7]


def test_evaluating_a_fused_model_leaves_its_layout(device: str) -> None:
    """It is not copied: what is evaluated is what goes on training."""
    jepa, decoder, head = (module.to(device) for module in trained(torch.float32))
    accelerate(jepa, backend="fused", verbose=False)
    before = {name: parameter.stride() for name, parameter in jepa.named_parameters()}
    evaluate(jepa, decoder, head, clips(2, frames=4, size=8).to(device), 2)
    assert {name: parameter.stride() for name, parameter in jepa.named_parameters()} == before


def test_a_fused_model_evaluates_the_same(device: str) -> None:
    model, fused = ([module.to(device) for module in trained(torch.float32)] for _ in range(2))
    accelerate(fused[0], backend="fused", verbose=False)
    data = clips(2, frames=4, size=8).to(device)
    expected, found = evaluate(*model, data, 2), evaluate(*fused, data, 2)
    assert found.ap == pytest.approx(expected.ap, rel=1e-4)
    assert found.det_loss == pytest.approx(expected.det_loss, rel=1e-5)


# ---- inference networks ----


def fold(jepa: JEPA, autocast_dtype: torch.dtype | None, convolutions: Convolutions = "eager") -> JEPA:
    """With folded networks in the places of the plain ones."""
    of_encoder = InferenceEncoder.from_eager(jepa.encoder, autocast_dtype, convolutions)
    of_predictor = InferencePredictor.from_eager(jepa.predictor, autocast_dtype, convolutions)
    return JEPA(of_encoder, of_encoder, of_predictor, jepa.regularizer, jepa.predcost)


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("in_one_launch", "original"), [(False, False), (True, False), (False, True)])
def test_a_folded_model_evaluates_the_same(
    autocast_dtype: torch.dtype | None, in_one_launch: bool, original: bool
) -> None:
    jepa, decoder, head = trained(torch.float32)
    data = clips(5)
    expected = evaluate(jepa, decoder, head, data, 2, original=True)
    strides = {name: parameter.stride() for name, parameter in jepa.named_parameters()}
    folded = fold(jepa, autocast_dtype)
    assert all(module.training for module in jepa.modules())
    rollout = GraphedRollout(folded, fold_batch_norm=True) if in_one_launch else None
    found = evaluate(folded, decoder, head, data, 2, rollout=rollout, original=original)
    if autocast_dtype is None:
        assert found.ap == pytest.approx(expected.ap, rel=1e-3)
        assert found.pooled_ap == pytest.approx(expected.pooled_ap, rel=1e-3)
    limit = 1e-5 if autocast_dtype is None else 1e-2
    assert found.recon_loss == pytest.approx(expected.recon_loss, rel=limit)
    assert found.det_loss == pytest.approx(expected.det_loss, rel=limit)
    # They were used as they are, and nothing was laid out anew.
    assert {name: parameter.stride() for name, parameter in jepa.named_parameters()} == strides
    assert all(module.training for module in folded.modules())


def test_a_model_folded_into_kernels_evaluates_the_same(device: str) -> None:
    jepa, decoder, head = (module.to(device) for module in trained(torch.float32))
    data = clips(2, frames=4, size=8).to(device)
    expected = evaluate(jepa, decoder, head, data, 2)
    found = evaluate(fold(jepa, None, "fused"), decoder, head, data, 2)
    assert found.ap == pytest.approx(expected.ap, rel=1e-3)
    assert found.det_loss == pytest.approx(expected.det_loss, rel=1e-5)


def test_a_folded_model_is_not_folded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    jepa, decoder, head = trained(torch.float32)
    folded = fold(jepa, None)
    calls = []
    for kind, name in ((InferenceEncoder, "forward"), (InferencePredictor, "tails")):
        method = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, m=method, n=name: calls.append(n) or m(*args))
    evaluate(folded, decoder, head, clips(2), 2)
    assert calls == ["forward", "tails"]
