"""Shortcuts of few channels: the numbers of a strided 1×1 convolution, and gradients that oneDNN gets wrong itself."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastjepa.environment import ROOT
from fastjepa.model.networks import ResidualBlock, Shortcut, apply_convolution


@pytest.mark.parametrize(("channels", "stride"), [(3, 2), (15, (1, 2)), (16, 2), (3, 1)])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1)])
def test_the_numbers_of_the_convolution(channels: int, stride: int | tuple[int, int], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 4, 1, stride=stride).double()  # oneDNN does not take float64
    x = torch.rand(3, channels, *size, dtype=torch.float64, requires_grad=True)
    wanted, found = conv(x), apply_convolution(conv, x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    inputs, weight = (x, conv.weight, conv.bias), torch.rand_like(wanted)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("conv", "called"),
    [
        (nn.Conv2d(15, 4, 1, stride=2), False),
        (nn.Conv2d(15, 4, 1, stride=(1, 2)), False),
        (nn.Conv2d(16, 4, 1, stride=2), True),
        (nn.Conv2d(4, 4, 1), True),
        (nn.Conv2d(4, 4, 1, stride=2, padding=1), True),
        (nn.Conv2d(4, 4, 1, stride=2, groups=2), True),
        (nn.Conv2d(4, 4, 3, stride=2, padding=1), True),
        (nn.ConvTranspose2d(4, 4, 2, stride=2), True),
    ],
)
def test_only_narrow_strided_1x1_convolutions_go_another_way(conv: nn.Module, called: bool) -> None:
    calls: list[nn.Module] = []
    conv.register_forward_hook(lambda module, *_: calls.append(module))
    x = torch.rand(2, conv.weight.shape[1] * getattr(conv, "groups", 1), 6, 6)  # type: ignore[union-attr,operator]
    apply_convolution(conv, x)
    assert bool(calls) is called


def test_a_blocks_shortcut_is_a_sequential_with_its_names() -> None:
    block = ResidualBlock(4, 8, 2)
    assert isinstance(block.shortcut, Shortcut)
    assert isinstance(block.shortcut, nn.Sequential)
    assert {"shortcut.0.weight", "shortcut.1.weight"} <= block.state_dict().keys()
    plain = copy.deepcopy(block)
    plain.shortcut = nn.Sequential(*block.shortcut)
    x = torch.rand(2, 4, 7, 5)
    torch.testing.assert_close(block(x), plain(x))


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_in_every_layout(fused: bool, request: pytest.FixtureRequest) -> None:
    """In a process of its own, with several threads: where this is wrong, it may end by a signal."""
    if fused:
        request.getfixturevalue("needs_triton")
    code = f"""
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, "tests")
import itertools, torch
from torch import nn
from compare import assert_as_exact_as_eager
if {fused}:
    from fastjepa.fused.networks import Call
    from fastjepa.fused.recompute import Recomputation
    from fastjepa.fused.shared_parameters import own
    convolve = Call(Recomputation(False), own).convolve
else:
    from fastjepa.model.networks import apply_convolution as convolve
torch.set_num_threads(3)
generator = torch.Generator().manual_seed(0)
layouts = (torch.contiguous_format, torch.channels_last)
shapes = ((3, 16), (15, 16), (9, 7), (8, 64))
dtypes = (torch.float32, torch.bfloat16)
for channels, (batch, side), dtype in itertools.product((1, 4, 8, 15, 16, 17), shapes, dtypes):
    x = torch.randn(batch, channels, side, side, generator=generator).to(dtype)
    grad = torch.randn(batch, 2 * channels, -(-side // 2), -(-side // 2), generator=generator).to(dtype)
    eager = torch.nn.grad.conv2d_weight(x, (2 * channels, channels, 1, 1), grad, stride=2)  # all contiguous
    truth = torch.einsum("nohw,nihw->oi", grad.double(), x[:, :, ::2, ::2].double())[:, :, None, None]
    for of_x, of_weight, of_grad in itertools.product(layouts, layouts, layouts):
        conv = nn.Conv2d(channels, 2 * channels, 1, stride=2, bias=False, dtype=dtype).to(memory_format=of_weight)
        for _ in range(4):
            conv.weight.grad = None
            convolve(conv, x.contiguous(memory_format=of_x)).backward(grad.contiguous(memory_format=of_grad))
            name = str((channels, batch, side, of_x, of_weight, of_grad))
            assert_as_exact_as_eager(conv.weight.grad, eager, truth, name)
print("right")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=300)
    assert (done.stdout.strip(), done.returncode) == ("right", 0), done.stderr
