"""`python -m bench tune`: time candidate launch configurations of the fused kernels on this GPU, and rank them.

Each candidate replaces one entry of a launch table for the length of a call; forward and backward run as one phase, in
bf16, at the default recipe's size. The table of convolutions is a function, so their candidates are launched in the
place of what it chooses (`tune_convolution.py`). Nothing is changed: put the winner into its table by hand, and audit
it (`python -m bench audit`), since a table's comments say why each entry is what it is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bench import batch_norm, projected_losses, tune_convolution
from bench.harness import suite
from bench.harness.case import BOTH, Case
from bench.harness.rows import Row, format_table
from bench.harness.variants import Computation, Tensors, Variant, always, channels_last, needs_kernels
from bench.launch_words import describe
from bench.recipe import Recipe
from fastjepa.kernels.launch import LaunchConfig
from fastjepa.kernels.projected_losses import closed_form

EAGER = "eager bf16"
_LEAST_PROGRAMS = 128  # fewer would leave multiprocessors of a large GPU idle


@dataclass(frozen=True)
class Entry:
    """One entry of one launch table: `getattr(module, table)[key]`."""

    module: str
    table: str
    key: Any

    @property
    def values(self) -> dict[Any, Any]:
        """The table itself, which its module reads at every launch."""
        found: dict[Any, Any] = getattr(importlib.import_module(self.module), self.table)
        return found

    def __str__(self) -> str:
        return f"{self.module.removeprefix('fastjepa.kernels.')}.{self.table}[{self.key!r}]"


@contextmanager
def entry_set(entry: Entry, value: Any) -> Iterator[None]:
    """Inside, the entry is `value`."""
    before = entry.values[entry.key]
    entry.values[entry.key] = value
    try:
        yield
    finally:
        entry.values[entry.key] = before


def forward_and_backward(function: Computation, cotangents: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
    """The outputs of `function`, and the gradients of all its leaves as "gradient of <input>"."""
    outputs = function(inputs)
    wanted = cotangents({name: x.detach() for name, x in outputs.items()})
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    grads = torch.autograd.grad([outputs[name] for name in wanted], list(leaves.values()), list(wanted.values()))
    found = {name: outputs[name].detach() for name in wanted}
    return found | {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}


class Candidate:
    """Forward and backward with an entry set to a value; `build` makes the function that is called."""

    def __init__(
        self, build: Callable[[torch.device], Computation], cotangents: Callable[[Tensors], Tensors], entry: Entry,
        value: Any, device: torch.device,
    ) -> None:  # fmt: skip
        self.function, self.cotangents, self.entry, self.value = build(device), cotangents, entry, value

    def __call__(self, inputs: Tensors) -> Tensors:
        """See forward_and_backward."""
        with entry_set(self.entry, self.value):
            return forward_and_backward(self.function, self.cotangents, inputs)


def tiling_candidates(entry: Entry) -> list[Any]:
    """Neighbours of a BatchNorm tiling: half to four times the tile, half to twice the programs."""
    now = entry.values[entry.key]
    keeps_sums = entry.key.startswith(("statistics", "reduce"))
    tiling: Any = importlib.import_module(entry.module)
    programs = [p for p in (now.max_programs // 2, now.max_programs, 2 * now.max_programs) if p >= _LEAST_PROGRAMS]
    return [
        replace(now, tile_bytes=tile, max_programs=count)
        for tile in (2048, 4096, 8192, 16384)
        for count in programs
        if not keeps_sums or count <= tiling.MAX_PARTIALS
    ]


def launch_candidates(entry: Entry) -> list[Any]:
    """Half and twice the rows of a tile, and half and twice the warps; an entry may be (config, something else)."""
    now = entry.values[entry.key]
    config: LaunchConfig = now[0] if isinstance(now, tuple) else now
    found = []
    for rows in (config.blocks["BLOCK_N"] // 2, config.blocks["BLOCK_N"], 2 * config.blocks["BLOCK_N"]):
        for warps in (config.num_warps // 2, config.num_warps, 2 * config.num_warps):
            if rows >= 16 and 1 <= warps <= 16:
                changed = replace(config, num_warps=warps, blocks={**config.blocks, "BLOCK_N": rows})
                found.append((changed, *now[1:]) if isinstance(now, tuple) else changed)
    return found


def _case_and_variants(
    case: Case, build: Callable[[torch.device], Computation], entry: Entry, candidates: list[Any]
) -> tuple[Case, list[Variant]]:
    assert case.cotangents is not None
    assert case.truth is not None
    eager = partial(forward_and_backward, case.truth, case.cotangents)
    whole = replace(
        case, suite="tune", name=f"{entry}, {case.name}", truth=eager, phase=BOTH, cotangents=None,
        work=partial(_work, case), baseline="now", eager={"bf16": EAGER}, scale_of={
            name.replace("grad ", "gradient of "): scale.replace("grad ", "gradient of ")
            for name, scale in case.scale_of.items()
        },
    )  # fmt: skip
    now = entry.values[entry.key]
    values = {"now": now} | {describe(value): value for value in candidates if value != now}
    variants = [Variant(EAGER, partial(_same, eager), "bf16", torch.bfloat16, always, channels_last)]
    variants += [
        Variant(
            name, partial(Candidate, build, case.cotangents, entry, value), "bf16", torch.bfloat16, needs_kernels,
            channels_last,
        )
        for name, value in values.items()
    ]  # fmt: skip
    return whole, variants


def _work(case: Case, phase: str, dtype: torch.dtype) -> Any:
    return case.work(BOTH, dtype)


def _same(function: Computation, device: torch.device) -> Computation:
    return function


def fused_losses(device: torch.device) -> Computation:
    """The fused projected losses."""
    return projected_losses.compute_fused


def plans(quick: bool) -> Iterator[tuple[Case, list[Variant]]]:
    """Every tunable entry, each at the shape of the recipe where it matters most."""
    frames, pixels = (4, 8) if quick else (576, 64)
    tilings = "fastjepa.kernels.batch_norm.tiling"
    for key in importlib.import_module(tilings).TILINGS:
        form = {"residual": batch_norm.RESIDUAL, "normalized_residual": batch_norm.NORMALIZED}.get(
            key.rpartition("/")[2], batch_norm.PLAIN
        )
        entry = Entry(tilings, "TILINGS", key)
        case = batch_norm.block_case(batch_norm.Block(frames, 32, pixels, form))
        yield _case_and_variants(case, batch_norm.build_fused_block, entry, tiling_candidates(entry))
    recipe = Recipe(batch=1, frames=2, pixels=8, steps=2) if quick else Recipe()
    half = (64, False)  # hidden features (of `centred_linear`, channels), whether fp32
    entries = [
        Entry("fastjepa.kernels.projected_losses.forward", "_CONFIGS", half),
        Entry("fastjepa.kernels.projected_losses.backward", "_CONFIGS", half),
        Entry("fastjepa.kernels.moments.narrow", "NARROW_CONFIGS", 16),
        Entry("fastjepa.kernels.moments.centred_linear", "_CONFIGS", (16, False)),
    ]
    case = replace(
        projected_losses.make_case(recipe), truth=partial(projected_losses.compute, closed_form.projected_losses)
    )
    for entry in entries:
        yield _case_and_variants(case, fused_losses, entry, launch_candidates(entry))
    yield from tune_convolution.plans(quick)


def print_ranking(rows: list[Row]) -> None:
    """The three fastest exact candidates of each case, and how they compare with what the table has now."""
    body = []
    for name in dict.fromkeys(row.case for row in rows):
        exact = [row for row in rows if row.case == name and row.status == "exact" and row.variant != EAGER]
        ranked = sorted(exact, key=lambda row: row.median_ms or 0.0)
        for place, row in enumerate(ranked[:3], start=1):
            speedup = "" if row.speedup is None else f"{row.speedup:.3f}x"
            body.append([name if place == 1 else "", str(place), row.variant, f"{row.median_ms:.4f}", speedup])
        if not ranked:
            reason = next((row.reason for row in rows if row.case == name and row.variant == "now"), "nothing is exact")
            body.append([name, "", reason, "", ""])
    print("\n" + format_table(["entry and case", "rank", "candidate", "ms", "against now"], body))


def main(argv: Sequence[str]) -> int:
    """The command line. A candidate that does not compile or fit is a result: the status is 0 all the same."""
    parser = suite.make_parser("tune", __doc__ or "")
    args = parser.parse_args(argv)
    options = suite.resolve("tune", parser, args, argv)
    settings = replace(options.settings, memory=False, warmup=1)
    options = replace(options, settings=replace(settings, seconds=args.seconds or 1.0))
    status = suite.run(options, parser, plans(options.quick), print_ranking)
    return status if status == suite.DEVICE_LOST else 0
