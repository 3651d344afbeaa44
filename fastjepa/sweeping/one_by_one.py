"""All runs of a sweep, one after another on this machine, with a line for each."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from fastjepa.sweeping.one_run import Attempt
from fastjepa.sweeping.plan import Run, count_of
from fastjepa.sweeping.state import LOG_NAME, State, note_failure, read_state

# A stopped run finishes its step, or its evaluation, and writes its checkpoint.
_PATIENCE_S = 600.0


class Stopped(Exception):  # noqa: N818 - not an error: the run has been saved
    """SIGINT or SIGTERM was received, and the run that was being trained has ended."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


def train_all(runs: Sequence[Run], states: list[State], done: Callable[[], object]) -> None:
    """Train what is not finished, in order; a run that breaks is said and left. `states` is kept up to date.

    `done` is called after each run.

    Raises:
        Stopped: a signal; the run that was being trained has saved.
        OSError, CheckpointError, ValueError: a folder that cannot be written or, after its run, read.
    """
    todo = [i for i, state in enumerate(states) if state.status != "finished"]
    finished = len(runs) - len(todo)
    begun = sum(states[i].status == "begun" for i in todo)
    print(
        f"{count_of(len(runs))}: {finished} finished, {len(todo)} to train"
        f"{f', {begun} of them from where they were' if begun else ''}",
        flush=True,
    )
    started = time.monotonic()
    with _signals_stop():
        for position, i in enumerate(todo):
            run = runs[i]
            went_on = ", going on" if states[i].epochs or states[i].status == "begun" else ""
            print(f"[{finished + position + 1}/{len(runs)}] {run.cell}, seed {run.seed}{went_on}", flush=True)
            began = time.monotonic()
            _train(run)
            states[i] = _state_after(run)
            done()
            spent = time.monotonic() - started
            left = spent / (position + 1) * (len(todo) - position - 1)
            print(
                f"    {_result(run, states[i])}; {duration(time.monotonic() - began)}, "
                f"{duration(spent)} in all{f', about {duration(left)} to go' if left else ''}",
                flush=True,
            )


def _train(run: Run) -> None:
    attempt = Attempt(run.folder, run.flags, patience=_PATIENCE_S)
    try:
        attempt.wait()
    except Stopped as stopped:
        print(f"received {stopped}: the run finishes its step and saves (again to stop at once)", flush=True)
        attempt.stop()
        raise


def _state_after(run: Run) -> State:
    """Its state when its process has ended: finished or broken, and nothing between."""
    state = read_state(run)
    if state.status in ("finished", "broken"):
        return state
    note_failure(run.folder, "its process ended well, and it is not finished")
    return read_state(run)


def _result(run: Run, state: State) -> str:
    if state.status == "finished":
        return f"mAP {state.row['map']:.3f}, AP_0 {state.row['ap_0']:.3f}"
    return f"broken: {state.reason} (see {run.folder / LOG_NAME})"


@contextlib.contextmanager
def _signals_stop() -> Iterator[None]:
    """The first SIGINT or SIGTERM raises Stopped in here; a second one ends at once, as KeyboardInterrupt."""
    received = False

    def receive(number: int, _: FrameType | None) -> None:
        nonlocal received
        if received:
            raise KeyboardInterrupt
        received = True
        raise Stopped(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def duration(seconds: float) -> str:
    """ "42 s", "12 min 5 s", "3 h 7 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
