"""`python -m bench saved`: what one training step keeps for its backward pass, in bytes, at any size, on any machine.

Shapes are traced with fake tensors: nothing is computed and nothing of that size is allocated, so the full recipe fits
on a laptop. What is counted is every distinct storage that autograd keeps, without parameters, buffers and the batch:
most of a step's peak memory, to which the gradients in flight come on top.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from fastjepa.fused import recompute
from fastjepa.kernels.checks import unavailable_reason
from fastjepa.model.jepa import build_jepa
from fastjepa.model.probes import build_probes
from fastjepa.model.projected_losses import ProjectionPath
from fastjepa.model.step import TrainStep

# (name, fused networks, bf16 autocast, how the losses are projected)
VARIANTS: tuple[tuple[str, bool, bool, ProjectionPath], ...] = (
    ("eager fp32", False, False, "eager"),
    ("eager bf16", False, True, "eager"),
    ("closed-form losses, fp32", False, False, "closed_form"),
    ("closed-form losses, bf16", False, True, "closed_form"),
    ("fused fp32", True, False, "fused"),
    ("fused bf16", True, True, "fused"),
)


def kept_bytes(function: Callable[[], object], owned: Iterable[Tensor]) -> int:
    """Bytes of distinct storage that autograd keeps for the backward pass of `function`, without that of `owned`.

    Real or fake tensors. What is made again in the backward pass (`fused.recompute`) is not kept and not counted.
    """
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
    with patch.object(recompute, "keep", count), saved_tensors_hooks(count, lambda tensor: tensor):
        function()
    return sum(found.values())


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes in the calling thread only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def saved_bytes(batch: int, fused: bool, bf16: bool, projection: ProjectionPath) -> int:
    """Bytes kept by one step of the default recipe (T = 10, 64×64, widths 32, D = 16, 4 steps) at `batch` clips."""
    # Fake tensors belong to one thread. A truncated normal is drawn by looking at values, which they do not have.
    with one_thread(), FakeTensorMode(), patch("torch.nn.init.trunc_normal_", lambda tensor, **_: tensor):
        jepa = build_jepa(dobs=1, henc=32, hpre=32, dstc=16, std_coeff=10.0, cov_coeff=100.0)
        heads = build_probes(dobs=1, dstc=16)
        if fused:
            from fastjepa.fused.networks import FusedResNet5, FusedStateOnlyPredictor

            jepa.encoder = FusedResNet5.from_eager(jepa.encoder)
            jepa.predictor = FusedStateOnlyPredictor.from_eager(jepa.predictor)
        video, digit_location = torch.empty(batch, 1, 10, 64, 64), torch.empty(batch, 10, 8, 8)
        autocast_dtype = torch.bfloat16 if bf16 else None
        step = TrainStep(jepa, *heads, steps=4, projection=projection, autocast_dtype=autocast_dtype)
        owned = [tensor for module in (jepa, *heads) for tensor in (*module.parameters(), *module.buffers())]
        return kept_bytes(lambda: step.losses(video, digit_location), [*owned, video])


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench saved", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=64, help="clips (default: 64, the recipe's)")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported: lets them be traced on the CPU
    print(f"kept for the backward pass by one step, batch {args.batch}:")
    no_kernels = unavailable_reason(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for name, fused, bf16, projection in VARIANTS:
        if fused and no_kernels:
            print(f"  {name:<26} unavailable: {no_kernels}")
            continue
        print(f"  {name:<26} {saved_bytes(args.batch, fused, bf16, projection) / 1e9:6.2f} GB")
    return 0
