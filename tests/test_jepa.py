from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import original
from fastjepa.files.safe_files import CheckpointError
from fastjepa.model.jepa import JEPA, build_jepa
from fastjepa.model.losses import SquareLossSeq, VCLoss
from fastjepa.model.networks import DetHead, ImageDecoder, Projector, ResNet5, ResUNet, StateOnlyPredictor
from fastjepa.model.probes import JEPAProbe, detection_loss
from original import OriginalJEPA, action_jepa, action_unet_jepa, original_jepa
from tiny import tiny_batch, tiny_jepa


def test_state_dict_has_the_originals_prefixes() -> None:
    jepa = tiny_jepa()
    prefixes = {name.rsplit("conv1", 1)[0] for name in jepa.state_dict() if name.endswith("conv1.weight")}
    assert {"encoder.", "action_encoder.", "predictor.predictor."} <= prefixes
    assert torch.equal(
        jepa.state_dict()["regularizer.proj.net.0.weight"], jepa.state_dict()["predcost.proj.net.0.weight"]
    )
    assert jepa.action_encoder is jepa.encoder


def test_parallel_steps_keep_the_first_two_states() -> None:
    jepa = tiny_jepa().eval()
    video, _ = tiny_batch(frames=6)
    with torch.no_grad():
        last, losses = jepa.unroll(video, nsteps=2, compute_loss=False)
        steps, _ = jepa.unroll(video, nsteps=2, compute_loss=False, return_all_steps=True)
        state = jepa.encode(video)
    assert losses is None
    assert isinstance(last, Tensor)
    assert last.shape == state.shape
    assert torch.equal(last[:, :, :2], state[:, :, :2])
    assert torch.equal(last[:, :, 2:], steps[1])
    assert torch.equal(jepa.infer(video), steps[0])


def test_autoregressive_losses_compare_with_the_frame_predicted() -> None:
    jepa = tiny_jepa().eval()
    video, _ = tiny_batch(frames=6)
    sequence, losses = jepa.unroll(video, nsteps=3, unroll_mode="autoregressive", ctxt_window_time=2)
    assert isinstance(sequence, Tensor)
    assert losses is not None
    state = jepa.encode(video)
    expected = sum(jepa.predcost(state[:, :, i : i + 1], sequence[:, :, i : i + 1]) for i in (2, 3, 4)) / 3
    torch.testing.assert_close(losses[4], expected)
    total, vc, _, _, pred = losses
    torch.testing.assert_close(total, vc + pred)


# What a user of the original unrolls: the model, its options, and whether actions go with the video. A window of frames
# is no matter to a recurrent predictor. Losses of windows above 1 are compared with other frames (docs/differences.md).
UNROLLS: dict[str, tuple[Callable[[], OriginalJEPA], dict[str, Any]]] = {
    "video": (original_jepa, {"nsteps": 2}),
    "video, strided": (lambda: original_jepa(s1=2, s3=2), {"nsteps": 2}),
    "video, planning": (
        original_jepa,
        {"nsteps": 3, "unroll_mode": "autoregressive", "ctxt_window_time": 2, "compute_loss": False},
    ),
    "actions, recurrent": (action_jepa, {"nsteps": 3, "unroll_mode": "autoregressive", "ctxt_window_time": 4}),
    "actions beside the state": (action_unet_jepa, {"nsteps": 7}),  # more steps than actions, which parallel allows
    "actions, planning": (action_unet_jepa, {"nsteps": 3, "unroll_mode": "autoregressive"}),
}


@pytest.mark.parametrize("case", UNROLLS)
@pytest.mark.parametrize("all_steps", [False, True])
def test_parts_of_the_original_unroll_in_our_jepa(case: str, all_steps: bool) -> None:
    make, options = UNROLLS[case]
    torch.manual_seed(0)
    theirs = make().double()
    parts = copy.deepcopy(theirs)
    ours = JEPA(parts.encoder, parts.action_encoder, parts.predictor, parts.regularizer, parts.predcost)
    assert ours.single_unroll == theirs.single_unroll == (make is action_jepa)
    video, actions = torch.rand(2, 2 if make is action_jepa else 1, 6, 8, 8, dtype=torch.float64), None
    if make is not original_jepa and "actions" in case:
        actions = torch.rand(2, 2, 6, dtype=torch.float64)
        actions = actions if make is action_jepa else actions[..., None, None].expand(2, 2, 6, 8, 8)
    found, expected = [], []
    for jepa, results in ((ours, found), (theirs, expected)):
        states, losses = jepa.unroll(video, actions, **options, return_all_steps=all_steps)
        results += [*(states if all_steps else [states]), *jepa.state_dict().values()]
        results += [] if losses is None else [*losses[:3], losses[4]]
        assert (losses is None) == (options.get("compute_loss") is False)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


PAIRS = [
    (original.Encoder, ResNet5), (original.UNet, ResUNet), (original.PairPredictor, StateOnlyPredictor),
    (original.MLP, Projector), (original.Regularizer, VCLoss), (original.PredictionCost, SquareLossSeq),
    (original.OriginalJEPA, JEPA), (original.OriginalJEPA.unroll, JEPA.unroll), (original.Probe, JEPAProbe),
    (original.Painter, ImageDecoder), (original.Detector, DetHead), (original.Detector.score, DetHead.score),
]  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=lambda thing: thing.__qualname__)
def test_the_originals_arguments_and_defaults(theirs: Any, ours: Any) -> None:
    found = list(inspect.signature(ours).parameters.values())
    for i, parameter in enumerate(inspect.signature(theirs).parameters.values()):
        assert found[i].name == parameter.name
        assert found[i].default == parameter.default or parameter.default is parameter.empty


def test_our_modules_carry_the_originals_attributes_and_weights() -> None:
    theirs = original_jepa(s2=2)
    encoder, projector = ResNet5(1, 2, 4, s2=2), Projector("4-6-5")
    predictor = StateOnlyPredictor(ResUNet(8, 2, 4), context_length=2)
    ours = JEPA(encoder, encoder, predictor, VCLoss(10.0, 100.0, proj=projector), SquareLossSeq(projector))
    ours.load_state_dict(theirs.state_dict())  # strictly
    for path, names in {
        "": ("single_unroll", "ploss", "rloss"), "encoder": ("avg_pool",), "predictor": ("is_rnn", "context_length"),
        "predictor.predictor": ("is_rnn",), "regularizer": ("std_coeff", "cov_coeff"), "regularizer.proj": ("out_dim",),
    }.items():  # fmt: skip
        for name in names:
            assert getattr(ours.get_submodule(path), name) == getattr(theirs.get_submodule(path), name)
    video = tiny_batch()[0]
    torch.testing.assert_close(ours.unroll(video, None)[1][0], theirs.unroll(video, None)[1][0])  # type: ignore[index]
    for frames in (encoder, theirs.encoder):
        frames.avg_pool = True
    theirs.encoder.avgpool = nn.AdaptiveAvgPool2d((1, 1))
    assert encoder(video[:, :, 0]).shape == (2, 4)
    torch.testing.assert_close(encoder(video[:, :, 0]), theirs.encoder(video[:, :, 0]))


def test_save_and_load(tmp_path: Path) -> None:
    ours, theirs = tiny_jepa(seed=1), original_jepa()
    path = tmp_path / "jepa.pt"
    theirs.save(path)
    before = {name: value.data_ptr() for name, value in ours.state_dict().items()}
    ours.load(path)
    assert {name: value.data_ptr() for name, value in ours.state_dict().items()} == before
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    ours.save(path)
    original_jepa().load_state_dict(torch.load(path, weights_only=True))
    ours.encoder = torch.compile(ours.encoder)  # type: ignore[assignment]
    ours.save(path)
    ours.load(path)
    tiny_jepa().load(path)


def test_load_refuses_and_changes_nothing(tmp_path: Path) -> None:
    jepa, path = tiny_jepa(), tmp_path / "jepa.pt"
    before = copy.deepcopy(jepa.state_dict())
    state = tiny_jepa(seed=1).state_dict()
    for content, message in (
        ({**state, "encoder.conv1.weight": torch.zeros(1)}, r"encoder.conv1.weight is \(1,\) torch.float32, expected"),
        ({**state, "more": torch.zeros(1)}, "more is not expected"),
        ({name: value for name, value in state.items() if "bn1" not in name}, "encoder.bn1.weight is missing"),
        ({**state, "encoder.conv1.weight": state["encoder.conv1.weight"].double()}, "float64, expected"),
        ([1, 2], "is not a dict of tensors"),
        ({1: torch.zeros(1)}, "encoder.conv1.weight is missing"),
        (jepa, "holds more than tensors"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            jepa.load(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        jepa.load(path)
    with pytest.raises(CheckpointError, match="No such file"):
        jepa.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="could not write"):
        jepa.save(tmp_path / "nowhere" / "jepa.pt")
    assert all(torch.equal(value, before[name]) for name, value in jepa.state_dict().items())


@pytest.mark.packages("torchmetrics", "sklearn")
def test_scores_of_the_detection_head() -> None:
    torch.manual_seed(0)
    theirs, ours = original.Detector(4, 3, 1), DetHead(4, 3, 1)
    ours.load_state_dict(theirs.state_dict())
    preds, targets = [torch.rand(2, 4, 5, 16, 16) for _ in range(4)], torch.rand(2, 5, 8, 8) > 0.9
    found, expected = ours.score(preds, targets), theirs.score(preds, targets)
    assert len(found) == 3
    assert found == pytest.approx(expected, abs=1e-6)


class AddAction(nn.Module):
    """Predicts the last state plus the action beside it, with a context of one frame."""

    context_length = 1

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        return states + actions[..., None, None]


def test_actions_reach_the_predictor_encoded() -> None:
    class Double(nn.Module):
        def forward(self, actions: Tensor) -> Tensor:
            return 2 * actions

    jepa = JEPA(nn.Identity(), Double(), AddAction(), VCLoss(1, 1), SquareLossSeq())
    video = torch.zeros(1, 1, 4, 2, 2)
    actions = torch.tensor([[[1.0, 10.0, 100.0]]])  # (B, A, ·)
    states, _ = jepa.unroll(video, actions, nsteps=3, unroll_mode="autoregressive", compute_loss=False)
    assert isinstance(states, Tensor)
    assert states[0, 0, :, 0, 0].tolist() == [0.0, 2.0, 22.0, 222.0]
    with pytest.raises(ValueError, match="nsteps is 4, but there are only 3 actions"):
        jepa.unroll(video, actions, nsteps=4, unroll_mode="autoregressive", compute_loss=False)


def test_probe_leaves_the_jepa_alone() -> None:
    jepa, head = tiny_jepa(), nn.Conv3d(4, 1, 1)
    video, _ = tiny_batch()
    probe = JEPAProbe(jepa, head, nn.MSELoss())
    probe(video, video).backward()
    assert head.weight.grad is not None
    assert all(p.grad is None for p in jepa.parameters())
    assert probe.infer(video).shape == video.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unroll_mode": "sideways"}, "parallel, autoregressive; got 'sideways'"),
        ({"nsteps": 0}, "at least 1, got 0"),
        ({"unroll_mode": "autoregressive", "ctxt_window_time": 1}, "ctxt_window_time must be at least 2"),
        ({"unroll_mode": "autoregressive", "ctxt_window_time": 2, "nsteps": 4}, "at least 6 frames, got T = 5"),
    ],
)
def test_bad_unroll(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_jepa().unroll(tiny_batch()[0], **options)  # type: ignore[arg-type]


def test_bad_video() -> None:
    with pytest.raises(ValueError, match="at least 3 frames, got T = 2"):
        tiny_jepa().unroll(torch.rand(1, 1, 2, 16, 16))
    with pytest.raises(ValueError, match=r"expected a video \(B, C, T, H, W\)"):
        tiny_jepa().unroll(torch.rand(1, 1, 16, 16))


def test_bad_sizes() -> None:
    sizes = {"dobs": 1, "henc": 2, "hpre": 2, "dstc": 4, "std_coeff": 1.0, "cov_coeff": 1.0}
    with pytest.raises(ValueError, match="hpre must be at least 1, got -2"):
        build_jepa(**sizes | {"hpre": -2})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must start with dstc = 4"):
        build_jepa(**sizes, projector="16-64-64")  # type: ignore[arg-type]


def test_detection_loss_is_out_of_reach_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    # A CPU computes it under autocast; a GPU refuses to, and its trainings in bf16 stop at their first step.
    def refusing(*arguments: torch.Tensor) -> torch.Tensor:
        assert not torch.is_autocast_enabled("cpu"), "unsafe to autocast"
        return binary_cross_entropy(*arguments)

    binary_cross_entropy = torch.nn.functional.binary_cross_entropy
    monkeypatch.setattr(torch.nn.functional, "binary_cross_entropy", refusing)
    probabilities, targets = torch.rand(2, 3, 8, 8).bfloat16(), torch.ones(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert detection_loss(probabilities, targets).dtype == torch.float32


def test_detection_loss_passes_nan_on() -> None:
    probabilities, targets = torch.rand(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    torch.testing.assert_close(detection_loss(probabilities, targets), -probabilities.log().mean())
    probabilities[0, 0, 0, 0] = float("nan")
    assert detection_loss(probabilities, targets).isnan()
