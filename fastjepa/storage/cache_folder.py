"""Where what is made once is kept for a user."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/fastjepa`, or `~/.cache/fastjepa` where that variable is unset or not an absolute path."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification asks to ignore relative paths.
    return (base if base.is_absolute() else Path.home() / ".cache") / "fastjepa"
