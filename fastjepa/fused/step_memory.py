"""How much memory a training step takes, counted at its sizes before it runs, on any machine.

Shapes are traced with fake tensors on the CPU: nothing is computed and nothing of that size is allocated, so the full
recipe is counted on a laptop in a second or two. What is counted is every distinct storage that autograd keeps for the
backward pass, without parameters, buffers and the batch: most of a step's peak. What comes on top is the margin below.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from fastjepa.calibration.memory import Memory
from fastjepa.calibration.setting import Setting
from fastjepa.fused import recompute as recompute_module
from fastjepa.kernels import checks
from fastjepa.model.jepa import build_jepa
from fastjepa.model.losses import ProjectionPath
from fastjepa.model.probes import build_probes
from fastjepa.model.step import TrainStep

# Gradients in flight, as multiples of the largest tensor that is kept. At the default recipe in bf16 an H100 showed 4
# of fused networks and 5 of eager ones on top of what is kept (bench/results: the peaks of `python -m bench step`).
GRADIENTS_IN_FLIGHT = 8
# Each weight, its gradient and Adam's two moments.
COPIES_OF_WEIGHTS = 4
# Workspaces of cuDNN and cuBLAS, a CUDA context of a child that measures, kernels' code.
WORKSPACES = 1 << 30
# What the allocator has cut into pieces that do not fit, as a part of what is kept.
FRAGMENTATION = 1 / 16


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

    @staticmethod
    def of(setting: Setting) -> StepSizes:
        """Those of a calibration."""
        return StepSizes(
            setting.batch, setting.frames, setting.height, setting.width, setting.dobs, setting.henc, setting.hpre,
            setting.dstc, setting.projector, setting.steps,
        )  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps for the backward pass of one step: of all storages, and of the largest; and those of
    the weights, which it does not count.
    """

    total: int
    largest: int
    weights: int = 0

    @property
    def needed(self) -> int:
        """What the step takes in all, with the margin for what is not counted."""
        return (
            self.total
            + int(self.total * FRAGMENTATION)
            + GRADIENTS_IN_FLIGHT * self.largest
            + COPIES_OF_WEIGHTS * self.weights
            + WORKSPACES
        )


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
    with patch.object(recompute_module, "keep", count), saved_tensors_hooks(count, lambda tensor: tensor):
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
        video = torch.empty(sizes.batch, sizes.dobs, sizes.frames, sizes.height, sizes.width)
        digit_location = torch.empty(sizes.batch, sizes.frames, 8, 8)
        step = TrainStep(
            jepa, *heads, steps=sizes.steps, projection=projection, autocast_dtype=torch.bfloat16 if bf16 else None
        )
        weights = [parameter for module in (jepa, *heads) for parameter in module.parameters()]
        buffers = [buffer for module in (jepa, *heads) for buffer in module.buffers()]
        found = kept_storages(lambda: step.losses(video, digit_location), [*weights, *buffers, video])
    return Kept(sum(found), max(found), sum(weight.nbytes for weight in weights))


@functools.cache
def _count_fused(sizes: StepSizes, bf16: bool, recompute: bool) -> Kept:
    try:
        return count_step(sizes, bf16=bf16, fused=True, recompute=recompute)
    except ValueError:  # a projector that the kernels of the losses do not take
        return count_step(sizes, bf16=bf16, fused=True, recompute=recompute, projection="eager")


def step_memory(setting: Setting, free: int, clips: int = 0) -> Memory | str:
    """What a training step of fused networks needs at this setting, beside what is free; or why it cannot be counted.

    Args:
        setting: of training.
        free: bytes of the device that are free.
        clips: bytes of clips that are still to be put there.
    """
    sizes, bf16 = StepSizes.of(setting), setting.precision == "bf16"
    try:
        keeping, recomputing = (_count_fused(sizes, bf16, recompute).needed + clips for recompute in (False, True))
    except Exception as error:  # whatever torch raises where it traces otherwise: a count is worth no failed run
        line = (str(error).strip().splitlines() or [""])[0]
        return f"the memory of a step could not be counted ({type(error).__name__}: {line[:200]}): recomputation first"
    return Memory(keeping, recomputing, free)


def memory_on(setting: Setting, device: torch.device, clips: int = 0) -> Memory | str:
    """`step_memory` beside what is free on this GPU; "" where it does not matter: no GPU, no training, no kernels."""
    if device.type != "cuda" or setting.purpose != "train" or checks.unavailable_reason(device) is not None:
        return ""
    return step_memory(setting, free_bytes(device), clips)


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that this process can still take: those of nobody, and those that it has set aside."""
    set_aside = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + set_aside


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
            patch("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor),
            patch.object(checks, "unavailable_reason", lambda device: None),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
