"""Clip sets, the order of batches, and the loader that ties sources, cache and digit maps together."""

import gzip
import io
import struct
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastjepa.moving_mnist import clips as clips_module
from fastjepa.moving_mnist.clips import ClipSet, epoch_indices, load_clips, sequential_batches
from fastjepa.moving_mnist.labels import digit_maps
from fastjepa.moving_mnist.official import SequenceFile
from properties import given, settings, st

CPU_AND_GPU = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_clips(n: int = 7) -> ClipSet:
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (n, 3, 9, 11), dtype=torch.uint8, generator=generator)
    video.view(-1)[:256] = torch.arange(256)  # clip 0 has every byte there is
    maps = torch.randint(0, 2, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ClipSet(video, maps)


@pytest.mark.parametrize("device", CPU_AND_GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_batch_is_the_scaled_clips_in_the_order_asked_for(device: str, dtype: torch.dtype) -> None:
    clips = random_clips().to(device)
    indices = torch.tensor([5, 0, 5], device=device)
    video, digit_location = clips.batch(indices, dtype)
    assert video.shape == (3, 1, 3, 9, 11)
    assert digit_location.shape == (3, 3, 8, 8)
    assert video.dtype == digit_location.dtype == dtype
    assert video.device == digit_location.device == clips.device
    # A byte over 255, rounded once to the dtype; the double rounding of the reference cannot matter at 53 bits. On the
    # CPU: a GPU multiplies by the rounded reciprocal of a number.
    expected = (clips.video[[5, 0, 5]].cpu().double() / 255).to(device, dtype)
    torch.testing.assert_close(video[:, 0], expected, rtol=0, atol=0)
    torch.testing.assert_close(digit_location, clips.digit_maps[[5, 0, 5]].to(dtype), rtol=0, atol=0)
    assert video.min() == 0
    assert video.max() == 1


def test_batch_leaves_the_set_alone() -> None:
    clips, untouched = random_clips(), random_clips()
    video, digit_location = clips.batch(torch.arange(7))
    video.fill_(3)
    digit_location.fill_(3)
    assert torch.equal(clips.video, untouched.video)
    assert torch.equal(clips.digit_maps, untouched.digit_maps)


@pytest.mark.gpu
def test_batch_does_not_wait_for_the_gpu() -> None:
    clips = random_clips().to("cuda")
    indices = torch.arange(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        clips.batch(indices)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_clip_set_is_frozen_and_has_a_length_a_subset_and_a_device() -> None:
    clips = random_clips()
    assert len(clips) == 7
    assert clips.device == torch.device("cpu")
    subset = clips.subset(2)
    assert len(subset) == 2
    assert torch.equal(subset.video, clips.video[:2])
    assert torch.equal(subset.digit_maps, clips.digit_maps[:2])
    for n in (0, 8):
        with pytest.raises(ValueError, match=f"n: expected 1 to 7 clips, got {n}"):
            clips.subset(n)
    moved = clips.to("meta")
    assert moved.video.device.type == moved.digit_maps.device.type == "meta"
    with pytest.raises(FrozenInstanceError):
        clips.video = subset.video


def test_clip_set_refuses_what_does_not_belong_together() -> None:
    clips = random_clips()
    with pytest.raises(ValueError, match=r"video: expected 4-D uint8, got torch\.float32"):
        ClipSet(clips.video.float(), clips.digit_maps)
    with pytest.raises(ValueError, match="digit_maps: expected 4-D uint8"):
        ClipSet(clips.video, clips.digit_maps[:, :, 0])
    with pytest.raises(ValueError, match=r"digit_maps: expected the clips and frames of video, \(7, 3\), got \(7, 2\)"):
        ClipSet(clips.video, clips.digit_maps[:, :2])
    with pytest.raises(ValueError, match="digit_maps: on meta, video is on cpu"):
        ClipSet(clips.video, clips.digit_maps.to("meta"))


@settings(deadline=None)
@given(n=st.integers(1, 60), batch_size=st.integers(1, 70), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**31))
def test_an_epoch_visits_each_clip_once(n: int, batch_size: int, seed: int, epoch: int) -> None:
    batches = epoch_indices(n, batch_size, seed, epoch)
    assert sorted(torch.cat(batches).tolist()) == list(range(n))
    full, ragged = divmod(n, batch_size)
    assert [len(batch) for batch in batches] == [batch_size] * full + [ragged] * (ragged > 0)
    assert all(batch.dtype == torch.int64 for batch in batches)
    again = epoch_indices(n, batch_size, seed, epoch)
    assert torch.equal(torch.cat(batches), torch.cat(again))


def test_epochs_and_seeds_have_their_own_orders() -> None:
    orders = {
        (seed, epoch): tuple(torch.cat(epoch_indices(50, 8, seed, epoch)).tolist())
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(set(orders.values())) == 25


def test_epoch_order_ignores_and_keeps_the_global_random_state() -> None:
    torch.manual_seed(1)
    first = torch.cat(epoch_indices(50, 8, 0, 0))
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    assert torch.equal(torch.cat(epoch_indices(50, 8, 0, 0)), first)


@pytest.mark.gpu
def test_epoch_order_is_the_same_on_the_gpu() -> None:
    on_gpu = epoch_indices(50, 8, 3, 4, device="cuda")
    assert all(batch.is_cuda for batch in on_gpu)
    assert torch.equal(torch.cat(on_gpu).cpu(), torch.cat(epoch_indices(50, 8, 3, 4)))


def test_sequential_batches_are_in_order_and_keep_the_rest() -> None:
    assert [batch.tolist() for batch in sequential_batches(5, 2)] == [[0, 1], [2, 3], [4]]
    assert sequential_batches(5, 2, device="meta")[0].device.type == "meta"


def test_batching_refuses_bad_numbers() -> None:
    for n, batch_size, name in ((0, 4, "n"), (4, 0, "batch_size"), (4, -1, "batch_size")):
        with pytest.raises(ValueError, match=f"^{name}: expected at least 1"):
            epoch_indices(n, batch_size, 0, 0)
        with pytest.raises(ValueError, match=f"^{name}: expected at least 1"):
            sequential_batches(n, batch_size)
    with pytest.raises(ValueError, match="seed: expected 0 or more, got -1"):
        epoch_indices(4, 4, -1, 0)
    with pytest.raises(ValueError, match="epoch: expected 0 or more, got -1"):
        epoch_indices(4, 4, 0, -1)


SMALL = {"n_train": 6, "n_val": 4, "n_frames": 3, "canvas": 20, "digit_size": 9, "seed": 5}


def assert_same(first: ClipSet, second: ClipSet) -> None:
    assert torch.equal(first.video, second.video)
    assert torch.equal(first.digit_maps, second.digit_maps)


def test_embedded_clips_and_their_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, validation = load_clips(cache_dir=tmp_path, **SMALL)
    assert train.video.shape == (6, 3, 20, 20)
    assert validation.video.shape == (4, 3, 20, 20)
    for clips in (train, validation):
        np.testing.assert_array_equal(clips.digit_maps.numpy(), digit_maps(clips.video.numpy()))
        assert clips.digit_maps.any()
    assert capsys.readouterr().out == ""


def test_second_load_generates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_clips(cache_dir=tmp_path, **SMALL)
    assert len(list(tmp_path.iterdir())) == 5  # digits; clips and maps, train and validation
    for name in ("embedded_digits", "generate_clips", "digit_maps"):
        monkeypatch.delattr(clips_module, name)
    for one, other in zip(first, load_clips(cache_dir=tmp_path, **SMALL), strict=True):
        assert_same(one, other)


def test_clips_depend_on_the_arguments_and_not_on_what_is_cached(tmp_path: Path) -> None:
    base, _ = load_clips(cache_dir=tmp_path, **SMALL)
    longer, _ = load_clips(cache_dir=tmp_path, **SMALL | {"n_train": 8})
    assert_same(longer.subset(6), base)
    for change in ({"seed": 6}, {"digit_size": 10}, {"canvas": 21}, {"n_frames": 4}):
        shared, _ = load_clips(cache_dir=tmp_path, **SMALL | change)
        fresh, _ = load_clips(cache_dir=tmp_path / str(change), **SMALL | change)
        assert_same(shared, fresh)
        assert shared.video.shape != base.video.shape or not torch.equal(shared.video, base.video)


def test_training_and_validation_use_their_own_digits_and_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(digits: np.ndarray, n_clips: int, **options: object) -> np.ndarray:
        calls.append((digits, options["seed"]))
        return np.zeros((n_clips, 3, 20, 20), np.uint8)

    monkeypatch.setattr(clips_module, "generate_clips", record)
    load_clips(cache_dir=tmp_path, **SMALL)
    (train_digits, train_seed), (validation_digits, validation_seed) = calls
    assert train_seed != validation_seed
    assert {d.tobytes() for d in train_digits}.isdisjoint(d.tobytes() for d in validation_digits)


def write_idx(path: Path, n: int = 12) -> Path:
    images = np.random.default_rng(1).integers(0, 256, (n, 28, 28), np.uint8)
    path.write_bytes(gzip.compress(struct.pack(">4I", 0x803, n, 28, 28) + images.tobytes()))
    return path


@pytest.mark.parametrize("data", ["embedded", "idx"])
def test_digits_file_replaces_the_embedded_digits(tmp_path: Path, data: str) -> None:
    digits = write_idx(tmp_path / "images.gz")
    embedded, _ = load_clips(cache_dir=tmp_path, **SMALL)
    train, validation = load_clips(data, digits=digits, cache_dir=tmp_path, **SMALL)
    assert len(train) == 6
    assert len(validation) == 4
    assert not torch.equal(train.video, embedded.video)
    # The same path with other images is other data.
    write_idx(digits, n=13)
    changed, _ = load_clips(data, digits=digits, cache_dir=tmp_path, **SMALL)
    assert not torch.equal(changed.video, train.video)


def official_stand_in(folder: Path) -> SequenceFile:
    sequences = np.random.default_rng(2).integers(0, 256, (6, 10, 16, 16), np.uint8)
    file = io.BytesIO()
    np.save(file, sequences)
    (folder / "stand_in.npy").write_bytes(file.getvalue())
    return SequenceFile("http://127.0.0.1:9/stand_in.npy", None, n_frames=6, n_sequences=10, size=16, n_validation=3)


OFFICIAL = {"n_train": 14, "n_val": 6, "n_frames": 3, "canvas": 16, "seed": 0}


def test_official_clips_and_their_maps(tmp_path: Path) -> None:
    file = official_stand_in(tmp_path)
    train, validation = load_clips("official", cache_dir=tmp_path, official_file=file, **OFFICIAL)
    assert train.video.shape == (14, 3, 16, 16)
    assert validation.video.shape == (6, 3, 16, 16)
    np.testing.assert_array_equal(train.digit_maps.numpy(), digit_maps(train.video.numpy()))
    few, _ = load_clips(
        "official",
        data_path=tmp_path / "stand_in.npy",
        cache_dir=tmp_path / "other",
        official_file=file,
        **OFFICIAL | {"n_train": 2},
    )
    assert_same(few, train.subset(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_train": 15}, "n_train: data 'official' has 14 clips, got 15"),
        ({"n_val": 7}, "n_val: data 'official' has 6 clips, got 7"),
        ({"n_frames": 4}, "n_frames: data 'official' has 3, got 4"),
        ({"canvas": 64}, "canvas: data 'official' has 16, got 64"),
        ({"digits": Path("images.gz")}, "digits: images.gz has no use with data 'official'"),
    ],
)
def test_official_sizes_are_checked_before_any_download(tmp_path: Path, change: dict, message: str) -> None:
    file = replace(official_stand_in(tmp_path), url="http://127.0.0.1:9/missing.npy")
    with pytest.raises(ValueError, match=message):
        load_clips("official", cache_dir=tmp_path, official_file=file, **OFFICIAL | change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": "imagenet"}, ValueError, "data: expected one of embedded, idx, official, shards, got 'imagenet'"),
        ({"data": "idx"}, ValueError, "digits: data 'idx' needs the path"),
        ({"data_path": Path("x.npy")}, ValueError, "data_path: x.npy has no use with data 'embedded'"),
        ({"digits": Path("missing.gz")}, FileNotFoundError, "digits: there is no file missing.gz"),
        ({"n_train": 0}, ValueError, "n_train: expected at least 1 clip, got 0"),
        ({"n_val": -3}, ValueError, "n_val: expected at least 1 clip, got -3"),
        ({"canvas": 5}, ValueError, "canvas: 5 pixels are too few"),
        ({"n_frames": 0}, ValueError, "n_frames: expected at least 1, got 0"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_clips(cache_dir=tmp_path, **SMALL | change)
    assert not list(tmp_path.iterdir())


def test_unusable_cache_folder_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="--cache_dir"):
        load_clips(cache_dir=tmp_path / "file", **SMALL)
