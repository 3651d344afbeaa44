"""Candidates for the launches of convolutions, for `python -m bench tune`: every layer, with one clip and with 64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton

from bench import convolution, rollout
from bench.harness.case import Case
from bench.harness.variants import Computation, Tensors, Variant, needs_kernels
from bench.launch_words import describe
from bench.recipe import TINY, Recipe
from fastjepa.kernels.convolution import op, split_k, stem, strip, table
from fastjepa.kernels.convolution.layer import Layer
from fastjepa.kernels.convolution.table import Form, Launch
from fastjepa.kernels.launch import LaunchConfig

_STEPS = 8  # of a rollout
_PRODUCTS: dict[Form, bool] = {"gemm": False, "transposed": True}


def candidates(layer: Layer, now: Launch) -> list[Launch]:
    """Neighbours of what the table chooses for a layer, with one block, the warps or the stages changed; and each other
    kernel that takes the layer, with small tiles and with large ones.
    """
    config, blocks = now.config, now.config.blocks
    found = [
        replace(config, blocks={**blocks, name: size})
        for name in ("BLOCK_N", "BLOCK_O", "BLOCK_I")
        for size in (blocks[name] // 2, 2 * blocks[name])
    ]
    for warps in (config.num_warps // 2, 2 * config.num_warps):
        shares = {"BLOCK_P": warps} if now.form == "split_k" else {}  # each warp has a part of the sum
        found.append(replace(config, num_warps=warps, blocks={**blocks, **shares}))
    found += [replace(config, num_stages=n) for n in (1, config.num_stages - 1, config.num_stages + 1, 8)]
    launches = [replace(now, config=changed) for changed in found]
    launches += [Launch(form, other) for form, other in _other_forms(layer) if form != now.form]
    return [launch for launch in launches if launch != now and takes(layer, launch)]


def _other_forms(layer: Layer) -> Iterator[tuple[Form, LaunchConfig]]:
    """Every kernel with a small tile and a large one, fit or not."""
    step = 16 if any(channels % 32 for channels in (*layer.sources, *layer.shortcut)) else 32
    head, every = (max(16, triton.next_power_of_2(n or 1)) for n in (layer.head, layer.columns))

    def blocks(pixels: int, channels: int, *, shares: int = 0, width: int = 0, is_transposed: bool = False) -> Any:
        wide = every if layer.head else min(channels, every)
        sizes = {"BLOCK_P": shares, "BLOCK_N": pixels, "BLOCK_W": width, "BLOCK_D": 0 if is_transposed else head}
        return {name: size for name, size in sizes.items() if size} | {"BLOCK_I": step, "BLOCK_O": wide}

    for form, is_transposed in _PRODUCTS.items():
        yield form, LaunchConfig(4, 8, blocks(32, 32, is_transposed=is_transposed))
        yield form, LaunchConfig(8, 3, blocks(128, 64, is_transposed=is_transposed))
    yield "split_k", LaunchConfig(4, 4, blocks(16, 32, shares=4))
    width = min(64, triton.next_power_of_2(layer.width))
    for pixels, warps in ((64, 4), (128, 8)):
        yield "strip", LaunchConfig(warps, 1, blocks(pixels, every, width=width))


def takes(layer: Layer, launch: Launch) -> bool:
    """Whether a kernel takes a layer so; whether its registers and shared memory are enough, only a GPU says."""
    config, blocks = launch.config, launch.config.blocks
    if not (min(blocks.values()) >= 1 <= config.num_stages and 1 <= config.num_warps <= 8):
        return False
    if min(blocks[name] for name in ("BLOCK_N", "BLOCK_I", "BLOCK_O")) < 16:  # of a dot
        return False
    if blocks["BLOCK_O"] > max(16, triton.next_power_of_2(layer.columns)):
        return False
    if layer.head and blocks["BLOCK_O"] < layer.out:  # one program has all that a head multiplies
        return False
    if launch.form == "split_k":
        return split_k.fits(layer, blocks["BLOCK_I"]) and not layer.is_transposed
    if launch.form == "strip":
        return blocks["BLOCK_N"] >= blocks["BLOCK_W"] and strip.fits(layer, config)
    if launch.form == "stem":
        return stem.fits(layer) and blocks["BLOCK_I"] >= layer.rows
    return (launch.form == "transposed") == layer.is_transposed


def launched(layer: Layer, launch: Launch, device: torch.device) -> Computation:
    """A layer by one launch; takes what `convolution.as_kernels_take` makes."""
    size = (layer.frames, layer.head or layer.out, layer.out_height, layer.out_width)

    def compute(inputs: Tensors) -> Tensors:
        like = inputs["x0"]
        out = torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
        names = ("x0", "x1", "shortcut0", "shortcut1", "weight", "bias", "residual", "head_weight", "head_bias")
        arguments: list[Any] = [
            out, *map(inputs.get, names), layer.kernel_size, layer.stride, layer.shortcut_stride,
            not layer.is_transposed, False,
        ]  # fmt: skip
        op.launch(op.checked_operands(*arguments), launch)
        return {"out": out}

    return compute


class LaunchedEarly:
    """A rollout in one graph, all of whose convolutions are launched while those before them finish, or none; None: as
    the table says.
    """

    def __init__(self, recipe: Recipe, early: bool | None, device: torch.device) -> None:
        way = rollout.Way(bf16=True, own_convolutions=True, graph=True)
        self.rollout, self.early = rollout.build(recipe, _STEPS, way, device), early
        self.recorded = False

    def __call__(self, inputs: Tensors) -> Tensors:
        """{"frames"}; what is chosen is asked when the graph is recorded."""
        if self.recorded:
            return self.rollout(inputs)
        self.recorded = True
        with patch.object(op, "choose", self._choose):
            return self.rollout(inputs)

    def _choose(self, layer: Layer, architecture: int) -> Launch:
        launch = table.choose(layer, architecture)
        return launch if self.early is None else replace(launch, launch_early=self.early)


def rollout_plan(recipe: Recipe) -> tuple[Case, list[Variant]]:
    """A rollout with and without programmatic dependent launch, which only launches that follow each other can show."""
    case = rollout.make_case(recipe, _STEPS)
    eager = [variant for variant in rollout.make_variants(recipe, _STEPS) if variant.name == rollout.EAGER_BF16]
    names = {"now": None, "one after another": False, "launched early": True}
    case = replace(
        case, suite="tune", name=f"convolution.table.choose, rollout of {_STEPS} steps B={recipe.batch}",
        baseline="now", eager={"bf16": rollout.EAGER_BF16},
    )  # fmt: skip
    return case, [
        *eager,
        *(
            Variant(name, partial(LaunchedEarly, recipe, early), "bf16", torch.bfloat16, needs_kernels)
            for name, early in names.items()
        ),
    ]


def plans(quick: bool) -> Iterator[tuple[Case, list[Variant]]]:
    """A whole rollout, then every layer of inference, with one clip and with 64."""
    for batch in (1,) if quick else (1, 64):
        yield rollout_plan(replace(TINY if quick else Recipe(), batch=batch))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for batch in (1,) if quick else (1, 64):
        for name, layer in (convolution.layers_of(1, 16, frames=2) if quick else convolution.layers_of(batch)).items():
            case = convolution.make_case(f"convolution.table.choose, {name} B={batch}", layer)
            now = table.choose(layer, op.architecture(device))
            yield (
                replace(case, suite="tune", baseline="now", eager={"bf16": convolution.EAGER_BF16}),
                make_variants(layer, now),
            )


def make_variants(layer: Layer, now: Launch) -> list[Variant]:
    """Eager, as the measure of errors, the table's choice, and the candidates."""
    bf16, packed = ("bf16", torch.bfloat16), partial(convolution.as_kernels_take, layer)
    launches = {"now": now} | {describe(launch): launch for launch in candidates(layer, now)}
    eager = next(v for v in convolution.make_variants(layer) if v.name == convolution.EAGER_BF16)
    return [
        eager,
        *(
            Variant(name, partial(launched, layer, launch), *bf16, needs_kernels, packed)
            for name, launch in launches.items()
        ),
    ]
