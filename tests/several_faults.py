"""train.py with planted faults: python several_faults.py FAULTS FLAGS...

FAULTS is a list of WHAT:RANK:STEP, "kill:1:5,term:0:4" say: before that step, unless it was started again, this process
is killed, sent SIGTERM, hangs, or raises. Each checkpoint that is written is told on stdout.
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
    if int(rank) == read_launch().rank and not read_launch().restarted
]
_step, _write = Trainer._step, Trainer._write_checkpoint


def step(self: Trainer, *arguments: Any) -> None:
    for what, at in FAULTS:
        if at == self.global_step:
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif what == "term":
                os.kill(os.getpid(), signal.SIGTERM)
            elif what == "hang":
                time.sleep(3600)
            else:
                raise OSError("the disk of this process is on fire")
    _step(self, *arguments)


def write_checkpoint(self: Trainer) -> None:
    print(f"checkpoint of step {self.global_step}", flush=True)
    _write(self)


Trainer._step, Trainer._write_checkpoint = step, write_checkpoint  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
