"""Which convolutions a CPU must not train channels-last, and that training where it may is right."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from fastjepa.model.memory_format import cpu_trains_channels_last
from fastjepa.model.networks import ResNet5, ResUNet


@pytest.mark.parametrize(
    ("conv", "safe"),
    [
        (nn.Conv2d(15, 30, 1, stride=2), False),
        (nn.Conv2d(15, 30, 1, stride=(1, 2)), False),
        (nn.Conv2d(16, 32, 1, stride=2), True),
        (nn.Conv2d(4, 8, 1), True),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1), True),
    ],
)
def test_narrow_strided_1x1_convolutions_are_not(conv: nn.Conv2d, safe: bool) -> None:
    assert cpu_trains_channels_last(nn.Sequential(nn.ReLU(), conv)) is safe


def test_of_the_published_networks_the_narrow_unet_is_not() -> None:
    assert cpu_trains_channels_last(ResNet5(1, 2, 4))
    assert cpu_trains_channels_last(ResUNet(4, 16, 2))
    assert not cpu_trains_channels_last(ResUNet(4, 15, 2))


def test_a_fused_shortcut_reads_such_an_input_contiguous(needs_triton: None) -> None:
    from fastjepa.fused.networks import convolve

    for channels, expected in ((4, True), (16, False)):
        conv = nn.Conv2d(channels, 8, 1, stride=2, bias=False)
        seen: list[torch.Tensor] = []
        conv.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        x = torch.rand(3, channels, 6, 6).contiguous(memory_format=torch.channels_last)
        out = convolve(conv, x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert seen[0].is_contiguous() is expected


def test_gradients_of_what_is_called_safe() -> None:
    """In a process of its own: where this is wrong, it may end by a signal."""
    code = """
import torch, torch.nn as nn
torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)
for channels in (16, 17, 24, 32):
    for batch, side in ((3, 16), (15, 16), (9, 7), (8, 64)):
        conv = nn.Conv2d(channels, 2 * channels, 1, stride=2, bias=False)
        x = torch.randn(batch, channels, side, side, generator=g)
        grad = torch.randn(batch, 2 * channels, -(-side // 2), -(-side // 2), generator=g)
        truth = torch.einsum('nohw,nihw->oi', grad.double(), x[:, :, ::2, ::2].double())
        last = torch.channels_last
        for _ in range(20):
            conv.weight.grad = None
            conv(x.contiguous(memory_format=last)).backward(grad.contiguous(memory_format=last))
            error = (conv.weight.grad.flatten(1) - truth).abs().max() / truth.abs().max()
            assert error < 1e-5, (channels, batch, side, error)
print('right')
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert (done.stdout.strip(), done.returncode) == ("right", 0), done.stderr
