"""The suites' cases as pytest-benchmark entry points, at smoke-run sizes: `pytest bench/ --benchmark-only`.

One benchmark for each case and each variant that can run here; on a CPU without those that must be compiled first.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch

from bench import convolution, evaluation, layers, projected_losses, rollout, step
from bench.harness.case import Case, Runner
from bench.harness.variants import Variant
from bench.recipe import TINY, Recipe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def plans() -> Iterator[tuple[Case, list[Variant]]]:
    yield (
        projected_losses.make_case(Recipe(1, frames=3, pixels=32)),
        projected_losses.make_variants(),
    )
    yield from islice(layers.plans(TINY), 4)  # both networks and two blocks
    yield from islice(convolution.plans((1,), quick=True), 2)
    yield rollout.make_case(TINY, 4), rollout.make_variants(TINY, 4)
    yield step.make_case(TINY), step.make_variants(TINY, DEVICE)
    yield evaluation.make_case(TINY), evaluation.make_variants(TINY)


RUNS = [
    pytest.param(case, variant, id=f"{case.suite} {case.name} {variant.name}")
    for case, variants in plans()
    for variant in variants
    if variant.available(DEVICE) is None and (DEVICE.type == "cuda" or not variant.name.startswith("torch.compile"))
]


@pytest.mark.parametrize(("case", "variant"), RUNS)
def test_benchmark(case: Case, variant: Variant, benchmark: Any) -> None:
    runner = Runner(case, variant, DEVICE, case.make_inputs(DEVICE, variant.dtype))

    def run() -> None:
        runner.run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.suite} {case.name}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    assert benchmark.stats.stats.rounds == 5
