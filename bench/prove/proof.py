"""What became of each part of a proof, in prove.json, written after each part."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.harness.rows import format_table, write_text

PASSED, FAILED, OUT_OF_TIME, SKIPPED, PENDING = "passed", "failed", "out of time", "skipped", "not started"


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    status: str
    seconds: float = 0.0
    note: str = ""


class Proof:
    """The folder of one proof. Raises ValueError if it was begun with other settings or holds something else."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.outcomes: dict[str, Outcome] = {}
        if not self._path.exists():
            return
        try:
            saved = json.loads(self._path.read_text(encoding="utf-8"))
            begun, outcomes = saved["settings"], {n: Outcome(**outcome) for n, outcome in saved["parts"].items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{self._path} is not what became of a proof ({error!r}); choose another --out") from error
        if begun != settings:
            raise ValueError(
                f"{folder} was begun with {begun}, this is {settings} (code: a digest of the sources); choose another "
                "--out to start anew"
            )
        self.outcomes = outcomes

    @property
    def _path(self) -> Path:
        return self.folder / "prove.json"

    def passed(self, name: str) -> bool:
        """Whether this part has passed, now or in an earlier call."""
        return name in self.outcomes and self.outcomes[name].status == PASSED

    def forget(self, name: str) -> None:
        """As if this part had never run."""
        self.outcomes.pop(name, None)

    def note(self, name: str, outcome: Outcome) -> None:
        """Keep what a part came to."""
        self.outcomes[name] = outcome
        saved = {"settings": self.settings, "parts": {name: asdict(o) for name, o in self.outcomes.items()}}
        write_text(self._path, json.dumps(saved, indent=1) + "\n")

    def render(self) -> str:
        """What each part came to, as a table."""
        rows = [[name, o.status, f"{o.seconds:.0f}", o.note] for name, o in self.outcomes.items()]
        return format_table(["part", "status", "s", "note"], rows)


def settings_of(folder: Path) -> Any:
    """What the proof in `folder` was begun with; None if there is none that can be read."""
    try:
        return json.loads((folder / "prove.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
