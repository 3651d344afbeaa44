"""OUT/sweep.json: what a sweep was asked for, so that it can go on, or be reported, with its folder alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fastjepa.files.safe_files import CheckpointError, write_text_atomic

RECORD_NAME = "sweep.json"


@dataclass(frozen=True)
class Record:
    """The words of the command line: after --grid, --seeds and --."""

    grid: tuple[str, ...]
    seeds: str
    flags: tuple[str, ...]

    def write(self, out: Path) -> None:
        """Into the sweep's folder, which is made if need be."""
        out.mkdir(parents=True, exist_ok=True)
        values = {"grid": list(self.grid), "seeds": self.seeds, "flags": list(self.flags)}
        write_text_atomic(out / RECORD_NAME, json.dumps(values, indent=2) + "\n")


def read_record(out: Path) -> Record:
    """What `write` wrote.

    Raises:
        ValueError: there is no sweep in `out`.
        CheckpointError: the file is damaged.
    """
    path = out / RECORD_NAME
    if not path.is_file():
        raise ValueError(f"--out {out} holds no sweep ({RECORD_NAME} is not there); a new one needs --grid")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        grid, seeds, flags = values["grid"], values["seeds"], values["flags"]
        if type(seeds) is not str or not all(type(w) is str for w in (*grid, *flags)):
            raise ValueError("it holds something else than words")
        return Record(tuple(grid), seeds, tuple(flags))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
