"""Several processes at one command line: they are asked the same, and only the first one answers."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout

from fastjepa.config import Config
from fastjepa.distributed.ranks import Ranks


def parse_alike(ranks: Ranks, parse: Callable[[], Config]) -> Config:
    """What `parse` gives, which must be the same on all; where it ends one process, all end, and one reason is told.

    Raises:
        SystemExit: `parse` has ended some process, with its status.
        RankError: options differ; the message names them. SystemExit on all but the first.
    """
    config, status, told = None, None, io.StringIO()
    try:
        # The first tells its own reason, or --help, as if it were alone.
        with nullcontext() if ranks.is_first else redirect_stderr(told):
            config = parse()
    except SystemExit as ended:
        status = ended.code
    endings = ranks.gather((status, told.getvalue()))
    for rank, (ending, reason) in enumerate(endings):
        if ending is not None:
            if ranks.is_first and rank > 0:
                print(f"on process {rank} of {ranks.size}: {reason.strip()}", file=sys.stderr)
            ranks.wait_for_all()
            raise SystemExit(ending)
    assert config is not None
    ranks.require_same({f"--{name}": value for name, value in config.to_json().items()})
    return config


@contextmanager
def heard_if(first: bool) -> Iterator[None]:
    """Inside, only the first process prints to stdout."""
    with open(os.devnull, "w") as nowhere, nullcontext() if first else redirect_stdout(nowhere):
        yield
