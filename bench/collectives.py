"""What a training step sends when its batch lies on several GPUs: every collective, counted from the networks.

Each GPU has a share of the batch. What is the batch's (BatchNorm's statistics, the moments of the projected losses) is
gathered from all and merged (`fastjepa/kernels/shares.py`); gradients are added once, after the backward pass.

Legend: C channels, D channels of the state, H features that the projector's BatchNorm sees, K predictions.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from bench.recipe import Recipe, build_model
from fastjepa.model.networks import ResidualBlock
from fastjepa.model.step import StepLosses

Path = Literal["fused", "eager"]
FP32, FP64, INT64 = 4, 8, 8

GRADIENTS = "gradients"
FORWARD, BACKWARD = "BatchNorm forward", "BatchNorm backward"
LOSSES, PROBES, CONTROL = "projected losses", "probes' losses", "control"
STATISTICS = (FORWARD, BACKWARD, LOSSES)  # what statistics of each GPU alone do without

BatchNorms = tuple[nn.BatchNorm2d, ...]


@dataclass(frozen=True)
class Collective:
    """One kind of exchange in a step. `bytes` are what one GPU contributes to one call."""

    what: str
    kind: Literal["all-reduce", "all-gather", "host"]
    bytes: int
    calls: int = 1

    def sent(self, gpus: int) -> float:
        """Bytes that a GPU sends in all calls in a ring, which are the least there can be: the formulas of
        nccl-tests' doc/PERFORMANCE.md.
        """
        share = 2 * (gpus - 1) / gpus if self.kind == "all-reduce" else gpus - 1
        return share * self.bytes * self.calls


def activations(network: nn.Module) -> list[BatchNorms]:
    """The fused activations of a network, each with the BatchNorms that it applies: a normalised shortcut's is part of
    the activation that adds it.
    """
    found: list[BatchNorms] = []
    within: set[nn.Module] = set()
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            shortcut = tuple(m for m in module.shortcut.modules() if isinstance(m, nn.BatchNorm2d))
            found += [(module.bn1,), (module.bn2, *shortcut)]
            within |= {module.bn1, module.bn2, *shortcut}
        elif isinstance(module, nn.BatchNorm2d) and module not in within:
            found.append((module,))
    return found


def batch_norm_collectives(network: nn.Module, calls: int, path: Path) -> list[Collective]:
    """Those of `calls` calls of a network, forward and backward, in fp32.

    Fused, an activation gathers (pivot, mean, M2) of each of its BatchNorms in one call, and in the backward pass its
    sums, which are Σdy and Σdy·x̂, and one more with a normalised shortcut. Eager, each BatchNorm gathers the same,
    and then two sums.
    """
    counted: Counter[tuple[str, int]] = Counter()
    for norms in activations(network):
        if path == "fused":
            C = norms[0].num_features
            counted[FORWARD, 3 * len(norms) * C * FP32] += calls
            counted[BACKWARD, (1 + len(norms)) * C * FP32] += calls
        else:
            for norm in norms:
                counted[FORWARD, 3 * norm.num_features * FP32] += calls
                counted[BACKWARD, 2 * norm.num_features * FP32] += calls
    return [Collective(what, "all-gather", size, times) for (what, size), times in counted.items()]


def loss_collectives(projector: nn.Module, steps: int) -> list[Collective]:
    """Those of the projected losses of 1 + K states, in fp64: moments of rows (Σ and ΣxxT), moments of what the ReLU
    gives, and in the backward pass the sums of BatchNorm's correction.
    """
    first = next(m for m in projector.modules() if isinstance(m, nn.Linear))
    D, H, states = first.in_features, first.out_features, 1 + steps
    sizes = (states * (D + D * D), states * (H + 1) * H, states * (H * D + H))
    return [Collective(LOSSES, "all-gather", size * FP64) for size in sizes]


def step_collectives(recipe: Recipe, path: Path = "fused", *, sync_stats: bool = True) -> list[Collective]:
    """Everything that one training step of `recipe` exchanges, whatever the number of GPUs.

    Without `sync_stats` each GPU normalises by its own clips, and only gradients and the numbers to print are of all.
    """
    jepa, decoder, head = build_model(recipe, torch.device("meta"))
    parameters = {p for module in (jepa, decoder, head) for p in module.parameters()}  # one projector has two losses
    found = [Collective(GRADIENTS, "all-reduce", sum(p.numel() for p in parameters) * FP32)]
    if sync_stats:
        projector = jepa.regularizer.proj
        assert isinstance(projector, nn.Module)
        found += batch_norm_collectives(jepa.encoder, 1, path)
        found += batch_norm_collectives(jepa.predictor, recipe.steps, path)
        found += loss_collectives(projector, recipe.steps)
    # With statistics of its own, a GPU has all nine losses to tell, and not the probes' two alone.
    found.append(Collective(PROBES, "all-gather", (2 if sync_stats else len(StepLosses._fields)) * FP32))
    return [*found, Collective(CONTROL, "host", 2 * INT64)]
