"""The clips of a run, from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastjepa.config import Config
from fastjepa.moving_mnist import Clips, load_clips
from fastjepa.storage.cache_folder import default_cache_dir


def load_run_clips(config: Config, cache_dir: Path | None = None) -> tuple[Clips, Clips]:
    """Training and validation clips of the run, on the CPU: `moving_mnist.load_clips`, with what it raises; where that
    names an argument, the message names the flag.

    `cache_dir` goes before the configuration's, for a run that was trained elsewhere.
    """
    with _flags_named():
        return load_clips(
            config.data,
            digits=config.digits,
            data_path=config.data_path,
            cache_dir=cache_dir or config.cache_dir or default_cache_dir(),
            n_train=config.n_train,
            n_val=config.n_val,
            n_frames=config.n_frames,
            canvas=config.canvas,
            digit_size=config.digit_size,
            seed=config.seed,
        )


@contextmanager
def _flags_named() -> Iterator[None]:
    """An error "digits: there is no file …" is about the flag --digits."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        name = str(error).partition(":")[0]
        if name not in {field.name for field in dataclasses.fields(Config)}:
            raise
        raise type(error)(f"--{error}") from error
