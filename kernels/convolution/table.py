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

from fastjepa.kernels.convolution import split_k, stem, strip
from fastjepa.kernels.convolution.layer import DTYPES, Layer
from fastjepa.kernels.launch import LaunchConfig

Form = Literal["gemm", "split_k", "strip", "stem", "transposed"]
Instruction = Literal["wgmma", "mma.sync", "tcgen05"]

# Compute capability → the matrix instruction that a configuration is made for. Where there is none, it is not used.
SMALL: Mapping[int, Instruction] = MappingProxyType({80: "mma.sync", 90: "mma.sync", 100: "mma.sync"})
LARGE: Mapping[int, Instruction] = MappingProxyType({80: "mma.sync", 90: "wgmma", 100: "tcgen05"})
# On sm_80 four sums do not fit the registers; on sm_100 triton 3.6 and 3.9 spill, with four warps and with eight.
STRIP: Mapping[int, Instruction] = MappingProxyType({90: "wgmma"})

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
    if stem.fits(layer):
        return _stem(layer)
    if layer.precision == "fp32":  # three products: on wgmma operand A would come from registers, which is no safe form
        return _product(layer, Tile(32, 32, 32, stages=3), SMALL)
    if layer.is_transposed:
        return _first_that_fills(layer, _TRANSPOSED) or _small_transposed(layer)
    return _strip(layer, architecture) or _first_that_fills(layer, _LARGE) or _small(layer)


# ---- many frames -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A tile of pixels × channels, of which `least` programs are needed for it to be chosen."""

    pixels: int
    channels: int
    step: int  # channels that are summed at a time
    stages: int
    warps: int = 4
    least: int = 0


# Of two tiles the larger one reads less, but 132 multiprocessors want a program each, or at least half of them one
# where the alternative reads each weight four times as often. With 128 output channels or more, loads are what bounds a
# program, and four stages of 64 channels hide them; with 64, a step is short, and is unrolled.
_LARGE = (
    Tile(128, 128, 64, stages=4, warps=8, least=120),
    Tile(64, 128, 64, stages=4, least=120),
    Tile(128, 64, 32, stages=3, warps=8, least=240),
    Tile(64, 64, 64, stages=4, least=60),
    Tile(128, 32, 32, stages=1, least=240),
)
_TRANSPOSED = (
    Tile(64, 128, 32, stages=3, least=240),
    Tile(64, 64, 64, stages=3, least=60),
)
_STRIP_PIXELS = 64  # of each of its four rows
_STRIP_LEAST = 120


def _first_that_fills(layer: Layer, tiles: tuple[Tile, ...]) -> Launch | None:
    """The first tile that is not wider than the layer, and of which there are enough."""
    for tile in tiles:
        if layer.columns >= tile.channels:
            launch = _product(layer, tile, LARGE)
            blocks = launch.config.blocks
            if _programs(layer, blocks["BLOCK_N"], blocks["BLOCK_O"]) >= tile.least:
                return launch
    return None


def _strip(layer: Layer, architecture: int) -> Launch | None:
    """Four rows at a time, where that is enough programs."""
    if architecture not in STRIP or layer.out > 64 or layer.out != _columns(layer, 64):
        return None
    # With a shortcut and 64 output channels, blocks of 32 take all registers.
    block_i = _step(layer, 16 if layer.out == 64 and layer.shortcut else 32)
    width = min(_STRIP_PIXELS, triton.next_power_of_2(layer.width))
    config = _config(_STRIP_PIXELS, layer.out, block_i, stages=1, head=layer.head, block_w=width)
    enough = strip.fits(layer, config) and strip.grid(layer, config)[0] >= _STRIP_LEAST
    return Launch("strip", config, STRIP) if enough else None


# ---- few frames ------------------------------------------------------------------------------------------------------

_MOST_STAGES = 20  # 78 KB of tiles of 32 × 32: two programs fit an A100
_LEAST_SMALL = 100


def _small(layer: Layer) -> Launch:
    """Tiles of 32 × 32 where they are enough programs, and all loads in flight at once; else sums that warps share."""
    steps = -(-layer.rows // _step(layer, 32))
    enough = _programs(layer, 32, 32) >= _LEAST_SMALL
    if layer.head or (enough and steps < _MOST_STAGES) or not split_k.fits(layer, 16):
        return _product(layer, Tile(32, 32, 32, stages=min(_MOST_STAGES, steps + 2)), SMALL)
    block_o = 32 if _programs(layer, 16, 32) >= _LEAST_SMALL else 16
    block_i = _step(layer, 64)
    turns = -(-layer.rows // (4 * block_i))
    pixels = 32 if enough else 16
    stages = _that_fit(min(5, turns + 1), 4 * (pixels + block_o) * block_i, layer)
    return Launch("split_k", _config(pixels, block_o, block_i, stages=stages, block_p=4))


def _small_transposed(layer: Layer) -> Launch:
    pixels = 32 if _programs(layer, 32, 32) >= _LEAST_SMALL else 16
    return _product(layer, Tile(pixels, 32, 64, stages=-(-layer.rows // 64) + 1), SMALL)


def _stem(layer: Layer) -> Launch:
    """All of a sum is one block of 16, 32 or 64."""
    large = _programs(layer, 128, 32) >= 2 * MULTIPROCESSORS and layer.precision != "fp32"
    block_i = max(16, triton.next_power_of_2(layer.rows))
    config = _config(128 if large else 32, _columns(layer, 64), block_i, stages=1)
    return Launch("stem", config, LARGE if large else SMALL)


# ---- both ------------------------------------------------------------------------------------------------------------


_MOST_SHARED = 128 * 1024  # bytes of tiles; an A100 has 163 KB for a program


def _product(layer: Layer, tile: Tile, instructions: Mapping[int, Instruction]) -> Launch:
    """`gemm`, or `transposed`, with a tile no wider than the layer; with a head as wide as it."""
    form: Form = "transposed" if layer.is_transposed else "gemm"
    block_o, block_i = _columns(layer, 128 if layer.head else tile.channels), _step(layer, tile.step)
    stages = _that_fit(tile.stages, (tile.pixels + block_o) * block_i, layer)
    head = None if layer.is_transposed else layer.head
    config = _config(tile.pixels, block_o, block_i, stages=stages, warps=tile.warps, head=head)
    return Launch(form, config, instructions)


def _that_fit(stages: int, elements: int, layer: Layer) -> int:
    """At most as many stages of so many elements as shared memory has room for, and at least one."""
    return max(1, min(stages, _MOST_SHARED // (elements * DTYPES[layer.precision].itemsize)))


def _programs(layer: Layer, pixels: int, channels: int) -> int:
    return -(-layer.pixels // pixels) * -(-layer.columns // channels)


def _columns(layer: Layer, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(layer.columns)))


def _step(layer: Layer, most: int) -> int:
    """The largest block of channels up to `most` of which every source is a whole number, but at least 16 (32 of what
    has none: it is masked). Of fp32 numbers, which are twice as large, half as many.
    """
    most = max(16, most * 2 // DTYPES[layer.precision].itemsize)
    counts = (*layer.sources, *layer.shortcut)
    whole = [step for step in (64, 32, 16) if step <= most and not any(count % step for count in counts)]
    return whole[0] if whole else min(32, most)


def _config(
    block_n: int,
    block_o: int,
    block_i: int,
    *,
    stages: int,
    warps: int = 4,
    head: int | None = 0,  # None: the kernel has no BLOCK_D
    block_p: int | None = None,
    block_w: int | None = None,
) -> LaunchConfig:
    block_d = None if head is None else max(16, triton.next_power_of_2(head))
    sizes = {
        "BLOCK_P": block_p, "BLOCK_N": block_n, "BLOCK_W": block_w, "BLOCK_D": block_d, "BLOCK_I": block_i,
        "BLOCK_O": block_o,
    }  # fmt: skip
    blocks = {name: size for name, size in sizes.items() if size is not None}
    return LaunchConfig(num_warps=warps, num_stages=stages, blocks=blocks)
