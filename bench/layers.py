"""`python -m bench layers`: both networks whole, then every BatchNorm block: `networks` and `batch_norm` in one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench import batch_norm, networks
from bench.harness.case import Case
from bench.harness.variants import Variant
from bench.recipe import Recipe
from bench.recipe_suite import run_suite


def plans(recipe: Recipe, note: str = "") -> Iterator[tuple[Case, list[Variant]]]:
    """The networks first, then every block."""
    yield from networks.plans(recipe, note)
    yield from batch_norm.plans(recipe, note)


def main(argv: Sequence[str]) -> int:
    """The command line; not 0 if a variant failed."""
    return run_suite("layers", __doc__ or "", argv, plans)
