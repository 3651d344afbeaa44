"""Every recorded number of the original Video JEPA, reproduced in float64 to a relative error of 1e-9."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastjepa.eb_jepa import OriginalStep
from fastjepa.fused.swap import accelerate
from fastjepa.model.jepa import JEPA, build_jepa
from fastjepa.model.networks import DetHead, ImageDecoder
from fastjepa.model.step import TrainStep
from fastjepa.training.evaluation import average_precision, rollout_tails

STEPS = 3  # prediction steps of the recorded training step
RELATIVE_ERROR = 1e-9
# A gradient that is analytically 0 (the bias in front of a BatchNorm) is rounding noise in the recording too.
NOISE = 1e-14


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    path = Path(__file__).parent / "data" / "golden_video_jepa.npz"
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


def assert_golden(actual: Tensor, golden: dict[str, Tensor], name: str) -> None:
    expected = golden[name]
    assert actual.shape == expected.shape, name
    assert actual.dtype == torch.float64, name
    error = (actual.detach() - expected).norm()
    assert error <= RELATIVE_ERROR * expected.norm() or (error <= NOISE and expected.norm() <= NOISE), (name, error)


def build(golden: dict[str, Tensor]) -> tuple[JEPA, ImageDecoder, DetHead]:
    def of(prefix: str) -> dict[str, Tensor]:
        start = f"init/{prefix}"
        return {name[len(start) :]: value for name, value in golden.items() if name.startswith(start)}

    jepa = build_jepa(dobs=1, henc=4, hpre=4, dstc=16, std_coeff=10.0, cov_coeff=100.0).double()
    jepa.encoder.load_state_dict(of("encoder."))
    jepa.predictor.load_state_dict(of("predictor."))
    jepa.regularizer.load_state_dict(of("regularizer."))
    decoder, head = ImageDecoder(16, 1).double(), DetHead(16, 4, 1).double()
    decoder.load_state_dict(of("decoder."))
    head.load_state_dict(of("dethead."))
    return jepa, decoder, head


@pytest.mark.parametrize("literal", [True, False], ids=["literal", "deduplicated"])
def test_training_step(golden: dict[str, Tensor], literal: bool) -> None:
    jepa, decoder, head = build(golden)
    kind = OriginalStep if literal else TrainStep
    step = kind(jepa, decoder, head, steps=STEPS, projection="eager")
    losses = step(golden["video"], golden["digit_location"])
    recorded = {
        "loss": losses.jepa,
        "vc_loss": losses.vc,
        "vc_unweighted": losses.vc_unweighted,
        "std_loss": losses.std,
        "cov_loss": losses.cov,
        "pred_loss": losses.pred,
        "recon_loss": losses.recon,
        "det_loss": losses.det,
    }
    for name, value in recorded.items():
        assert_golden(value, golden, f"train/{name}")
    compared = {f"train/{name}" for name in recorded} | {f"train/pred_step{i}" for i in range(STEPS)}

    modules = {"": jepa, "decoder.": decoder, "dethead.": head}
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert_golden(parameter.grad, golden, f"grad/{prefix}{name}")
            compared.add(f"grad/{prefix}{name}")
    buffers = dict(jepa.named_buffers())
    for name in golden:
        if name.startswith("after/"):
            assert_golden(buffers[name.removeprefix("after/")], golden, name)
            compared.add(name)
    left = {name for name in golden if name.startswith(("train/", "grad/", "after/"))} - compared
    assert not left, left


def test_accelerated_training_step(golden: dict[str, Tensor], device: str) -> None:
    """The fused networks and losses, in fp32: losses to 1e-5, predictions' and parameters' gradients to 1e-4."""
    jepa, decoder, head = (module.float().to(device) for module in build(golden))
    accelerate(jepa, backend="fused", verbose=False)
    video, digit_location = (golden[name].float().to(device) for name in ("video", "digit_location"))
    losses = TrainStep(jepa, decoder, head, steps=STEPS)(video, digit_location)
    for name in ("vc", "vc_unweighted", "std", "cov", "pred", "recon", "det"):
        expected = golden[f"train/{name if name == 'vc_unweighted' else name + '_loss'}"]
        assert abs(getattr(losses, name).item() - expected.item()) <= 1e-5 * abs(expected.item()), name
    for name, parameter in jepa.named_parameters():
        expected = golden[f"grad/{name}"]
        # Analytically 0 in front of a BatchNorm: rounding noise of terms like those of the bias behind it.
        scale = golden[f"grad/{name.replace('net.0.bias', 'net.1.bias')}"].norm()
        assert parameter.grad is not None
        assert (parameter.grad.double().cpu() - expected).norm() <= 1e-4 * scale, name
    for name, buffer in jepa.named_buffers():
        if f"after/{name}" in golden:
            expected = golden[f"after/{name}"]
            assert (buffer.double().cpu() - expected).norm() <= 1e-5 * expected.norm(), name


def test_training_predictions(golden: dict[str, Tensor]) -> None:
    jepa, _, _ = build(golden)
    states, losses = jepa.unroll(golden["video"], None, nsteps=STEPS, return_all_steps=True)
    assert losses is not None
    for i, state in enumerate(states):
        assert_golden(state, golden, f"train/pred_step{i}")
    assert_golden(losses[0], golden, "train/loss")


def test_evaluation(golden: dict[str, Tensor]) -> None:
    """Evaluation follows the training step: it sees the buffers that step left."""
    jepa, decoder, head = build(golden)
    video, digit_location = golden["video"], golden["digit_location"]
    TrainStep(jepa, decoder, head, steps=STEPS)(video, digit_location)
    for module in (jepa, decoder, head):
        module.eval()
    with torch.no_grad():
        state = jepa.encode(video)
        assert_golden(state, golden, "eval/state")
        steps, _ = jepa.unroll(video, None, nsteps=4, compute_loss=False, return_all_steps=True)
        for i, prediction in enumerate(steps):
            assert_golden(prediction, golden, f"eval/parallel_step{i}")
        rolled, _ = jepa.unroll(
            video, None, nsteps=5, unroll_mode="autoregressive", ctxt_window_time=2, compute_loss=False
        )
        assert isinstance(rolled, Tensor)
        assert_golden(rolled, golden, "eval/autoregressive")
        assert_golden(decoder(state), golden, "eval/decoded")
        assert_golden(head(state), golden, "eval/detected")

        horizons = golden["eval/ap"].numel()
        for s, tail in enumerate(rollout_tails(jepa.predictor, state, horizons)):
            assert_golden(tail, {"tail": golden[f"eval/parallel_step{s}"][:, :, s:]}, "tail")
            ap = average_precision(head(tail), digit_location[:, 2 + s :])
            assert_golden(ap, {"ap": golden["eval/ap"][s]}, "ap")
