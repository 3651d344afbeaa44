"""The clips of a run, from its configuration."""

from __future__ import annotations

from pathlib import Path

from fastjepa.config import Config
from fastjepa.moving_mnist import ClipSet, load_clips
from fastjepa.storage.cache_folder import default_cache_dir


def load_run_clips(config: Config, cache_dir: Path | None = None) -> tuple[ClipSet, ClipSet]:
    """Training and validation clips of the run, on the CPU: `moving_mnist.load_clips`, with what it raises.

    `cache_dir` goes before the configuration's, for a run that was trained elsewhere.
    """
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
