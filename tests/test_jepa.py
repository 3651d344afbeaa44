from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastjepa.model.jepa import JEPA, JEPAProbe, build_jepa, detection_loss
from fastjepa.model.losses import SquareLossSeq, VCLoss
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


def test_detection_loss_passes_nan_on() -> None:
    probabilities, targets = torch.rand(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    torch.testing.assert_close(detection_loss(probabilities, targets), -probabilities.log().mean())
    probabilities[0, 0, 0, 0] = float("nan")
    assert detection_loss(probabilities, targets).isnan()
