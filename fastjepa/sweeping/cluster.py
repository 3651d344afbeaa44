"""The runs of a sweep as jobs of Slurm, one array, through submitit.

A job is one run. When Slurm takes its node away or its time is over, submitit's signal comes first: the run saves and
ends, and the job is queued again, to go on from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastjepa.optional_packages import needed_for
from fastjepa.sweeping.one_run import Attempt
from fastjepa.sweeping.plan import Run
from fastjepa.sweeping.state import read_state

JOBS_FOLDER = "slurm"  # in the sweep's: submitit's scripts, pickles and logs

# submitit's own names of what every kind of cluster has, and the type that it takes.
_SHARED = {"name": str, "mem_gb": float, "cpus_per_task": int, "gpus_per_node": int, "timeout_min": int}
_ONE = "one run is one process on one node"
_REFUSED = {
    "nodes": _ONE,
    "tasks_per_node": _ONE,
    "ntasks_per_node": _ONE,
    "timeout_min": "it is called time here, time=MINUTES",
}
# How often a job whose time is over is queued again. A run makes progress each time, so this only ends what does not.
_TIMEOUTS = 20
# submitit's signal comes 90 s before the time is over (signal_delay_s).
_PATIENCE_S = 60.0


class Job:
    """What runs on a node: one run of the sweep, to its end. It is pickled before it is called."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._attempt: Attempt | None = None

    def __call__(self) -> str:
        """Train; returns what came of it, in one line.

        Raises:
            RuntimeError: the run broke; so is the job in Slurm's eyes.
        """
        if read_state(self._run).status == "finished":
            return "finished before"
        self._attempt = Attempt(self._run.folder, self._run.flags, patience=_PATIENCE_S)
        if reason := self._attempt.wait().reason:
            raise RuntimeError(f"{self._run.folder}: {reason}")
        return "finished"

    def checkpoint(self) -> Any:
        """Called by submitit in a signal handler, amid `__call__`: let the run save and end, and come back for it."""
        import submitit

        if self._attempt is not None:
            self._attempt.stop()
        return submitit.helpers.DelayedSubmission(Job(self._run))


def parse_slurm(words: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE words after --slurm.

    Raises:
        ValueError: another word, a name twice, one that a sweep cannot serve, or no time.
    """
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(f"--slurm takes NAME=VALUE, like partition=gpu time=60 gpus_per_node=1; got {word!r}")
        name = name.removeprefix("slurm_").replace("-", "_")
        if name in given:
            raise ValueError(f"--slurm has {name} twice")
        if name in _REFUSED:
            raise ValueError(f"--slurm {name} cannot be given: {_REFUSED[name]}")
        given[name] = value
    if "time" not in given:
        raise ValueError("--slurm needs time=MINUTES of one run; a run that takes longer is queued again and goes on")
    for name in ("time", *_SHARED, "max_num_timeout"):
        if name in given and _SHARED.get(name, int) is not str:
            _number(name, given[name], _SHARED.get(name, int))
    return given


def _number(name: str, value: str, kind: type) -> Any:
    try:
        number = kind(value)
        if number >= 0:
            return number
    except ValueError:
        pass
    what = "a whole number" if kind is int else "a number"
    raise ValueError(f"--slurm {name} must be {what} of at least 0, got {value!r}") from None


def parameters_of(given: Mapping[str, str]) -> dict[str, Any]:
    """What `AutoExecutor.update_parameters` takes: time is timeout_min, submitit's shared names stay, and all others
    are Slurm's: slurm_<name>, whole numbers as such.
    """
    found: dict[str, Any] = {"name": "fastjepa-sweep"}
    for name, value in given.items():
        if name in ("cluster", "max_num_timeout"):
            continue
        if name == "time":
            found["timeout_min"] = _number(name, value, int)
        elif name in _SHARED:
            kind = _SHARED[name]
            found[name] = value if kind is str else _number(name, value, kind)
        else:
            found[f"slurm_{name}"] = int(value) if value.isascii() and value.isdigit() else value
    return found


def submit(runs: Sequence[Run], given: Mapping[str, str], out: Path) -> list[Any]:
    """Hand `runs` to the cluster; submitit's jobs, in their order.

    Raises:
        MissingPackageError: submitit is not installed.
        ValueError: it refuses a parameter, finds no such cluster, or the cluster refuses the jobs.
    """
    with needed_for("a sweep on Slurm"):
        import submitit
    cluster = given.get("cluster", "slurm")
    timeouts = int(given.get("max_num_timeout", _TIMEOUTS))
    try:
        executor = submitit.AutoExecutor(out / JOBS_FOLDER / "%j", cluster=cluster, slurm_max_num_timeout=timeouts)
        executor.update_parameters(**parameters_of(given))
        with executor.batch():
            jobs = [executor.submit(Job(run)) for run in runs]
        return jobs
    # submitit's, for what users write and for what sbatch says to it
    except (NameError, AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"--slurm {' '.join(f'{n}={v}' for n, v in given.items())}: {error}") from error
