"""How much memory a training step keeps for its backward pass, counted at its sizes, on any machine.

Shapes are traced with fake tensors on the CPU: nothing is computed and nothing of that size is allocated, so the full
recipe is counted on a laptop in a second or two. What is counted is every distinct storage that autograd keeps for the
backward pass, without parameters, buffers and the batch: most of a step's peak.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from fastjepa.fused import recompute as recompute_module
from fastjepa.fused.losses import swap_losses
from fastjepa.kernels import checks
from fastjepa.model.jepa import build_jepa
from fastjepa.model.losses import ProjectionPath
from fastjepa.model.probes import build_probes
from fastjepa.model.step import TrainStep


@dataclass(frozen=True)
class StepSizes:
    """A training step, by its sizes; the default recipe's unless told otherwise."""

    batch: int = 64
    frames: int = 10
    height: int = 64
    width: int = 64
    dobs: int = 1
    henc: int = 32
    hpre: int = 32
    dstc: int = 16
    projector: str = "16-64-64"
    steps: int = 4


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps for the backward pass of one step: of all storages, and of the largest."""

    total: int
    largest: int


def kept_bytes(function: Callable[[], object], owned: Iterable[Tensor]) -> int:
    """Bytes of distinct storage that autograd keeps for the backward pass of `function`, without that of `owned`.

    Real or fake tensors. What is made again in the backward pass (`fused.recompute`) is not kept and not counted.
    """
    return sum(kept_storages(function, owned))


def kept_storages(function: Callable[[], object], owned: Iterable[Tensor]) -> list[int]:
    """The same, storage by storage."""
    known = {tensor.untyped_storage()._cdata for tensor in owned}
    found: dict[int, int] = {}
    alive = []  # a freed storage's address could come back and be counted once for two

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes()
        return tensor

    # Only the innermost hooks see a tensor: outside fused networks these, inside them those of fused.recompute.
    with _replaced(recompute_module, "keep", count), saved_tensors_hooks(count, lambda tensor: tensor):
        function()
    return list(found.values())


def count_step(
    sizes: StepSizes, *, bf16: bool, fused: bool, recompute: bool = False, projection: ProjectionPath = "fused"
) -> Kept:
    """What one step of the published network keeps. Nothing of the caller's is touched, random numbers included.

    Args:
        sizes: of the step.
        bf16: networks in bf16 autocast.
        fused: fused networks; with `recompute`, which make activations again.
        projection: how the losses are computed; the closed form takes half a minute to trace, the others a second.

    Raises:
        ImportError: fused networks or losses, and Triton is not installed.
        ValueError: sizes that make no network, or that its kernels do not take.
    """
    if fused:
        from fastjepa.fused.networks import FusedResNet5, FusedStateOnlyPredictor  # now, and not among fake tensors
    if projection == "fused":
        import fastjepa.kernels.projected_losses.fused  # noqa: F401
    with fake_tensors():
        jepa = build_jepa(
            dobs=sizes.dobs, henc=sizes.henc, hpre=sizes.hpre, dstc=sizes.dstc, projector=sizes.projector,
            std_coeff=10.0, cov_coeff=100.0,
        )  # fmt: skip
        heads = build_probes(dobs=sizes.dobs, dstc=sizes.dstc)
        if fused:
            jepa.encoder = FusedResNet5.from_eager(jepa.encoder, recompute=recompute)
            jepa.predictor = FusedStateOnlyPredictor.from_eager(jepa.predictor, recompute=recompute)
        if projection == "fused":
            swap_losses(jepa, fused=True)
        video = torch.empty(sizes.batch, sizes.dobs, sizes.frames, sizes.height, sizes.width)
        digit_location = torch.empty(sizes.batch, sizes.frames, 8, 8)
        step = TrainStep(
            jepa, *heads, steps=sizes.steps, projection=projection, autocast_dtype=torch.bfloat16 if bf16 else None
        )
        weights = [parameter for module in (jepa, *heads) for parameter in module.parameters()]
        buffers = [buffer for module in (jepa, *heads) for buffer in module.buffers()]
        found = kept_storages(lambda: step.losses(video, digit_location), [*weights, *buffers, video])
    return Kept(sum(found), max(found))


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    """Inside, this attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def fake_tensors(*, beside_real_ones: bool = False) -> Iterator[None]:
    """Inside, new tensors have a shape and no memory, on the CPU, whatever the caller has set. Kernels are let through
    although they could not run there: of them, only what tells the shapes of their results is called.

    `beside_real_ones`: real tensors, weights say, may meet fake ones.
    """
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(1)  # fake tensors belong to one thread
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
            FakeTensorMode(allow_non_fake_inputs=beside_real_ones),
            # A truncated normal is drawn by looking at values, which fake tensors do not have.
            _replaced(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor),
            _replaced(checks, "unavailable_reason", lambda device: None),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
