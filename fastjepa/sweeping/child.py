"""One process that trains, from which another thread looks away: it can be asked to save and end at any moment.

The child is `python -m fastjepa train`, in a session of its own: Ctrl-C in the terminal reaches the sweep alone, which
passes it on once, as the first SIGINT after which the trainer finishes its step and saves.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from fastjepa.sweeping.child_process import Ended, run_child

_LOOK_SECONDS = 0.1


class Child:
    """`command` as a process; what it prints goes to the file `log`.

    `patience` is how many seconds it has to save when it is stopped. It is killed when this process ends (on Linux).
    """

    def __init__(self, command: Sequence[str], log: Path, *, patience: float) -> None:
        self._command, self._log, self._patience = command, log, patience
        # Plain attributes, which are looked at: signal handlers raise out of `wait`, and `stop` is called in them. Amid
        # Thread.join the first makes the thread pass for ended (Python 3.11), amid Event.wait the second may deadlock.
        self._stopping = False
        self._ended: Ended | BaseException | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._ended = run_child(
                self._command, self._log, math.inf, patience=self._patience, overdue=lambda: self._stopping
            )
        except BaseException as error:  # for the thread that waits
            self._ended = error

    def wait(self) -> Ended:
        """How it ended. Signal handlers run while this waits, and what they raise comes out of it.

        Raises:
            OSError: it could not be started.
        """
        while self._ended is None:
            time.sleep(_LOOK_SECONDS)
        if isinstance(self._ended, BaseException):
            raise self._ended
        return self._ended

    def stop(self) -> Ended:
        """Ask it to save and end, and wait for that; the status is None, or its own if it had ended by itself."""
        self._stopping = True
        return self.wait()
