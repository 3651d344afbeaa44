"""Whether an exception says that memory ran out: libraries spell it in many ways."""

from __future__ import annotations

import torch

_WORDS = (
    "out of memory",
    "can't allocate memory",
    "alloc_failed",
    "alloc failed",
    # cuDNN found no memory for the workspace of any algorithm, and torch says only that none worked.
    "unable to find an engine",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU, however the library at fault spells it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
