"""Rollouts for users: in Python, and as `python -m fastjepa.rollout`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastjepa.figures.horizon import draw_horizon_gif
from fastjepa.model.jepa import JEPA
from fastjepa.policy import FP32_RELATIVE_LIMIT
from fastjepa.rollout import Options, main, roll_out
from fastjepa.storage.export import PretrainedJEPA
from fastjepa.training.command_line import parse_config
from fastjepa.training.trainer import Trainer
from graph_cases import literal_rollout, trained_jepa
from tiny import tiny_batch


def jepa_and_video(frames: int = 2) -> tuple[JEPA, Tensor]:
    return trained_jepa(), tiny_batch(batch=3, frames=frames)[0]


def test_fifty_frames_are_those_of_the_literal_unroll() -> None:
    jepa, video = jepa_and_video()
    jepa.eval()
    with torch.no_grad():
        expected, _ = jepa.unroll(video, None, 50, "autoregressive", 2, compute_loss=False)
    assert torch.equal(jepa.rollout(video, 50), expected)
    assert torch.equal(PretrainedJEPA(jepa.encoder, jepa.predictor).rollout(video, 50), expected)  # type: ignore[arg-type]


def test_more_frames_than_the_context_are_kept() -> None:
    jepa, video = jepa_and_video(frames=4)
    rolled = jepa.rollout(video, 3)
    jepa.eval()
    assert rolled.shape == (3, 4, 7, 16, 16)
    assert torch.equal(rolled[:, :, :4], jepa.encode(video))
    assert torch.equal(rolled[:, :, 2:], literal_rollout(jepa, rolled[:, :, :4], 3))
    assert torch.equal(jepa.rollout(steps=3, states=rolled[:, :, :4]), rolled)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_chunks_change_nothing_but_memory(chunk: int) -> None:
    jepa, video = jepa_and_video()
    sizes: list[int] = []
    jepa.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    expected = jepa.rollout(video, 2)
    assert sizes == [3]
    # Another batch size may choose another convolution; the error of one rounding, over few layers.
    torch.testing.assert_close(jepa.rollout(video, 2, chunk=chunk), expected)
    assert sizes[1:] == {1: [1, 1, 1], 2: [2, 1], 3: [3], 7: [3]}[chunk]
    torch.testing.assert_close(jepa.rollout(steps=2, states=expected[:, :, :2], chunk=chunk), expected)


def test_a_rollout_leaves_the_jepa_as_it_was() -> None:
    jepa, video = jepa_and_video()
    jepa.train()
    jepa.encoder.bn1.eval()  # type: ignore[union-attr, operator]
    modes = [module.training for module in jepa.modules()]
    state = {name: tensor.clone() for name, tensor in jepa.state_dict().items()}
    assert not jepa.rollout(video.requires_grad_(), 2).requires_grad
    assert [module.training for module in jepa.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in jepa.state_dict().items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda j, v: j.rollout(), "either a video or states"),
        (lambda j, v: j.rollout(v, 1, states=v), "either a video or states"),
        (lambda j, v: j.rollout(v, 0), "steps must be at least 1, got 0"),
        (lambda j, v: j.rollout(v, 1, chunk=0), "chunk must be at least 1, got 0"),
        (lambda j, v: j.rollout(v[0], 1), r"video must be \(B, C, T, H, W\), got shape \(1, 2, 16, 16\)"),
        (lambda j, v: j.rollout(steps=1, states=v[0]), r"states must be \(B, D, T, H, W\)"),
        (lambda j, v: j.rollout(v[:, :, :1], 1), "at least 2 frames, got 1"),
    ],
)
def test_a_wrong_argument_is_named(call: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*jepa_and_video())
    jepa, video = jepa_and_video()
    with pytest.raises(TypeError, match="uint8"):
        jepa.rollout(video.to(torch.uint8), 1)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained run: what training saves before its first step."""
    folder = tmp_path_factory.mktemp("rollout")
    flags = (
        "--device cpu --preset demo --henc 2 --hpre 2 --dstc 4 --canvas 16 --digit_size 8 --n_train 4 --n_val 5 "
        f"--n_frames 5 --cache_dir {folder / 'cache'} --out {folder / 'run'}"
    )
    Trainer(parse_config(flags.split()))
    return folder / "run"


def test_the_command_draws_and_says_how_fast(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--checkpoint", str(run), "--horizon", "6", "--clips", "4", "--chunk", "3", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "4 clips, 6 frames ahead, step by step on" in said
    assert "24 frames in" in said
    assert "frames/s" in said
    path = run / "figures" / "rollout-6.gif"
    assert f"wrote {path}" in said
    with Image.open(path) as image:
        assert image.n_frames == 8  # type: ignore[attr-defined]


def test_out_and_the_checkpoint_file(run: Path, tmp_path: Path) -> None:
    result = roll_out(Options(run / "checkpoint.pt", horizon=1, clips=1, out=tmp_path / "sub" / "x.gif", device="cpu"))
    assert result.path == tmp_path / "sub" / "x.gif"
    assert result.path.is_file()
    assert result.frames_per_second == 1 / result.seconds


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--horizon 0", "--horizon must be at least 1, got 0"),
        ("--clips 0", "--clips must be at least 1, got 0"),
        ("--clips 6", "--clips must be at most 5, the validation clips of the run; got 6"),
        ("--chunk 0", "--chunk must be at least 1, got 0"),
        ("--out x.png", "--out must end in .gif, got x.png"),
        ("--cuda_graph on", "--cuda_graph on needs a CUDA device, and this runs on cpu"),
        ("--checkpoint /nowhere", "/nowhere"),
    ],
)
def test_bad_flags(run: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--checkpoint", str(run), "--device", "cpu", *flags.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_graphed_rollout_is_what_the_command_draws(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph's code path, which a CPU runs plainly once the choice is forced; it folds BatchNorm, which rounds."""
    drawn: list[np.ndarray] = []
    monkeypatch.setattr(
        "fastjepa.figures.horizon.draw_horizon_gif", lambda video, rollout, *a, **k: drawn.append(rollout)
    )
    for graph in (False, True):
        monkeypatch.setattr("fastjepa.rollout.use_cuda_graph", lambda *_, graph=graph, **__: graph)
        options = Options(run, horizon=4, clips=3, chunk=2, device="cpu", out=tmp_path / "x.gif")
        assert roll_out(options).graph is graph
    assert np.abs(drawn[1] - drawn[0]).max() <= FP32_RELATIVE_LIMIT * np.abs(drawn[0]).max()


# ---- the animation ---------------------------------------------------------------------------------------------------


def frames_of(path: Path) -> list[np.ndarray]:
    with Image.open(path) as image:
        frames = []
        for i in range(image.n_frames):  # type: ignore[attr-defined]
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")))
        return frames


def test_what_the_animation_shows(tmp_path: Path) -> None:
    video, rollout = np.ones((4, 3, 32, 32)), np.full((4, 3, 32, 32), 0.5)
    path = draw_horizon_gif(video, rollout, np.zeros((4, 3, 8, 8)), tmp_path / "x.gif")
    frames = frames_of(path)
    assert len(frames) == 5
    assert frames[0].shape[1] == 12 + 3 * (128 + 8) - 8 + 12
    at = {name: (50, 30 + i * 136) for i, name in enumerate(("truth", "rollout", "detection"))}
    shown = [{name: tuple(int(v) for v in frame[y, x]) for name, (y, x) in at.items()} for frame in frames]
    white, grey, missing = (255, 255, 255), (128, 128, 128), (0xC4, 0xCA, 0xD2)
    assert shown[1] == {"truth": white, "rollout": white, "detection": white}  # given
    assert shown[2]["truth"] == white
    for t in (3, 4):
        assert shown[t]["truth"] == missing
        assert shown[t]["rollout"] == grey
    height = frames[0].shape[0]
    assert height == 12 + 30 + 3 * 136 - 8 + 34 + 12  # three clips of the four


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": 0}, "fps: expected"),
        ({"max_clips": 0}, "max_clips: expected at least 1, got 0"),
        ({"context": 4}, "context: expected 1 to 3, got 4"),
        ({"video": np.zeros((2, 3, 8))}, "expected 4 dimensions"),
        ({"video": np.zeros((2, 3, 8, 9))}, "rollout: .* does not go with video"),
        ({"detections": np.zeros((2, 3, 8, 8))}, "detections: .* does not go with rollout"),
        ({"path": Path("x.png")}, r"must end in \.gif"),
    ],
)
def test_bad_arguments_of_the_animation(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "video": np.zeros((2, 3, 8, 8)), "rollout": np.zeros((2, 2, 8, 8)), "detections": np.zeros((2, 2, 8, 8)),
        "path": tmp_path / "x.gif",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        draw_horizon_gif(**{**arguments, **change})
