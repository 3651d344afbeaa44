"""Whether a network of the published structure computes what the published one does: it is tried, as losses are.

Structure and one comparison in eval mode do not tell: a stopped gradient, noise in train mode, another resizing of odd
sizes, a parameter that does nothing yet, or a head that begins with zeros, behind which nothing can be seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.fused.recognition import BLOCKS_OF_ENCODER, BLOCKS_OF_UNET, CONVS_OF_UNET
from fastjepa.model.networks import ResidualBlock, ResNet5, ResUNet, StateOnlyPredictor
from fastjepa.model.outcomes import first_difference, first_line, outcome, trial_conditions, trial_copy

SIZES = ((8, 8), (9, 10))  # pixels; of the second, upsampled maps are resized


def network_trial_problem(module: nn.Module, name: str) -> str | None:
    """Why a module of the published structure is not the published network; None if it is.

    Args:
        module: on any device, in any dtype and mode; it stays as it is.
        name: its path in the JEPA: "encoder", "predictor" or "predictor.predictor".
    """
    try:
        with trial_conditions():
            theirs = trial_copy(module).requires_grad_()
            _draw_weights(theirs)
            published = _published(trial_copy(theirs), name)
            for training in (True, False):
                for size in SIZES:
                    inputs = example(theirs, name, batch=2, size=size)
                    found = first_difference(*(_outcome(n.train(training), inputs) for n in (theirs, published)))
                    if found:
                        return f"it has the published names but computes something else ({found} differs)"
    except Exception as error:  # whatever code of the user's raises on an input that a published network takes
        return f"it has the published names but cannot be called like one: {first_line(error)}"
    return None


def example(module: nn.Module, name: str, *, batch: int, size: tuple[int, int]) -> tuple[Tensor | None, ...]:
    """Inputs for the network called `name`: frames or a video (B, C, T, H, W), the same in each call."""
    weight = module.get_parameter("predictor.conv1.weight" if name == "predictor" else "conv1.weight")
    shape: tuple[int, ...] = (batch, weight.shape[1], 1, *size)
    if name == "predictor":  # which puts some frames into the channels
        context_length: Any = module.context_length
        shape = (batch, weight.shape[1] // context_length, context_length + 1, *size)
    elif getattr(module, "avg_pool", False):  # which makes no states of a video
        shape = (2 * batch, weight.shape[1], *size)
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    # A predictor is called with actions, here none.
    return (drawn, None) if name == "predictor" else (drawn,)


@torch.no_grad()
def _draw_weights(module: nn.Module) -> None:
    """Weights and buffers at which every part of a network shows, and activations are large."""
    generator = torch.Generator().manual_seed(1)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1 / 9
        parameter.copy_(normal(parameter) / fan_in**0.5)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.copy_(normal(layer.running_mean))
            layer.running_var.copy_(0.5 + normal(layer.running_var).abs())


def _outcome(network: nn.Module, inputs: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    x, *rest = inputs
    assert x is not None
    x = x.clone().requires_grad_()
    out = network(x, *rest)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    return outcome(network, {"input": x}, {"result": out}, (out * weights).sum())


def _published(module: nn.Module, name: str) -> nn.Module:
    """The published network around the convolutions and BatchNorms of `module`."""
    source: Any = module
    if name == "predictor":
        return StateOnlyPredictor(_published(source.predictor, "predictor.predictor"), source.context_length)
    made = ResNet5(1, 1, 1, avg_pool=getattr(module, "avg_pool", False)) if name == "encoder" else ResUNet(1, 1, 1)
    blocks, convs = (BLOCKS_OF_ENCODER, ()) if name == "encoder" else (BLOCKS_OF_UNET, CONVS_OF_UNET)
    for child in ("conv1", "bn1", *convs):
        setattr(made, child, getattr(source, child))
    for child in blocks:
        block = ResidualBlock(1, 1)
        for part in ("conv1", "bn1", "conv2", "bn2", "shortcut"):
            setattr(block, part, getattr(getattr(source, child), part))
        setattr(made, child, block)
    return made
