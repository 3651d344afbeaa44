"""Training steps on batches that several processes share; as a script, one of these processes.

    python several_steps.py FOLDER CASE...     leaves CASE-RANK.pt in FOLDER

A case is a path, a dtype, whether statistics are global, and where: "closed_form float64 sync cpu".
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastjepa.distributed.group import BatchGroup
from fastjepa.distributed.launch import read_launch
from fastjepa.distributed.ranks import Ranks
from fastjepa.fused.swap import accelerate
from fastjepa.graphs import GraphedTrainStep
from fastjepa.model.jepa import JEPA
from fastjepa.model.networks import DetHead, ImageDecoder
from fastjepa.model.step import StepLosses, TrainStep, build_optimizer
from fastjepa.moving_mnist import ClipSet
from tiny import tiny_batch, tiny_model

# Of 2 processes, the batch of 3 is uneven and that of 1 leaves one empty; of 3, that of 4 is uneven, and two are empty.
BATCHES = (4, 3, 1, 4, 3)
CLIPS = 5
FRAMES = 4


def clips() -> ClipSet:
    video, maps = tiny_batch(CLIPS, FRAMES, (8, 8), seed=5)
    return ClipSet((video[:, 0] * 255).to(torch.uint8), maps.to(torch.uint8))


def batch_indices() -> list[Tensor]:
    order = torch.randperm(sum(BATCHES), generator=torch.Generator().manual_seed(3)) % CLIPS
    return list(order.split(BATCHES))


def model_of_the_cases(dtype: torch.dtype) -> tuple[JEPA, ImageDecoder, DetHead]:
    jepa, decoder, head = tiny_model(seed=1)
    # Small ones: a bias before a BatchNorm has no gradient but what rounding leaves, which Adam makes a step of all the
    # same, and that grows with the losses.
    jepa.regularizer.std_coeff = jepa.regularizer.cov_coeff = 1.0
    return jepa.to(dtype), decoder.to(dtype), head.to(dtype)


def train(case: str, ranks: Ranks, steps: int | None = None) -> dict[str, Any]:
    """Losses of every step (of one case), and the state after the last: gradients, parameters, buffers, Adam's."""
    path, dtype_name, statistics, device = case.split()
    dtype = getattr(torch, dtype_name)
    jepa, decoder, head = (module.to(device) for module in model_of_the_cases(dtype))
    if path == "fused":
        accelerate(jepa, backend="fused", verbose=False)
    optimizer = build_optimizer(jepa, decoder, head, 1e-3)
    step = TrainStep(
        jepa, decoder, head, optimizer, steps=2, projection="closed_form" if path == "graph" else path,  # type: ignore[arg-type]
        group=BatchGroup.of(ranks, sync_stats=statistics == "sync"),
    )  # fmt: skip
    data = clips().to(device)
    graphed = GraphedTrainStep(step, data, dtype=dtype) if path == "graph" else None
    losses = []
    for indices in (batch.to(device) for batch in batch_indices()[:steps]):
        if graphed is not None:
            found: StepLosses = graphed(indices)
        else:
            found = step(*data.batch(ranks.part(indices), dtype), clips=len(indices))
        losses.append(torch.stack(found))
    state: dict[str, Any] = {"losses": torch.stack(losses)}
    for name, module in (("jepa", jepa), ("decoder", decoder), ("head", head)):
        state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        state |= {f"{name}.{key}.grad": p.grad for key, p in module.named_parameters()}
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def main(folder: Path, cases: list[str]) -> None:
    ranks = Ranks(read_launch())
    with ranks.joined():
        ranks.open(torch.device("cpu"), timedelta(minutes=2))
        for case in cases:
            steps = 1 if case.startswith("fused") else None  # the interpreter takes seconds for one
            torch.save(train(case, ranks, steps), folder / f"{case}-{ranks.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
