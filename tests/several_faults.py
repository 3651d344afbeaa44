"""train.py with planted faults: python several_faults.py FAULTS FLAGS...

FAULTS is a list of WHAT:RANK:STEP, "kill:1:5,term:0:4" say: before that step, unless it was started again, this process
is killed, sent SIGTERM (alone or with its whole group), hangs, or raises; "evaluate" hangs in the evaluation after it.
Each checkpoint that is written is told on stdout.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from fastjepa.distributed.launch import read_launch
from fastjepa.training.command_line import main
from fastjepa.training.trainer import Trainer

FAULTS = [
    (what, int(step))
    for what, rank, step in (fault.split(":") for fault in sys.argv[1].split(",") if fault)
    if int(rank) == read_launch().rank and not read_launch().restarts
]
_step, _evaluate, _write = Trainer._step, Trainer._evaluate, Trainer._write_checkpoint


def step(self: Trainer, *arguments: Any) -> None:
    for what, at in FAULTS:
        if at == self.global_step:
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif what == "term":
                os.kill(os.getpid(), signal.SIGTERM)
            elif what == "group":
                os.killpg(0, signal.SIGTERM)
            elif what == "hang":
                time.sleep(3600)
            elif what == "raise":
                raise OSError("the disk of this process is on fire")
    _step(self, *arguments)


def evaluate(self: Trainer, *arguments: Any) -> Any:
    if ("evaluate", self.global_step) in FAULTS:
        time.sleep(3600)
    return _evaluate(self, *arguments)


def write_checkpoint(self: Trainer) -> None:
    print(f"checkpoint of step {self.global_step}", flush=True)
    _write(self)


Trainer._step, Trainer._evaluate = step, evaluate  # type: ignore[method-assign]
Trainer._write_checkpoint = write_checkpoint  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
