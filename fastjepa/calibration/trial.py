"""What came of one candidate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from fastjepa.calibration.choice import Choice
from fastjepa.calibration.layers import LAYERS, checked_layers

Status = Literal["exact", "wrong", "out of memory", "failed", "unavailable", "crashed", "hung", "not measured"]
_NUMBERS = ("milliseconds", "reference_milliseconds", "error", "bound")
# May be the moment's fault: a kernel's first compilation, somebody else's memory, a variable that was set.
_OF_THE_MOMENT = ("hung", "out of memory", "unavailable")
_ATTEMPTS = 2  # of these, before it counts
REASON_LENGTH = 300
_SHORTEST, _LONGEST = 1e-6, 1e9  # milliseconds
_LARGEST = 1e100  # of any other number


@dataclass(frozen=True)
class Trial:
    """One candidate: whether it is exact, and how long it took beside eager, which alternated with it.

    milliseconds, reference_milliseconds: medians of the candidate and of eager; None if it was not timed, or if there
        was no memory for eager.
    error, bound: of the tensor closest to its bound, by the exactness policy, at `checked_batch` clips.
    rounds: how often the two alternated.
    reason: why it is not "exact", in one line; of an exact candidate, why it has no `faster_layers`.
    attempts: how often it was tried, in one start after another.
    faster_layers: of own convolutions in all layers, those in which they took less time than torch's, layer by layer;
        sorted. None if that was not measured.
    """

    choice: Choice
    status: Status
    reason: str = ""
    milliseconds: float | None = None
    reference_milliseconds: float | None = None
    error: float | None = None
    bound: float | None = None
    checked_batch: int | None = None
    rounds: int | None = None
    attempts: int = 1
    faster_layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"status must be one of {', '.join(get_args(Status))}; got {self.status!r}")
        if self.status == "exact" and self.milliseconds is None:
            raise ValueError("an exact candidate has its time")
        if self.faster_layers is not None:
            checked_layers("faster_layers", self.faster_layers)
            if self.status != "exact" or self.choice.convolutions != "all":
                raise ValueError("faster_layers belong to own convolutions in all layers that were found to be exact")
        # It may quote a compiler, or the last line of a process that died.
        object.__setattr__(self, "reason", printable(self.reason, REASON_LENGTH))

    @property
    def speedup(self) -> float | None:
        """How many times as fast as eager; None if one of them has no time."""
        if self.milliseconds is None or self.reference_milliseconds is None:
            return None
        return self.reference_milliseconds / self.milliseconds

    @property
    def settled(self) -> bool:
        """Whether it is known: what may be the moment's fault is tried again by the next start, once."""
        if self.status == "not measured":
            return False
        return self.status not in _OF_THE_MOMENT or self.attempts >= _ATTEMPTS

    @property
    def measured(self) -> bool:
        """Whether it ran and was compared."""
        return self.milliseconds is not None or self.status == "wrong"

    def __str__(self) -> str:
        if self.status != "exact":
            return f"{self.choice}: {self.status}" + (f": {self.reason}" if self.reason else "")
        if self.speedup is None:
            told = f"{self.choice}: {self.milliseconds:.2f} ms, exact (eager does not fit in memory beside it)"
        else:
            told = f"{self.choice}: {self.speedup:.2f}× eager ({self.milliseconds:.2f} ms), exact"
        if self.faster_layers is not None:
            told += f"; alone, {len(self.faster_layers)} of {len(LAYERS)} layers are faster than torch's"
        return told + (f"; {self.reason}" if self.reason else "")

    def to_json(self) -> dict[str, Any]:
        """Plain values only; an error without limit is told by `reason`."""
        values = asdict(self)
        for name in _NUMBERS:
            if values[name] is not None and not values[name] <= _LARGEST:
                values[name] = None
        if self.faster_layers is not None:
            values["faster_layers"] = list(self.faster_layers)
        return values

    @staticmethod
    def from_json(values: Any) -> Trial:
        """The inverse of `to_json`. Raises ValueError for anything else, field by field."""
        names = [field.name for field in fields(Trial)]
        if not isinstance(values, Mapping) or set(values) != set(names):
            raise ValueError(f"a trial is a table of {', '.join(names)}")
        for name in _NUMBERS:
            value = values[name]
            if value is not None and not (type(value) in (int, float) and value >= 0):
                raise ValueError(f"{name} must be a number ≥ 0 or null, got {value!r}")
            # Python's whole numbers have no largest: this compares before anything is made a float of.
            if value is not None and not value <= _LARGEST:
                raise ValueError(f"{name} must be at most {_LARGEST:.0e}, got {value!r:.40}")
        for name in ("milliseconds", "reference_milliseconds"):
            if values[name] is not None and not _SHORTEST <= values[name] <= _LONGEST:
                raise ValueError(f"{name} must be from {_SHORTEST} to {_LONGEST:.0e}, got {values[name]!r:.40}")
        if type(values["status"]) is not str or type(values["reason"]) is not str:
            raise ValueError("status and reason must be text")
        if values["reason"] != printable(values["reason"], REASON_LENGTH):
            raise ValueError(f"reason must be printable text of at most {REASON_LENGTH} characters")
        for name in ("checked_batch", "rounds"):
            value = values[name]
            if value is not None and not (type(value) is int and 1 <= value <= _LARGEST):
                raise ValueError(f"{name} must be a whole number ≥ 1 or null, got {value!r:.40}")
        if not (type(values["attempts"]) is int and 1 <= values["attempts"] <= _LARGEST):
            raise ValueError(f"attempts must be a whole number ≥ 1, got {values['attempts']!r:.40}")
        faster = values["faster_layers"]
        if faster is not None and not (isinstance(faster, list) and all(type(layer) is str for layer in faster)):
            raise ValueError(f"faster_layers must be a list of names or null, got {faster!r:.40}")
        made = {
            "choice": Choice.from_json(values["choice"]),
            "faster_layers": None if faster is None else tuple(faster),
        }
        return Trial(**{**values, **made})


def printable(text: str, length: int) -> str:
    """At most `length` characters of it, and "?" for each that a terminal would obey or cannot show."""
    return "".join(character if character.isprintable() else "?" for character in text[:length])


def settled(trials: Iterable[Trial]) -> list[Trial]:
    """Those that a new start need not try again. Where nothing was measured, perhaps the GPU was taken: none is."""
    known = list(trials)
    return [trial for trial in known if trial.settled] if any(trial.measured for trial in known) else []


def scores(trials: Iterable[Trial]) -> dict[Choice, float]:
    """Milliseconds of the exact candidates, comparable with each other.

    A machine's speed drifts while they are measured one after another, so each counts relative to the eager runs that
    alternated with it. Where eager had no memory, the time itself must do.
    """
    exact = [trial for trial in trials if trial.status == "exact"]
    typical = typical_reference(exact)
    found = {}
    for trial in exact:
        assert trial.milliseconds is not None
        drift = 1.0 if trial.reference_milliseconds is None else (typical or 1.0) / trial.reference_milliseconds
        found[trial.choice] = trial.milliseconds * drift
    return found


def typical_reference(trials: Iterable[Trial]) -> float | None:
    """The median of eager's medians; None if it never fitted in memory."""
    times = sorted(t.reference_milliseconds for t in trials if t.reference_milliseconds is not None)
    return times[len(times) // 2] if times else None
