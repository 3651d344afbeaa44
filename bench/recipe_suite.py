"""The command line of suites whose cases follow from a recipe: `--batch`, and everything that all suites have."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch

from bench.harness import suite
from bench.harness.case import Case
from bench.harness.variants import Variant
from bench.recipe import TINY, Recipe


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """--batch, for suites at the default recipe's sizes."""
    parser.add_argument("--batch", type=int, help="clips (default: 64 on a GPU, 2 on a CPU; --quick: a tiny recipe)")


def chosen_recipe(parser: argparse.ArgumentParser, args: argparse.Namespace, device: torch.device) -> Recipe:
    """The recipe that the options ask for."""
    if args.batch is not None and args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    if args.quick:
        return TINY if args.batch is None else replace(TINY, batch=args.batch)
    return Recipe(batch=args.batch or (64 if device.type == "cuda" else 2))


def run_suite(
    name: str,
    doc: str,
    argv: Sequence[str],
    plans: Callable[[Recipe, str], Iterable[tuple[Case, Sequence[Variant]]]],
) -> int:
    """The whole command line of a suite whose cases follow from a recipe; not 0 if a variant failed.

    `doc` is the suite's module docstring; `plans` makes its cases from the recipe and a note for their names.
    """
    parser = suite.make_parser(name, doc)
    add_recipe_options(parser)
    args = parser.parse_args(argv)
    options = suite.resolve(name, parser, args, argv)
    recipe = chosen_recipe(parser, args, options.device)
    return suite.run(options, parser, plans(recipe, " (quick)" if options.quick else ""))
