"""Holding what a module computes against what it is taken for: values, gradients and buffers, on copies, in float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

# The room is for a module that computes in fp32 whatever it is given.
TOLERANCE = 1e-4


@contextlib.contextmanager
def trial_conditions() -> Iterator[None]:
    """Gradients, no autocast, and random numbers of its own, whatever the caller has."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


def trial_copy(module: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, in train mode."""
    return copy.deepcopy(module).cpu().double().train()


def outcome(
    module: nn.Module, inputs: Mapping[str, Tensor], values: Mapping[str, Tensor], loss: Tensor
) -> dict[str, Tensor]:
    """Everything that is to be the same after a call of `module`: by name, detached, in float64.

    Args:
        module: what was called; its parameters get no `.grad`.
        inputs: what it was called on, requiring gradients.
        values: what came of it.
        loss: a scalar of these, whose gradients are taken.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    wanted = {**inputs, **parameters}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    found = {name: value.detach().double() for name, value in values.items()}
    found |= {f"gradient of the {name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}
    return found | {f"buffer {name}": buffer.double() for name, buffer in module.named_buffers()}


def first_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first of two outcomes' entries that is not the same; "" if all are."""
    if different := sorted(found.keys() ^ expected.keys()):
        return different[0]
    # Gradients that are analytically 0 (a bias in front of a BatchNorm) are rounding of the others'.
    largest = max(_norm(value) for name, value in expected.items() if name.startswith("gradient"))
    for name, value in expected.items():
        scale = max(_norm(value), largest if name.startswith("gradient") else 0.0)
        same = found[name].shape == value.shape and bool((found[name].isnan() == value.isnan()).all())
        if not same or _norm(found[name] - value) > TOLERANCE * scale:
            return name
    return ""


def _norm(x: Tensor) -> float:
    return float(x.nan_to_num(nan=0.0).norm())  # the covariance loss of a single feature is NaN


def first_line(error: Exception) -> str:
    """What went wrong in code that is not ours, for a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
