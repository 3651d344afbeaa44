"""How processes find each other in a store that may hold what an earlier start of them left there.

torchrun's store lives on when it starts processes again, with the addresses of those that are gone; and how often that
was, each host counts for itself. So the first process invents a name for this start, and the others take it when it has
said that it knows of them:

    first     name = its own word;  waits for every "join <name> <rank>";  "go <name>" = the words of all
    others    read the name; "join <name> <rank>" = its own word; it is the right name if "go <name>" has that word
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta
from typing import Any

_LOOK = timedelta(seconds=0.5)


def meet(store: Any, rank: int, size: int, timeout: timedelta) -> str:
    """The name of this start, the same for all `size` processes and for no other start; a prefix for keys of its own.

    Args:
        store: a torch.distributed.Store that all of them have.
        rank, size: this process's number, and how many there are.
        timeout: how long it waits for the others.

    Raises:
        RuntimeError: they do not come in time.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set("start", own)
        words = [own]
        for other in range(1, size):
            key = f"join {own} {other}"
            store.wait([key], timedelta(seconds=max(1.0, end - time.monotonic())))
            words.append(store.get(key).decode())
        store.set(f"go {own}", " ".join(words))
        return own
    while time.monotonic() < end:
        try:
            store.wait(["start"], _LOOK)
            name = store.get("start").decode()
            store.set(f"join {name} {rank}", own)
            store.wait([f"go {name}"], _LOOK)
        except RuntimeError:  # not yet
            continue
        if own in store.get(f"go {name}").decode().split():
            return str(name)
        time.sleep(0.05)  # that of an earlier start
    raise RuntimeError(f"process {rank} waited {timeout.total_seconds():g} s for the first one")
