from __future__ import annotations

import pytest
import torch
from torch import nn

from fastjepa.model.networks import (
    DetHead,
    ImageDecoder,
    Projector,
    ResidualBlock,
    ResNet5,
    ResUNet,
    StateOnlyPredictor,
)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_default_sizes_have_the_published_number_of_parameters() -> None:
    assert parameters(ResNet5(1, 32, 16)) == 89_280
    assert parameters(ResUNet(32, 32, 16)) == 2_032_496
    assert parameters(Projector("16-64-64")) == 5_312


def test_parameter_names_are_the_originals() -> None:
    names = set(ResNet5(1, 2, 8).state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer1.conv2.weight", "layer2.shortcut.0.weight"} <= names
    assert "layer1.shortcut.0.weight" not in names  # identity: neither stride nor width changes
    assert "conv1.bias" not in names
    assert {"up3.bias", "bott.bn2.weight", "dec1.shortcut.1.bias", "head.bias"} <= set(ResUNet(4, 2, 2).state_dict())
    assert set(Projector("4-6-5").state_dict()) == {
        "net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias", "net.1.running_mean", "net.1.running_var",
        "net.1.num_batches_tracked", "net.3.weight",
    }  # fmt: skip
    assert set(ImageDecoder(4, 1).state_dict()) == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}
    assert {"head.0.0.weight", "head.0.2.bias"} <= set(DetHead(4, 3, 1).state_dict())


@pytest.mark.parametrize("size", [(16, 16), (13, 17), (9, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_of_any_size(size: tuple[int, int], dtype: torch.dtype) -> None:
    video = torch.rand(2, 1, 3, *size, dtype=dtype)
    states = ResNet5(1, 2, 5).to(dtype)(video)
    assert states.shape == (2, 5, 3, *size)
    assert states.min() >= 0  # ends in ReLU
    assert StateOnlyPredictor(ResUNet(10, 2, 5).to(dtype))(states).shape == (2, 5, 2, *size)
    assert ImageDecoder(5, 1).to(dtype)(states).shape == video.shape
    assert DetHead(5, 3, 1).to(dtype)(states).shape == (2, 3, 8, 8)


def test_video_is_its_frames() -> None:
    """5-D input is processed frame by frame: the same as the frames as a 4-D batch, in eval mode and any order."""
    encoder = ResNet5(2, 2, 3).eval()
    video = torch.rand(2, 2, 3, 8, 8)
    frames = encoder(video.transpose(1, 2).reshape(6, 2, 8, 8))
    torch.testing.assert_close(encoder(video), frames.view(2, 3, 3, 8, 8).transpose(1, 2), rtol=0, atol=1e-6)


def test_pairs_put_the_older_frame_first() -> None:
    states = torch.arange(3.0).view(1, 1, 3, 1, 1)
    seen = StateOnlyPredictor(nn.Identity())(states)  # the network shows the channels it was given
    assert seen[0, :, :, 0, 0].tolist() == [[0.0, 1.0], [1.0, 2.0]]


def test_residual_block_strides_round_up() -> None:
    assert ResidualBlock(2, 3, stride=2)(torch.rand(1, 2, 7, 10)).shape == (1, 3, 4, 5)


def test_probe_heads_start_as_published() -> None:
    torch.manual_seed(0)
    for module in ImageDecoder(16, 1, hidden_dim=64).modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None
            assert not module.bias.any()
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15)
            assert module.weight.abs().max() <= 2.0  # trunc_normal_'s default cut


def test_bf16_autocast_keeps_probabilities_off_one() -> None:
    """A bf16 sigmoid rounds to 1 and the loss then takes log(0); the head applies it in fp32."""
    head = DetHead(4, 3, 1)
    with torch.no_grad():
        head.head[0][2].bias.fill_(8.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probabilities = head(torch.rand(1, 4, 2, 8, 8))
    assert probabilities.dtype == torch.float32
    assert probabilities.max() < 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ResNet5(1, 2, 4)(torch.rand(3, 8, 8)), ValueError, r"got shape \(3, 8, 8\)"),
        (lambda: ResNet5(1, 2, 4)(torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8)), TypeError, "uint8"),
        (lambda: DetHead(4, 2, 1)(torch.rand(1, 4, 8, 8)), ValueError, "expected states"),
        (lambda: StateOnlyPredictor(nn.Identity())(torch.rand(1, 4, 1, 8, 8)), ValueError, "at least 2 frames, got 1"),
        (lambda: StateOnlyPredictor(nn.Identity(), 0), ValueError, "at least 1, got 0"),
        (lambda: Projector("16"), ValueError, "'16-64-64', got '16'"),
        (lambda: Projector("16-x-64"), ValueError, "got '16-x-64'"),
        (lambda: Projector("16-0-64"), ValueError, "got '16-0-64'"),
    ],
)
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]
