"""The folder of a run: made, checked, and found again."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from fastjepa.config import Config
from fastjepa.storage.checkpoint import load_checkpoint
from fastjepa.storage.safe_files import CheckpointError

CHECKPOINT_NAME = "checkpoint.pt"


def prepare_folder(config: Config) -> Path:
    """The run's folder, made if need be. Raises ValueError if it holds another run, OSError if it cannot be written."""
    if config.resume is not None:
        return config.resume
    if config.out is not None:
        folder = config.out
        if (folder / CHECKPOINT_NAME).exists():
            raise ValueError(
                f"--out {folder} holds a run already: continue it with --resume {folder}, or choose another"
            )
    else:
        stem = f"{datetime.now():%Y-%m-%d-%H%M%S}-{config.preset}"
        candidates = (Path("runs") / (stem + (f"-{i}" if i else "")) for i in range(1000))
        folder = next(path for path in candidates if not path.exists())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--out {folder} cannot be written: {error.strerror}") from error
    return folder


def read_run_config(folder: Path) -> dict[str, Any]:
    """The saved configuration of the run in `folder`. Raises CheckpointError if there is nothing to resume."""
    if not folder.is_dir():
        raise CheckpointError(f"--resume takes the folder of a run; {folder} is not a folder")
    path = folder / CHECKPOINT_NAME
    if not path.exists():
        raise CheckpointError(f"there is nothing to resume: {path} does not exist")
    config = load_checkpoint(path).get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no configuration")
    return config
