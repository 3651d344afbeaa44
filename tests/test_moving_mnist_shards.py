"""Clips in shards on disk: the numbers of a resident set, damage that is found, and memory that a set does not take."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastjepa.config import Config
from fastjepa.environment import ROOT
from fastjepa.files.safe_files import CheckpointError
from fastjepa.graphs import GraphedTrainStep
from fastjepa.moving_mnist import ClipSet, epoch_indices, load_clips, prefetched, shards, write_shards
from fastjepa.moving_mnist.cache import fingerprint
from fastjepa.moving_mnist.shard_index import INDEX, Shard, ShardFile, ShardIndex
from fastjepa.moving_mnist.shards import ShardedClips
from fastjepa.training.evaluation import evaluate
from fastjepa.training.picture_arrays import rollout_arrays
from fastjepa.training.run_clips import load_run_clips
from graph_cases import some_step
from properties import given, settings, st

N, T, H, W = 23, 3, 9, 11


def random_clips(n: int = N, shape: tuple[int, int, int] = (T, H, W), seed: int = 0) -> ClipSet:
    generator = torch.Generator().manual_seed(seed)
    video = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=generator)
    return ClipSet(video, torch.randint(0, 2, (n, shape[0], 8, 8), dtype=torch.uint8, generator=generator))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """23 clips in shards of 5, so that the last one has 3."""
    write_shards(random_clips(), tmp_path / "set", 5)
    return tmp_path / "set"


def same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# ---- the numbers of a resident set ----


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_batch_is_that_of_the_resident_set_bit_for_bit(folder: Path, device: str, dtype: torch.dtype) -> None:
    resident, sharded = random_clips().to(device), ShardedClips(folder).to(device)
    for order in ([4, 5], [22, 0, 9, 10, 0, 14, 15], list(range(N)), list(reversed(range(N))), [17]):
        indices = torch.tensor(order, device=device)
        assert same(sharded.batch(indices, dtype), resident.batch(indices, dtype)), order
        assert same(sharded.batch(indices.cpu(), dtype), resident.batch(indices, dtype)), order
    assert sharded.batch(torch.tensor([1]), dtype)[0].device == resident.device


@given(st.integers(1, 12), st.integers(1, 14), st.lists(st.integers(0, 11), max_size=9))
@settings(max_examples=25, deadline=None)
def test_any_number_of_clips_in_shards_of_any_size(n: int, per_shard: int, order: list[int]) -> None:
    clips = random_clips(n, (2, 3, 4))
    with tempfile.TemporaryDirectory() as made:
        sharded = write_shards(clips, Path(made) / "set", per_shard)
        assert len(sharded.index.shards) == -(-n // per_shard)
        indices = torch.tensor([i % n for i in order], dtype=torch.int64)
        assert same(sharded.batch(indices), clips.batch(indices))


def test_pieces_of_any_length_make_the_same_files(folder: Path, tmp_path: Path) -> None:
    clips = random_clips()
    sizes, pieces, at = (1, 7, 0, 2, 13), [], 0
    for size in sizes:
        part = slice(at, at + size)
        pieces.append((clips.video[part].numpy(), clips.digit_maps[part]))  # arrays and tensors
        at += size
    write_shards(iter(pieces), tmp_path / "pieces", 5)
    for path in folder.iterdir():
        assert (tmp_path / "pieces" / path.name).read_bytes() == path.read_bytes()


def test_what_is_in_memory_while_writing_is_a_shard_and_not_the_set(tmp_path: Path) -> None:
    """Pieces are asked for one by one, and a shard is on disk before the next is begun."""
    seen = []

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for seed in range(6):
            seen.append(len(list((tmp_path / "set").glob("video-*.npy"))))
            clips = random_clips(4, seed=seed)
            yield clips.video, clips.digit_maps

    write_shards(pieces(), tmp_path / "set", 8)
    assert seen == [0, 0, 1, 1, 2, 2]


def test_length_device_frames_and_subset(folder: Path) -> None:
    sharded, resident = ShardedClips(folder), random_clips()
    assert (len(sharded), sharded.n_frames, sharded.device) == (N, T, torch.device("cpu"))
    assert (resident.n_frames, len(resident)) == (T, N)
    fewer = sharded.subset(7)
    assert (len(fewer), len(sharded)) == (7, N)
    assert same(fewer.batch(torch.tensor([6, 0])), resident.batch(torch.tensor([6, 0])))
    with pytest.raises(IndexError, match="expected 0 to 6, got 0 to 7"):
        fewer.batch(torch.tensor([7, 0]))
    with pytest.raises(IndexError, match="expected 0 to 22, got -1 to 2"):
        sharded.batch(torch.tensor([2, -1]))
    with pytest.raises(ValueError, match=r"expected int64 \(B,\), got int64 \(1, 1\)"):
        sharded.batch(torch.tensor([[1]]))
    for n in (0, 24):
        with pytest.raises(ValueError, match=f"n: expected 1 to 23 clips, got {n}"):
            sharded.subset(n)
    assert sharded.to("meta").device == torch.device("meta")
    assert sharded.device == torch.device("cpu")


def test_the_resident_set_of_shards_is_the_set_that_was_written(folder: Path) -> None:
    found, wanted = ShardedClips(folder).resident(), random_clips()
    assert torch.equal(found.video, wanted.video)
    assert torch.equal(found.digit_maps, wanted.digit_maps)
    assert torch.equal(ShardedClips(folder).subset(6).resident().video, wanted.video[:6])
    for name in ("video", "digit_maps"):
        with pytest.raises(AttributeError, match=rf"{name}: the clips of .*set are on disk; .*resident\(\)"):
            getattr(ShardedClips(folder), name)


def test_shards_are_mapped_when_asked_for_and_a_few_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MOST_OPEN", 2)
    sharded, resident = ShardedClips(folder), random_clips()
    assert list(sharded._open) == []
    for order in ([0], [6, 1], [22, 3, 7], [0, 11]):
        assert same(sharded.batch(torch.tensor(order)), resident.batch(torch.tensor(order)))
        assert len(sharded._open) <= 2
    assert list(sharded._open) == [0, 2]


def test_a_batch_has_memory_of_its_own(folder: Path) -> None:
    sharded = ShardedClips(folder)
    before = (folder / "video-00000.npy").read_bytes()
    sharded[0][0].fill_(3)
    for part in sharded.batch(torch.tensor([0])):
        part.fill_(3)
    assert (folder / "video-00000.npy").read_bytes() == before
    assert same(sharded.batch(torch.tensor([0])), random_clips().batch(torch.tensor([0])))


# ---- who knows whether a set is the same ----


def test_the_fingerprint_of_a_resident_set_is_what_it_was(folder: Path) -> None:
    """That of its video: checkpoints keep it."""
    clips = random_clips()
    assert clips.fingerprint() == fingerprint(clips.video.numpy())
    assert clips.fingerprint() == ShardedClips(folder).resident().fingerprint()


def test_the_fingerprint_of_shards_is_of_what_is_in_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = ShardedClips(folder)
    again = write_shards(random_clips(), tmp_path / "again", 5)
    clips = random_clips()
    clips.digit_maps[22, 0, 0, 0] ^= 1
    other_maps = write_shards(clips, tmp_path / "maps", 5)
    other_video = write_shards(random_clips(seed=1), tmp_path / "video", 5)
    monkeypatch.setattr(ShardedClips, "_gather", None)  # from the index alone
    fingerprints = [s.fingerprint() for s in (original, other_maps, other_video, original.subset(22))]
    assert len({*fingerprints, original.subset(20).fingerprint()}) == 5
    assert again.fingerprint() == original.fingerprint() == original.subset(N).fingerprint()
    assert original.subset(10).fingerprint() == other_maps.subset(10).fingerprint()  # which differs in its last clip


# ---- read ahead ----


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetched_batches_are_those_of_the_resident_set_in_their_order(folder: Path, workers: int) -> None:
    batches = epoch_indices(N, 4, seed=3, epoch=1)
    numbers = torch.get_rng_state()
    resident, sharded = random_clips(), ShardedClips(folder)
    found = list(prefetched(sharded, batches, workers))
    assert torch.equal(torch.get_rng_state(), numbers)  # a run draws the same numbers whatever reads its clips
    wanted = [resident.batch(indices) for indices in batches]
    assert len(found) == 6
    assert all(same(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(same(a, b) for a, b in zip(prefetched(resident, batches, workers), wanted, strict=True))
    (half,) = prefetched(sharded, batches[:1], workers, torch.bfloat16)
    assert same(half, resident.batch(batches[0], torch.bfloat16))


@pytest.mark.gpu
def test_prefetched_batches_are_on_the_gpu(folder: Path) -> None:
    batches = epoch_indices(N, 4, seed=3, epoch=1, device="cuda")
    resident = random_clips().to("cuda")
    found = prefetched(ShardedClips(folder).to("cuda"), batches, 2)
    assert all(same(a, resident.batch(b)) for a, b in zip(found, batches, strict=True))


def test_prefetched_refuses(folder: Path) -> None:
    with pytest.raises(ValueError, match="workers: expected 0 or more, got -1"):
        next(prefetched(ShardedClips(folder), [torch.tensor([0])], -1))
    for workers in (0, 1):
        with pytest.raises(IndexError, match="expected 0 to 22, got 23 to 23"):
            next(prefetched(ShardedClips(folder), [torch.tensor([23])], workers))


def test_a_loader_of_torch_takes_the_set_as_it_is(folder: Path) -> None:
    resident = random_clips()
    found = list(DataLoader(ShardedClips(folder), batch_size=10))
    assert [len(video) for video, _ in found] == [10, 10, 3]
    assert torch.equal(torch.cat([video for video, _ in found]), resident.video)
    assert torch.equal(torch.cat([maps for _, maps in found]), resident.digit_maps)


def test_a_copy_for_another_process_has_no_clips_in_it(folder: Path) -> None:
    """A worker that is spawned, and not forked, gets the set pickled."""
    sharded = ShardedClips(folder)
    before = len(pickle.dumps(sharded))
    sharded.batch(torch.arange(N))
    assert len(sharded._open) == 5
    assert len(pickle.dumps(sharded)) == before
    copied = pickle.loads(pickle.dumps(sharded.subset(9)))
    assert len(copied) == 9
    assert same(copied.batch(torch.arange(9)), random_clips().batch(torch.arange(9)))


# ---- damage ----


def edit(folder: Path, change: Callable[[Any], object]) -> None:
    values = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    change(values)
    (folder / INDEX).write_text(json.dumps(values), encoding="utf-8")


FIRST = "video-00000.npy"


def write_as(array: Callable[[], Any], **options: Any) -> Callable[[Path], None]:
    """Another array in the first file, whose size the index is told."""

    def damage(folder: Path) -> None:
        np.save(folder / FIRST, array(), **options)
        size = (folder / FIRST).stat().st_size
        edit(folder, lambda v: v["shards"][0]["video"].update(bytes=size))

    return damage


def text(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / INDEX).write_text(content, encoding="utf-8")


def index(change: Callable[[Any], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder, change)


def first_file(name: str) -> Callable[[Path], None]:
    return index(lambda v: v["shards"][0]["video"].update(file=name))


def truncate(folder: Path) -> None:
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(content[:-1])


def truncate_and_say_so(folder: Path) -> None:
    truncate(folder)
    edit(folder, lambda v: v["shards"][0]["video"].update(bytes=v["shards"][0]["video"]["bytes"] - 1))


def longer(folder: Path) -> None:
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes() + b"x")


SHAPE = r"\(5, 3, 9, 11\)"
DAMAGE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "truncated": (truncate, ValueError, f"{FIRST} has 1612 bytes, index.json says 1613: it is truncated"),
    "truncated, and the index says so": (truncate_and_say_so, ValueError, f"{FIRST} is damaged: not a complete .npy"),
    "longer": (longer, ValueError, f"{FIRST} has 1614 bytes, index.json says 1613"),
    "another dtype": (
        write_as(lambda: np.zeros((5, T, H, W), np.int8)), ValueError,
        f"{FIRST} holds int8 {SHAPE}, accepted: uint8 {SHAPE}, as index.json says",
    ),
    "another count": (
        write_as(lambda: np.zeros((4, T, H, W), np.uint8)), ValueError, rf"{FIRST} holds uint8 \(4, 3, 9, 11\), acc",
    ),
    "another order": (
        write_as(lambda: np.zeros((5, T, H, W), np.uint8, order="F")), ValueError, "in Fortran order, accepted: uint8",
    ),
    "pickled": (
        write_as(lambda: np.array([print], object), allow_pickle=True), ValueError, f"{FIRST} is damaged: not a compl",
    ),
    "no .npy at all": (
        lambda folder: (folder / FIRST).write_bytes(b"x" * 1613), ValueError, f"{FIRST} is damaged: not a compl",
    ),
    "missing": (
        lambda folder: (folder / "digit_maps-00002.npy").unlink(), FileNotFoundError,
        "there is no file .*digit_maps-00002.npy, which index.json beside it names",
    ),
    "no index": (lambda folder: (folder / INDEX).unlink(), FileNotFoundError, "no file .*index.json; expected a fol"),
    "an empty index": (text(""), ValueError, "index.json is not an index of clips: Expecting value"),
    "a deep index": (text("[" * 100_000), ValueError, "index.json is not an index of clips: .*recursion"),
    "an index of something else": (text("[1]"), ValueError, "format is part of a list, expected str"),
    "another version": (index(lambda v: v.update(version=2)), ValueError, "version is 2, accepted: 1"),
    "a version that is none": (index(lambda v: v.update(version=True)), ValueError, "version is True, expected int"),
    "a dtype of clips": (index(lambda v: v.update(dtype="float32")), ValueError, "dtype is 'float32', accepted: 'u"),
    "a shape of clips": (index(lambda v: v.update(clip_shape=[3, 0, 11])), ValueError, r"clip_shape is not \[T, H, W"),
    "no shards": (index(lambda v: v.update(shards=[])), ValueError, "shards is empty"),
    "a count of the index": (index(lambda v: v.update(n_clips=24)), ValueError, "n_clips is 24, its shards have 23"),
    "a count of a shard": (
        index(lambda v: (v["shards"][0].update(n_clips=4), v.update(n_clips=22))), ValueError,
        rf"{FIRST} holds uint8 {SHAPE}, accepted: uint8 \(4, 3, 9, 11\)",
    ),
    "a negative count": (index(lambda v: v["shards"][0].update(n_clips=-5)), ValueError, "n_clips is -5, expected at"),
    "bytes that are no number": (
        index(lambda v: v["shards"][0]["video"].update(bytes="many")), ValueError, "bytes is 'many', expected int",
    ),
    "no checksum": (
        index(lambda v: v["shards"][0]["video"].update(blake2b="0")), ValueError, "blake2b of video-00000.npy is '0'",
    ),
    "a file twice": (first_file("video-00001.npy"), ValueError, "names a file twice"),
    "a way up": (first_file("../elsewhere.npy"), ValueError, "file is '../elsewhere.npy', accepted: the plain name"),
    "a way from the root": (first_file("/elsewhere.npy"), ValueError, "file is '/elsewhere.npy', accepted: the plain"),
    "a way on Windows": (first_file("..\\elsewhere.npy"), ValueError, "accepted: the plain name of a .npy file"),
    "two points": (first_file("..npy"), ValueError, "file is '..npy', accepted: the plain name"),
    "a line break": (first_file("a.npy\n"), ValueError, "accepted: the plain name"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_when_a_set_is_opened(kind: str, folder: Path) -> None:
    damage, error, message = DAMAGE[kind]
    # What a name that escapes would find, if it were opened.
    np.save(folder.parent / "elsewhere.npy", random_clips().video[:5].numpy())
    damage(folder)
    with pytest.raises(error, match=message):
        ShardedClips(folder)


def test_what_only_a_checksum_shows_is_found_by_verify(folder: Path) -> None:
    sharded = ShardedClips(folder)
    sharded.verify()
    content = bytearray((folder / "digit_maps-00004.npy").read_bytes())
    content[-1] ^= 1
    (folder / "digit_maps-00004.npy").write_bytes(content)
    sharded = ShardedClips(folder)
    message = "digit_maps-00004.npy is damaged: its blake2b is [0-9a-f]{32}, index.json says [0-9a-f]{32}$"
    with pytest.raises(ValueError, match=message):
        sharded.verify()
    sharded.subset(20).verify()  # of four shards


# ---- writing ----


def test_writing_refuses(folder: Path, tmp_path: Path) -> None:
    clips = random_clips()
    with pytest.raises(FileExistsError, match=r"set.index\.json exists: the folder holds a set of clips"):
        write_shards(clips, folder)
    with pytest.raises(ValueError, match="clips_per_shard: expected at least 1, got 0"):
        write_shards(clips, tmp_path / "new", 0)
    with pytest.raises(ValueError, match="clips: there are none to write"):
        write_shards([], tmp_path / "new")
    for piece, message in (
        ((clips.video.float(), clips.digit_maps), r"video of piece 1 are float32 \(23, 3, 9, 11\), expected uint8"),
        ((clips.video[:, :2], clips.digit_maps[:, :2]), r"video of piece 1 are uint8 \(23, 2, 9, 11\), expected"),
        ((clips.video, clips.digit_maps[:3]), r"digit maps of piece 1 are uint8 \(3, 3, 8, 8\), expected uint8 \(23"),
        ((clips.video, clips.digit_maps[..., :4]), r"digit maps of piece 1 are uint8 \(23, 3, 8, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            write_shards([(clips.video, clips.digit_maps), piece], tmp_path / "new", 5)
    assert not (tmp_path / "new" / INDEX).exists()
    with pytest.raises(FileNotFoundError):  # what is there is not taken for a set
        ShardedClips(tmp_path / "new")
    write_shards(clips, tmp_path / "new", 5)  # over what was left
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()
    }


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "set" / FIRST).mkdir(parents=True)  # a folder in the place of a file
    with pytest.raises(CheckpointError, match=f"could not write .*{FIRST}"):
        write_shards(random_clips(), tmp_path / "set")


# ---- in a run ----


def run_folder(tmp_path: Path) -> Path:
    write_shards(random_clips(6, (5, 16, 16)), tmp_path / "data" / "train", 4)
    write_shards(random_clips(3, (5, 16, 16), seed=1), tmp_path / "data" / "validation", 4)
    return tmp_path / "data"


SIZES = {"n_train": 5, "n_val": 3, "n_frames": 5, "canvas": 16, "digit_size": 8}


def test_a_run_takes_its_clips_from_shards(tmp_path: Path) -> None:
    config = Config(**SIZES, data="shards", data_path=run_folder(tmp_path), cache_dir=tmp_path / "cache")
    train, validation = load_run_clips(config)
    assert not (tmp_path / "cache").exists()
    assert isinstance(train, ShardedClips)
    assert (len(train), len(validation)) == (5, 3)
    wanted = random_clips(6, (5, 16, 16)).batch(torch.arange(5))
    assert same(train.batch(torch.arange(5)), wanted)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n_train": 7}, ValueError, "--n_train: .*train has 6 clips, got 7"),
        ({"n_val": 4}, ValueError, "--n_val: .*validation has 3 clips, got 4"),
        ({"n_frames": 6}, ValueError, "--n_frames: the clips in .*train have 5, got 6"),
        ({"canvas": 32}, ValueError, "--canvas: the frames in .*train are 16x16, got 32"),
        ({"data_path": None}, ValueError, "--data_path: data 'shards' needs the folder in which train and validation"),
        ({"data_path": Path("nowhere")}, FileNotFoundError, "there is no file nowhere.train.index.json"),
        ({"digits": Path("x")}, ValueError, "--digits: x has no use with data 'shards'"),
    ],
)
def test_options_must_agree_with_the_shards(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    options = {**SIZES, "data": "shards", "data_path": run_folder(tmp_path), "cache_dir": tmp_path, **change}
    with pytest.raises(error, match=message):
        load_run_clips(Config(**options))


def test_data_path_has_no_use_with_generated_clips(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no use with data 'embedded', only with 'official' and 'shards'"):
        load_clips(**SIZES, data_path=tmp_path, cache_dir=tmp_path, seed=0)


def test_steps_and_evaluation_take_shards_and_a_graph_says_why_not(tmp_path: Path) -> None:
    resident = random_clips(7, (5, 16, 16))
    sharded = write_shards(resident, tmp_path / "set", 3)
    steps = some_step("cpu"), some_step("cpu")
    indices = torch.tensor([5, 2, 3])
    losses = [step(*clips.batch(indices)) for step, clips in zip(steps, (resident, sharded), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    for function in (partial(evaluate, batch_size=4), rollout_arrays):
        found, wanted = (
            function(step.jepa, step.image_decoder, step.detection_head, clips)
            for step, clips in zip(steps, (resident, sharded), strict=True)
        )
        for name, value in vars(found).items():
            np.testing.assert_array_equal(value, getattr(wanted, name), err_msg=name)
    with pytest.raises(TypeError, match=r"clips must be a ClipSet, resident .* got ShardedClips.*clips\.resident\(\)"):
        GraphedTrainStep(steps[0], sharded)


# ---- memory ----

SET_BYTES = 512 << 20
READ_THROUGH = """
import sys
from pathlib import Path
from fastjepa.moving_mnist import sequential_batches
from fastjepa.moving_mnist.shards import ShardedClips

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

clips = ShardedClips(Path(sys.argv[1]))
clips.batch(sequential_batches(len(clips), 64)[0])  # what the first call of anything allocates
before = anonymous()
if sys.argv[2] == "resident":
    held = clips.resident()
    print(len(held), anonymous() - before)
else:
    most, seen = 0, 0
    for indices in sequential_batches(len(clips), 64):
        video, _ = clips.batch(indices)
        seen += len(video)
        most = max(most, anonymous())
    print(seen, most - before)
"""


@pytest.fixture(scope="module")
def large_set(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """512 MB of video in 8 shards: files of holes, which take no space on disk and are zeros to whoever reads them."""
    folder = tmp_path_factory.mktemp("large")
    T, H, W = 10, 64, 64
    n = SET_BYTES // (T * H * W) // 8
    written = []
    for number in range(8):
        files = []
        for kind, shape in (("video", (n, T, H, W)), ("digit_maps", (n, T, 8, 8))):
            path = folder / f"{kind}-{number}.npy"
            np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
            files.append(ShardFile(path.name, path.stat().st_size, "0" * 32))
        written.append(Shard(n, *files))
    (folder / INDEX).write_text(ShardIndex((T, H, W), tuple(written)).to_json(), encoding="utf-8")
    yield folder
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status, which tells anonymous memory, is Linux's")
@pytest.mark.parametrize("way", ["sharded", "resident"])
def test_a_set_read_through_does_not_come_to_lie_in_memory(way: str, large_set: Path) -> None:
    """And the measure sees it where one does."""
    command = [sys.executable, "-c", READ_THROUGH, str(large_set), way]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    seen, grown = map(int, done.stdout.split())
    assert seen == SET_BYTES // (10 * 64 * 64) // 8 * 8
    if way == "sharded":
        assert grown < SET_BYTES // 2  # some batches, and whatever the allocator has not yet given back
    else:
        assert grown > SET_BYTES * 9 // 10


# ---- the page ----


def test_the_example_of_the_page_writes_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"), re.DOTALL)
    for number, smaller in (("18_000", "12"), ("2_000", "5"), ("500", "4"), ("canvas=64", "canvas=28"), ("1024", "8")):
        assert number in code
        code = code.replace(number, smaller)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/scaling.md", "exec"), {})
    sizes = {"n_train": 12, "n_val": 4, "canvas": 28}
    train, validation = load_clips("shards", data_path=Path("shards"), cache_dir=tmp_path, seed=0, **sizes)
    assert isinstance(train, ShardedClips)
    assert [shard.n_clips for shard in train.index.shards] == [8, 4]
    video = torch.cat([train.resident().video, validation.resident().video])
    assert len(torch.unique(video.flatten(1), dim=0)) == 16  # no two clips are the same
    train.verify()
