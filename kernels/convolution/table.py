"""Which kernel a layer is launched with, and how: data, chosen by sizes and architecture alone.

Low latency and throughput are two tables. One frame is few tiles for 132 multiprocessors: small tiles, and all loads
in flight at once. Many frames are bound by memory or by matrix units: large tiles, and rows that are read once for
several results. What each entry is expected to take is in `bench/results/counted/`, from the audit (`python -m bench
convolution --estimate`); nothing here has been measured yet, and nothing is tuned in a user's call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import triton

from fastjepa.kernels.convolution.layer import Layer
from fastjepa.kernels.convolution.stem import fits as fits_stem
from fastjepa.kernels.launch import LaunchConfig

Form = Literal["gemm", "split_k", "strip", "stem", "transposed"]
Instruction = Literal["wgmma", "mma.sync", "tcgen05"]

# Compute capability → the matrix instruction that a configuration is made for. Where there is none, it is not used.
SMALL: Mapping[int, Instruction] = MappingProxyType({80: "mma.sync", 90: "mma.sync", 100: "mma.sync"})
LARGE: Mapping[int, Instruction] = MappingProxyType({80: "mma.sync", 90: "wgmma", 100: "tcgen05"})

ARCHITECTURES = tuple(SMALL)
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Launch:
    """A kernel, its configuration, and the instructions that it is compiled to, which the audit holds it to.

    launch_early: programmatic dependent launch; off until it is measured.
    """

    form: Form
    config: LaunchConfig
    instructions: Mapping[int, Instruction] = field(default_factory=lambda: SMALL)
    launch_early: bool = False


def choose(layer: Layer, architecture: int = 90) -> Launch:
    """The launch of a layer on a GPU of this compute capability (80, 90, 100)."""
    if fits_stem(layer):
        block_i = 64 if layer.rows > 32 else 32 if layer.rows > 16 else 16
        return Launch("stem", _config(32, _columns(layer, 64), block_i, stages=1))
    block_o = _columns(layer, 64)
    if layer.head:
        block_o = max(16, triton.next_power_of_2(layer.out))
    form: Form = "transposed" if layer.is_transposed else "gemm"
    return Launch(form, _config(32, block_o, 32, stages=4, head=layer.head))


def _columns(layer: Layer, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(layer.columns)))


def _config(
    block_n: int, block_o: int, block_i: int, *, stages: int, warps: int = 4, head: int = 0, **more: int
) -> LaunchConfig:
    blocks = {**more, "BLOCK_N": block_n, "BLOCK_D": max(16, triton.next_power_of_2(head)), "BLOCK_I": block_i,
              "BLOCK_O": block_o}  # fmt: skip
    return LaunchConfig(num_warps=warps, num_stages=stages, blocks=blocks)
