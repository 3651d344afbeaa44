"""The ways to run one computation that are measured against each other.

A computation is a function from named tensors to named tensors; a variant says in which precision its inputs are, how
they are laid out, how the function is built, and where it can run at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fastjepa.kernels.checks import unavailable_reason

Tensors = dict[str, Tensor]
Computation = Callable[[Tensors], Tensors]

COMPILE_DEFAULT, COMPILE_MAX = "default", "max-autotune-no-cudagraphs"


def always(device: torch.device) -> None:
    """Availability of a variant that runs everywhere."""


def needs_cuda(device: torch.device) -> str | None:
    """Availability of a variant that makes no sense on a CPU."""
    return None if device.type == "cuda" else "needs a CUDA device"


def needs_compiler(device: torch.device) -> str | None:
    """Availability of torch.compile, which on a CPU generates C++."""
    if device.type == "cuda" or shutil.which("g++") or shutil.which("clang++"):
        return None
    return "torch.compile needs a C++ compiler on a CPU, and neither g++ nor clang++ is there"


def needs_kernels(device: torch.device) -> str | None:
    """Availability of the fused kernels. The interpreter runs them on a CPU, but its speed says nothing."""
    if device.type == "cpu":
        return "Triton kernels need a CUDA device (the CPU interpreter's speed says nothing)"
    return unavailable_reason(device)


@dataclass(frozen=True)
class Variant:
    """One way to run a case.

    `build(device)` returns the computation, ready to be called many times on the same inputs. `available(device)` says
    why it cannot run there, or None. `prepare` changes how the inputs are laid out, once and untimed. `precision` is
    the arithmetic by which it is judged and whose roofline applies: "fp32", "tf32", "bf16". `given` says, for the row,
    what a peer was given that it does not do by itself. `facts` gives numbers for the row's `quality` that are known
    without measuring; it is asked once the variant has been measured.
    """

    name: str
    build: Callable[[torch.device], Computation]
    precision: str = "fp32"
    dtype: torch.dtype = torch.float32
    available: Callable[[torch.device], str | None] = always
    prepare: Callable[[Tensors], Tensors] = dict
    given: str = ""
    facts: Callable[[], Mapping[str, float]] | None = None


def channels_last(inputs: Tensors) -> Tensors:
    """The same tensors, 4-D and 5-D ones with channels last in memory; leaves that require gradients stay leaves."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return {
        name: x.detach().contiguous(memory_format=formats[x.dim()]).requires_grad_(x.requires_grad)
        if x.dim() in formats
        else x
        for name, x in inputs.items()
    }


def _plain(function: Computation, device: torch.device) -> Computation:
    return function


def _compiled(function: Computation, mode: str, device: torch.device) -> Computation:
    compiled: Computation = torch.compile(function, mode=mode, fullgraph=True, dynamic=False)
    return compiled


def eager(function: Computation, name: str = "eager") -> Variant:
    """Plain fp32 PyTorch."""
    return Variant(name, partial(_plain, function))


def eager_bf16(function: Computation, name: str = "eager bf16") -> Variant:
    """Plain PyTorch on bf16 inputs, channels last."""
    return Variant(name, partial(_plain, function), "bf16", torch.bfloat16, prepare=channels_last)


def compiled(function: Computation, name: str, mode: str = COMPILE_DEFAULT, bf16: bool = False) -> Variant:
    """torch.compile in `mode`, fp32, or bf16 with channels last. Modes with CUDA graphs suit latency cases only."""
    available = needs_compiler if mode == COMPILE_DEFAULT else needs_cuda
    build = partial(_compiled, function, mode)
    precision, dtype = ("bf16", torch.bfloat16) if bf16 else ("fp32", torch.float32)
    return Variant(name, build, precision, dtype, available, channels_last, given="channels-last, one FX graph")


def fused(function: Computation, name: str = "fused", bf16: bool = False) -> Variant:
    """A fused op, fp32 or bf16, channels last."""
    if bf16:
        return Variant(name, partial(_plain, function), "bf16", torch.bfloat16, needs_kernels, channels_last)
    return Variant(name, partial(_plain, function), available=needs_kernels, prepare=channels_last)


def gpu_only(variant: Variant) -> Variant:
    """The same, where there is a GPU: for what takes too long elsewhere."""
    return replace(variant, available=needs_cuda)
