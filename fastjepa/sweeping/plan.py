"""The runs that a grid, seeds and the trainer's flags mean: for each its options, its words, and its folder.

Every value is looked at here, before the first run begins: by the trainer's own command line, so that a sweep accepts
what a run accepts.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastjepa.config import PRESETS, Config
from fastjepa.sweeping.grid import Grid
from fastjepa.sweeping.words import given, with_preset, without
from fastjepa.training.command_line import parse_config
from fastjepa.training.flags import check_flags
from fastjepa.training.handed_on import refuse_flags

Value = int | float | str | None

_CLIPS = "changes the validation clips, so that mAP could not be compared between cells; give it to all, after --"
_PLACE = "says where a run computes or lies, not what it learns; give it to all runs, after --"
_SAME = "changes how long a run takes, not its numbers; give it to all runs, after --"
# Options that are no axis, and why.
NO_AXIS: dict[str, str] = {
    "seed": "is not an axis: --seeds has the seeds, and every cell is trained with each of them",
    "out": "is the sweep's own: --out names its folder, and each run has one in it",
    "resume": "is not needed: the same command goes on where the sweep was",
    "from_eb_jepa": "is where all runs would begin; give it after --",
    "preset": "gives defaults to all runs; give it after --, and what differs as axes",
    **dict.fromkeys(("device", "data_path", "cache_dir"), _PLACE),
    **dict.fromkeys(("backend", "cuda_graph", "recompute"), _SAME),
    **dict.fromkeys(("data", "digits", "n_val", "n_frames", "canvas", "digit_size"), _CLIPS),
    **dict.fromkeys(("eval_every", "checkpoint_every", "checkpoint_minutes", "log_every", "profile"),
                    "says what a run writes, not what it learns; give it to all runs, after --"),
    **dict.fromkeys(("sync_stats", "timeout_minutes"), "is for several processes, and each run of a sweep is one"),
}  # fmt: skip

_OWN = {
    "--seed": "is the sweep's own: name all seeds with --seeds, before --",
    "--out": "is the sweep's own: name its folder before --",
    "--resume": "is not needed: the same command goes on where the sweep was",
}
# What parse_config holds against the machine that it runs on. A sweep for other machines leaves it to them.
_OF_THE_MACHINE = ("device", "precision", "backend", "cuda_graph", "recompute")
# Options that do not tell two sweeps apart: where a run computes, and when it writes what.
_MAY_DIFFER = (
    "out", "resume", "device", "preset", "data_path", "cache_dir", "checkpoint_every", "log_every", "profile",
    "cuda_graph", "recompute", "eval_every", "checkpoint_minutes", "timeout_minutes", "sync_stats",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training run of a sweep.

    Attributes:
        values: what its cell has, by axis.
        seed: its seed.
        folder: where it lies.
        config: what it should have been trained with.
        flags: the words that say so to the trainer, but --out or --resume.
        left_to_the_machine: options of `config` that the machine decides which trains it, and that are not compared.
    """

    values: Mapping[str, Value]
    seed: int
    folder: Path
    config: Config
    flags: tuple[str, ...]
    left_to_the_machine: frozenset[str] = frozenset()

    @property
    def cell(self) -> str:
        """Its cell in words, which is the name of the cell's folder."""
        return cell_name(self.values)

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """In what the options `saved` with a run differ from what is asked for, in words."""
        asked = self.config.to_json()
        with suppress(ValueError, TypeError):  # what was saved before an option was there has its default
            saved = Config.from_json(dict(saved)).to_json()
        return [
            f"{name} is {saved.get(name, '(absent)')} there and {asked[name]} is asked for"
            for name in asked
            if name not in _MAY_DIFFER and name not in self.left_to_the_machine and saved.get(name) != asked[name]
        ]


def plan_runs(grid: Grid, seeds: Sequence[int], flags: Sequence[str], out: Path, *, prog: str, here: bool) -> list[Run]:
    """All runs, in the order in which they are trained: the whole grid with the first seed, then with the next.

    `here` says whether they are trained on this machine: if not, what depends on a device is left to where they are,
    and `flags` must name a preset. Ends the program with status 2, as the trainer does, where it would refuse `flags`.

    Raises:
        ValueError: an axis or one of its values, a seed, or a flag that a sweep cannot serve; the message names it.
    """
    own = {**_OWN, **{f"--{name}": "is an axis of the grid already" for name in grid.axes}}
    refuse_flags(flags, own | {f"--{name[2:].replace('_', '-')}": reason for name, reason in own.items()})
    common = common_config(flags, prog=prog, here=here)
    flags = with_preset(flags, common.preset)
    axes = {name: _typed_axis(name, words, common) for name, words in grid.axes.items()}
    for precision in axes.get("precision", {}) if here else ():
        parse_config([*without(("precision",), flags), "--precision", precision], prog=f"{prog} --")
    left: frozenset[str] = frozenset()
    if not here:
        left = frozenset(n for n in _OF_THE_MACHINE if n not in axes and given(n, flags) in (None, "auto"))
    runs = []
    for seed in seeds:
        for cell in grid.cells():
            values = {name: axes[name][word] for name, word in cell.items()}
            try:
                config = dataclasses.replace(common, **values, seed=seed)  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"cell {cell_name(values)} with seed {seed}: {error}") from error
            words = [word for name, value in values.items() for word in (f"--{name}", text(value))]
            folder = out / cell_name(values) / f"seed-{seed}"
            runs.append(Run(values, seed, folder, config, (*flags, *words, "--seed", str(seed)), left))
    return runs


def common_config(flags: Sequence[str], *, prog: str, here: bool) -> Config:
    """What `flags` alone ask for; ends the program as the trainer does where they cannot be served."""
    if here:
        return parse_config(flags, prog=f"{prog} --")
    if given("preset", flags) in (None, "auto"):
        raise ValueError(
            f"-- --preset must be one of {', '.join(PRESETS)} in a sweep for other machines: which one auto would take "
            "depends on theirs"
        )
    check_flags(Config, flags, f"{prog} --", Config())
    config = parse_config([*without(_OF_THE_MACHINE, flags), "--device", "cpu"], prog=f"{prog} --")
    asked: dict[str, Any] = {name: value for name in _OF_THE_MACHINE if (value := given(name, flags)) is not None}
    return dataclasses.replace(config, **{"device": "auto", "precision": "auto", **asked})


def _typed_axis(name: str, words: Sequence[str], common: Config) -> dict[str, Value]:
    """word → value, each looked at as the trainer looks at its flags."""
    names = [field.name for field in dataclasses.fields(Config) if field.name not in NO_AXIS]
    if name in NO_AXIS:
        raise ValueError(f"--grid {name} {NO_AXIS[name]}")
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        meant = f"; perhaps {near[0]} is meant" if near else f"; axes may be {', '.join(names)}"
        raise ValueError(f"--grid {name}: there is no such option of the trainer{meant}")
    typed: dict[str, Value] = {}
    for word in words:
        try:
            check_flags(Config, [f"--{name}={word}"], "train.py", common)
        except ValueError as error:
            raise ValueError(f"--grid {name}={word}: {error}") from error
        value = _value(name, word)
        if value == "auto":
            raise ValueError(f"--grid {name}=auto: a value of a grid is named; auto may be another one of them")
        if value in typed.values():
            raise ValueError(f"--grid {name} has the value {text(value)} twice")
        typed[word] = value
    return typed


def _value(name: str, word: str) -> Value:
    """`word`, which was checked, as the option has it."""
    kind = str(next(field.type for field in dataclasses.fields(Config) if field.name == name))
    if word == "None" and "None" in kind:
        return None
    return int(word) if kind.startswith("int") else float(word) if kind.startswith("float") else word


def text(value: Value) -> str:
    """A value as a word, and in names of folders: 10.0 is "10"."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def count_of(runs: int) -> str:
    """ "1 run", "27 runs"."""
    return f"{runs} run{'' if runs == 1 else 's'}"


def cell_name(values: Mapping[str, Value]) -> str:
    """A cell in words: "cov_coeff=10,std_coeff=1"."""
    return ",".join(f"{name}={text(value)}" for name, value in values.items())
