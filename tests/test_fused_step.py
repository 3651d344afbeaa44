"""Whole training steps through the fused networks and losses, for any number of prediction steps: eager's numbers."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fastjepa.fused.swap import accelerate
from fastjepa.model.step import TrainStep
from fastjepa.policy import judge_draws
from tiny import tiny_batch, tiny_model


def run(
    modules: tuple[nn.Module, ...], batch: tuple[Tensor, Tensor], steps: int, *, fused: bool, bf16: bool = False
) -> dict[str, Tensor]:
    """Losses, gradients by group and buffers of one step, on copies."""
    jepa, *heads = (copy.deepcopy(module) for module in modules)
    if fused:
        accelerate(jepa, backend="fused", verbose=False)
    projection = "fused" if fused else "eager"
    autocast = torch.bfloat16 if bf16 else None
    step = TrainStep(jepa, *heads, steps=steps, projection=projection, autocast_dtype=autocast)  # type: ignore[arg-type]
    losses = step(*batch)
    found = {"losses": torch.stack(tuple(losses))}
    for name in ("encoder", "predictor", "predcost"):
        parts = [p.grad for _, p in sorted(jepa.get_submodule(name).named_parameters()) if p.grad is not None]
        found[f"gradient of {name}"] = torch.cat([part.flatten() for part in parts])
    buffers = [b.flatten() for _, b in sorted(jepa.named_buffers()) if b.is_floating_point()]
    return found | {"buffers": torch.cat(buffers)}


@pytest.mark.parametrize(
    ("steps", "bf16"), [*((steps, False) for steps in (1, 2, 3, 4, 5)), (2, True)], ids=lambda value: str(value)
)
def test_a_step_of_any_length_at_an_odd_size(steps: int, bf16: bool, device: str) -> None:
    def results(draw: int, *, double: bool = False, fused: bool = False) -> dict[str, Tensor]:
        jepa, *heads = (module.to(device) for module in tiny_model(dstc=3, projector="3-6-5", seed=draw))
        video, digits = (t.to(device) for t in tiny_batch(2, 3, (5, 7), seed=draw + 1))
        if double:
            doubled = tuple(module.double() for module in (jepa, *heads))
            return run(doubled, (video.double(), digits.double()), steps, fused=False)
        return run((jepa, *heads), (video, digits), steps, fused=fused, bf16=bf16)

    judged = judge_draws(
        partial(results, double=True), results, partial(results, fused=True), "bf16" if bf16 else "fp32"
    )
    assert all(judgement.exact for judgement in judged), judged


@pytest.mark.usefixtures("ordered_sums")
def test_twice_the_same_bits(device: str) -> None:
    modules = tuple(module.to(device) for module in tiny_model())
    batch = tuple(t.to(device) for t in tiny_batch(2, 3, (8, 8)))
    first, second = (run(modules, batch, 2, fused=True, bf16=True) for _ in range(2))  # type: ignore[arg-type]
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
