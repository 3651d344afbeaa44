"""Candidates measured in child processes, so that one that crashes or hangs costs only itself.

A child (`python -m fastjepa.trials`) goes through the search by itself and appends a line to a file when it begins a
candidate, and one when it knows what came of it. If it dies, the candidate that it had begun is to blame, and another
child goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastjepa.calibration.choice import Choice
from fastjepa.calibration.search import among, next_choice
from fastjepa.calibration.setting import Purpose, Setting
from fastjepa.calibration.trial import Trial, settled
from fastjepa.sweeping.child_process import Ended, run_child

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds: for everything, for the start of a child until eager is done, and for one candidate, whose kernels may
    have to compile.
    """

    total: float = 60.0
    start: float = 25.0
    candidate: float = 25.0

    @staticmethod
    def of(purpose: Purpose) -> Limits:
        """Those of a purpose: own convolutions, of inference, are some sixty kernels, in two precisions and sizes, and
        must not seem to hang while they compile for the first time.
        """
        return Limits() if purpose == "train" else Limits(total=120.0, candidate=75.0)


def measure(
    setting: Setting,
    device: str,
    say: Callable[[str], None],
    *,
    known: Sequence[Trial] = (),
    allowed: Callable[[Choice], bool] = lambda _: True,
    recompute: bool = True,
    keep: Callable[[tuple[Trial, ...]], None] = lambda _: None,
    limits: Limits | None = None,
    makers: str | None = None,
) -> tuple[Trial, ...]:
    """Try candidates until none is left or the time is over; what came of each, in order.

    Args:
        setting: what for.
        device: where candidates run.
        say: gets a line for each.
        known: what came of candidates before; the search goes on from those that are settled, and tries others again.
        allowed: whether a choice is to be tried at all.
        recompute: whether fused networks are first tried with recomputation (`search.next_choice`).
        keep: gets all trials whenever one was added, so that what was measured survives whatever ends this process.
        limits: of time.
        makers: "module:function" that makes candidates in place of the real ones, for the rehearsals in tests.

    A trial "not measured" is the one that was under way when the time was over, or that no child could begin.
    """
    limits = limits or Limits.of(setting.purpose)
    begun_at = time.monotonic()
    trials = _Trials(known, allowed, keep)
    with tempfile.TemporaryDirectory(prefix="fastjepa-calibration-", ignore_cleanup_errors=True) as folder:
        number = 0
        while (choice := next_choice(setting.purpose, trials.of_search(), recompute)) is not None:
            left = limits.total - (time.monotonic() - begun_at)
            if left < 1.0:
                break
            number += 1
            child = _Child(Path(folder) / str(number), limits, say, begun_at, trials.add)
            request = {
                "setting": setting.to_json(), "device": device, "recompute": recompute, "makers": makers,
                "trials": [trial.to_json() for trial in trials.of_search()],
            }  # fmt: skip
            ended = child.run(request, left)
            if child.begun is not None or not child.started:
                blamed = _blame(child.begun or choice, ended, child.too_slow, child.started)
                trials.add(blamed)
                say(f"[{time.monotonic() - begun_at:3.0f} s] {blamed}")
            if not child.started or (ended.status is None and not child.too_slow):
                break  # no child can be started, or eager itself does not run; or the time is over
    return trials.all()


class _Trials:
    """What is known so far, of this start and of those before."""

    def __init__(
        self,
        known: Sequence[Trial],
        allowed: Callable[[Choice], bool],
        keep: Callable[[tuple[Trial, ...]], None],
    ) -> None:
        self.allowed, self.keep = allowed, keep
        self._settled = settled(known)
        self._again = {trial.choice: trial for trial in known if trial not in self._settled}
        self._new: list[Trial] = []

    def of_search(self) -> list[Trial]:
        """What the next candidate depends on."""
        return among(self.allowed, [*self._settled, *self._new])

    def all(self) -> tuple[Trial, ...]:
        """Also those of before that are to be tried again, and were not yet."""
        return (*self._settled, *self._new, *self._again.values())

    def add(self, trial: Trial) -> None:
        before = self._again.get(trial.choice)
        if trial.status == "not measured" and before is not None:
            return  # what came of it before says more
        if before is not None:
            del self._again[trial.choice]
            trial = dataclasses.replace(trial, attempts=before.attempts + (before.status != "not measured"))
        self._new.append(trial)
        self.keep(self.all())


def _blame(choice: Choice, ended: Ended, too_slow: bool, started: bool) -> Trial:
    """The trial of the candidate that a child had begun when it ended, or would have."""
    reason = ended.reason or "its process ended early"
    if ended.status is None and not too_slow:
        return Trial(choice, "not measured", "the time was over")
    if not started:  # which is no candidate's fault
        return Trial(choice, "not measured", reason)
    if ended.status is None:
        return Trial(choice, "hung", f"no result after {ended.seconds:.0f} s; its process was ended")
    return Trial(choice, "crashed", reason)


class _Child:
    """One child process, and what it has told so far."""

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        say: Callable[[str], None],
        begun_at: float,
        add: Callable[[Trial], None],
    ) -> None:
        folder.mkdir()
        self.folder, self.limits, self.say, self.begun_at, self.add = folder, limits, say, begun_at, add
        self.begun: Choice | None = None
        self.started = False
        self.too_slow = False
        self._read = 0  # bytes of the results that were understood
        self._since, self._allowed = time.monotonic(), limits.start

    def run(self, request: Mapping[str, Any], seconds: float) -> Ended:
        """Start it and wait for its end, for at most `seconds`; `request` is what `fastjepa.trials` reads."""
        question, answers = self.folder / "request.json", self.folder / "results.jsonl"
        question.write_text(json.dumps(request), encoding="utf-8")
        answers.touch()
        command = [sys.executable, "-m", "fastjepa.trials", str(question), str(answers)]
        try:
            ended = run_child(
                command, self.folder / "log", seconds, variables=_variables(), cwd=self.folder, patience=1.0,
                overdue=lambda: self._overdue(answers),
            )  # fmt: skip
        except OSError as error:  # no interpreter to start
            return Ended(127, 0.0, f"{type(error).__name__}: {error}")
        self._follow(answers)
        return ended

    def _overdue(self, answers: Path) -> bool:
        self._follow(answers)
        self.too_slow = time.monotonic() - self._since > self._allowed
        return self.too_slow

    def _follow(self, answers: Path) -> None:
        """Take in the whole lines that were written since."""
        with answers.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            values: Any = json.loads(line)
            if "begin" in values:
                self.begun, self.started = Choice.from_json(values["begin"]), True
            else:
                self.begun = None
                trial = Trial.from_json(values)
                self.add(trial)
                self.say(f"[{time.monotonic() - self.begun_at:3.0f} s] {trial}")
            self._since, self._allowed = time.monotonic(), self.limits.candidate


def _variables() -> dict[str, str]:
    """The child runs in a folder of its own, so what finds fastjepa (and a user's packages) must not be relative."""
    paths = [str(_PACKAGE_PARENT), *(os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in paths if path)}
