"""Inputs and differentiated runs that the tests of the projected losses share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS = 1e-5
PARAMETERS = ("weight1", "bias1", "bn_weight", "bn_bias", "weight2")


class Case(NamedTuple):
    """Arguments of `projected_losses`, all on one device."""

    z: Tensor
    predictions: list[Tensor]
    parameters: list[Tensor]  # weight1, bias1, bn_weight, bn_bias, weight2

    def double(self) -> Case:
        return Case(self.z.double(), [p.double() for p in self.predictions], [p.double() for p in self.parameters])


def make_case(
    shape: Sequence[int],
    n_predictions: int,
    *,
    hidden: int = 64,
    out: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """A state ≥ 0, as ReLU leaves it, and predictions near it. Every parameter is off its initial value."""
    # On the CPU, so that a seed means the same numbers everywhere; but gigabytes are drawn where they are needed.
    g = torch.Generator(device if math.prod(shape) > 2**22 else "cpu").manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64, device=g.device)

    z = randn(*shape).relu() * 2 + 0.1
    predictions = [z + 0.3 * randn(*shape) for _ in range(n_predictions)]
    # weight2 is small enough for standard deviations below 1: there the hinge of std_loss is active and smooth.
    weight2 = randn(out, hidden) * (0.5 / hidden**0.5)
    parameters = [randn(hidden, shape[1]) * 0.4, randn(hidden) * 0.3, 1 + 0.2 * randn(hidden), 0.3 * randn(hidden)]
    return Case(
        z.to(device, dtype),
        [p.to(device, dtype) for p in predictions],
        [p.to(device, torch.float32) for p in (*parameters, weight2)],
    )


def loss_and_gradients(function: Callable[..., Any], case: Case) -> dict[str, Tensor]:
    """Every result of `function` on `case`, and every gradient of one weighted sum of the losses."""
    z = case.z.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    predictions = [p.detach().clone(memory_format=torch.preserve_format).requires_grad_() for p in case.predictions]
    parameters = [p.detach().clone().requires_grad_() for p in case.parameters]
    losses = function(z, predictions, *parameters, EPS)
    weights = torch.arange(1, len(predictions) + 1, device=z.device, dtype=losses.prediction_losses.dtype) * 0.7
    total = 1.7 * losses.std_loss + 33.0 * losses.cov_loss + (weights * losses.prediction_losses).sum()
    gradients = torch.autograd.grad(total, [z, *predictions, *parameters])
    names = ["z", *(f"predictions[{k}]" for k in range(len(predictions))), *PARAMETERS]
    results = {name: value.detach() for name, value in losses._asdict().items()}
    return results | {f"gradient of {name}": g for name, g in zip(names, gradients, strict=True)}


def settled_rows(case: Case) -> dict[str, Tensor]:
    """By the names of `loss_and_gradients`: the rows (N,) of z and of each prediction that keep away from ReLU's zero.

    Where a hidden feature lies closer to zero than its rounding, the gradient of that row jumps by the feature's part:
    among millions of rows some do, in eager as in any other order of sums, and a largest error is then one jump. The
    tensors must be rows, (N, D).
    """
    margin = 1e-5 if case.z.dtype == torch.float32 else 1e-4  # several roundings of the sum of D products
    weight1, _, bn_weight, bn_bias, _ = (p.double() for p in case.parameters)
    settled = {}
    for name, x in [("z", case.z), *((f"predictions[{k}]", p) for k, p in enumerate(case.predictions))]:
        hidden = x.double() @ weight1.T
        y = bn_weight * (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + EPS).sqrt() + bn_bias
        settled[f"gradient of {name}"] = y.abs().amin(1) > margin
    return settled


def with_offset_and_dead_channels(case: Case) -> Case:
    """Mean 1e3 and standard deviation 1e-2 in channel 0, a constant channel 1, an all-zero channel 2."""

    def harden(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = 1e3 + 1e-2 * x[:, 0]
        x[:, 1] = 7.0
        x[:, 2] = 0.0
        return x

    return Case(harden(case.z), [harden(p) for p in case.predictions], case.parameters)
