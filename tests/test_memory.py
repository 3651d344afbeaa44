"""What a training step keeps for its backward pass, counted in bytes: fused against eager at the same dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench import step_memory
from fastjepa.fused.networks import FusedResidualBlock, FusedResNet5, FusedResUNet
from fastjepa.fused.swap import accelerate
from fastjepa.model.networks import ResidualBlock, ResNet5, ResUNet
from fastjepa.model.step import TrainStep
from tiny import tiny_batch, tiny_model


def kept_bytes(function: Callable[[], Tensor], *modules: nn.Module) -> int:
    """Bytes that autograd keeps, without parameters and buffers."""
    owned = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return step_memory.kept_bytes(function, owned)


def input_of(channels: int, device: str) -> Tensor:
    x = torch.rand(2, channels, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    return x.requires_grad_()


@pytest.mark.parametrize(
    ("channels", "stride", "fused_tensors", "eager_tensors"),
    # Besides the input, eager keeps each convolution's output, relu(bn(y1)), and the result; fused only the first.
    [((8, 8), 1, 2, 4), ((8, 16), 1, 3, 5), ((8, 16), 2, 3, 5)],
)
def test_a_block_keeps_convolution_outputs_only(
    device: str,
    channels: tuple[int, int],
    stride: int,
    fused_tensors: int,
    eager_tensors: int,
) -> None:
    eager = ResidualBlock(*channels, stride).to(device)
    fused = FusedResidualBlock.from_eager(eager, recompute=True)
    x = input_of(channels[0], device)
    one = eager(x).nbytes
    small = 32 * channels[1] * 4  # vectors of one value per channel
    for block, tensors in ((fused, fused_tensors), (eager, eager_tensors)):
        kept = kept_bytes(lambda block=block: block(x), eager) - x.nbytes  # type: ignore[misc]
        assert tensors * one <= kept
        if block is fused or device == "cpu":  # cuDNN's BatchNorm may keep a reserve of its own choice
            assert kept <= tensors * one + small


@pytest.mark.parametrize(
    ("eager", "fused", "least"),
    [(ResNet5(1, 8, 16), FusedResNet5, 1.7), (ResUNet(8, 8, 4), FusedResUNet, 1.6)],
    ids=["encoder", "predictor"],
)
def test_networks(device: str, eager: nn.Module, fused: type, least: float) -> None:
    """Identity blocks halve; a shortcut's output has to be kept beside the main path's, so 5 become 3."""
    eager = eager.to(device)
    x = input_of(1 if isinstance(eager, ResNet5) else 8, device)
    kept = [kept_bytes(lambda n=n: n(x), eager) - x.nbytes for n in (eager, fused.from_eager(eager, recompute=True))]  # type: ignore[attr-defined,misc]
    assert kept[0] >= least * kept[1], kept


def test_a_step_keeps_at_most_half(device: str) -> None:
    """With the published projector, whose eager activations are 4 times as wide as the state."""

    def of(fused: bool) -> int:
        jepa, *heads = (module.to(device) for module in tiny_model(projector="4-16-16"))
        if fused:
            accelerate(jepa, backend="fused", recompute="on", verbose=False)
        step = TrainStep(jepa, *heads, steps=2, projection="auto" if fused else "eager")
        video, digit_location = (t.to(device) for t in tiny_batch(1, 4, (16, 16)))
        return kept_bytes(lambda: step.losses(video, digit_location).total, jepa, *heads)

    eager, fused = of(False), of(True)
    assert 2 * fused <= eager, (eager, fused)
