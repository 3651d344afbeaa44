"""What a sweep is asked for, as words: `cov_coeff=1,10,100 std_coeff=1,10`, or the name of a grid; and seeds.

Here only the words are read: whether a name is an option and a value its value is `plan`'s to find out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

# "published" is the ablation of the original's README: mAP for each weight of the covariance (rows) and of the standard
# deviation (columns). "original" is sweep.param_grid in the original's examples/video_jepa/cfgs/default.yaml, with its
# seeds, as its launcher goes through them with --full-sweep; what the map has as rows and columns comes first here.
NAMED: dict[str, dict[str, str]] = {
    "published": {"cov_coeff": "1,10,100", "std_coeff": "1,10,100"},
    "original": {
        "cov_coeff": "1,10,100,200", "std_coeff": "1,10,100,200", "batch_size": "32,64", "lr": "1e-3,1e-4,5e-4",
    },
}  # fmt: skip
SEEDS = "1,1000,10000"  # the original's, of every grid


@dataclass(frozen=True)
class Grid:
    """Axes of a grid as words, in the order in which they were given: option → its values."""

    axes: Mapping[str, tuple[str, ...]]

    def cells(self) -> Iterator[dict[str, str]]:
        """Every combination of values, the last axis fastest."""
        for values in itertools.product(*self.axes.values()):
            yield dict(zip(self.axes, values, strict=True))


def parse_grid(words: Sequence[str]) -> Grid:
    """The grid that follows --grid: the name of one, or axes.

    Raises:
        ValueError: no axis, a word that is neither, a name beside axes, an axis given twice or without a value.
    """
    if not words:
        raise ValueError(f"--grid needs axes like cov_coeff=1,10,100, or one of {', '.join(NAMED)}")
    if len(words) == 1 and words[0] in NAMED:
        words = [f"{name}={values}" for name, values in NAMED[words[0]].items()]
    axes: dict[str, tuple[str, ...]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if word in NAMED:
            raise ValueError(f"--grid {word} is a whole grid; it stands alone, and {' '.join(words)} was given")
        if not equals or not name:
            raise ValueError(f"--grid takes NAME=VALUE,VALUE,… or one of {', '.join(NAMED)}; got {word!r}")
        name = name.removeprefix("--").replace("-", "_")
        if name in axes:
            raise ValueError(f"--grid has {name} twice; give all its values at once, as {name}=1,10")
        axes[name] = _values(f"--grid {word}", values)
    return Grid(axes)


def parse_seeds(text: str) -> tuple[int, ...]:
    """The numbers after --seeds.

    Raises:
        ValueError: not whole numbers of at least 0, or one of them twice.
    """
    seeds = []
    for value in _values(f"--seeds {text}", text):
        if not (value.isascii() and value.isdigit()):
            raise ValueError(f"--seeds must be whole numbers of at least 0, like {SEEDS}; got {value!r}")
        if int(value) in seeds:
            raise ValueError(f"--seeds must be different numbers; {int(value)} is there twice in {text}")
        seeds.append(int(value))
    return tuple(seeds)


def _values(argument: str, text: str) -> tuple[str, ...]:
    values = tuple(value.strip() for value in text.split(","))
    if not all(values):
        raise ValueError(f"{argument}: an empty value; values are separated by single commas")
    return values
