"""A run's clips come from its configuration, and from the folder that was asked for."""

from __future__ import annotations

from pathlib import Path

import torch

from fastjepa.config import Config
from fastjepa.moving_mnist import load_clips
from fastjepa.training.run_clips import load_run_clips

SIZES = {"n_train": 4, "n_val": 2, "n_frames": 5, "canvas": 16, "digit_size": 8, "seed": 7}


def test_the_clips_are_those_of_the_configuration(tmp_path: Path) -> None:
    found = load_run_clips(Config(**SIZES, cache_dir=tmp_path / "configured"))
    wanted = load_clips(**SIZES, cache_dir=tmp_path / "direct")
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.video, b.video)
        assert torch.equal(a.digit_maps, b.digit_maps)


def test_the_folder_that_is_asked_for_goes_before_the_configured_one(tmp_path: Path) -> None:
    config = Config(**SIZES, cache_dir=tmp_path / "configured")
    load_run_clips(config, tmp_path / "asked")
    assert any((tmp_path / "asked").iterdir())
    assert not (tmp_path / "configured").exists()
    load_run_clips(config)
    assert any((tmp_path / "configured").iterdir())
