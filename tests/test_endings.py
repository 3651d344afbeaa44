"""Every ending of a run, over presets × precision × data, has a summary and loses nothing.

A case is one way to end, or to be ended and go on, given on the command line as a user would; in this process, because
that is quick. The cases cover every pair of values. A real process ends the file.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import shlex
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastjepa.config import PRESETS
from fastjepa.environment import ROOT
from fastjepa.moving_mnist import generate_clips, load_clips
from fastjepa.moving_mnist.digits import embedded_digits
from fastjepa.moving_mnist.official import SequenceFile
from fastjepa.storage.checkpoint import load_checkpoint
from fastjepa.storage.folder_lock import LOCK_NAME
from fastjepa.storage.run_folder import CHECKPOINT_NAME
from fastjepa.training.command_line import parse_config, run_from_command_line
from fastjepa.training.evaluation import Evaluation, evaluate
from fastjepa.training.trainer import Trainer

pytestmark = pytest.mark.packages("tyro", "torchmetrics", "cv2", "sklearn", "matplotlib", "PIL", "safetensors")

# 3 steps an epoch, the last batch ragged.
TINY = (
    "--device cpu --henc 2 --hpre 2 --dstc 4 --canvas 16 --digit_size 8 --n_train 8 --n_val 3 --n_frames 5 "
    "--batch_size 3 --steps 2 --epochs 2 --log_every 2 --checkpoint_every 2"
).split()
OFFICIAL = SequenceFile("https://nowhere/tiny.npy", md5=None, n_frames=10, n_sequences=6, size=16, n_validation=2)


class Run:
    """One run as its user sees it: its flags, its folder, and what the last command printed."""

    def __init__(self, folder: Path, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.flags, self._capsys = folder, flags, capsys
        self.out = ""

    def begin(self, flags: str = "") -> int:
        """`python train.py --out FOLDER …`; the exit status."""
        return self._command([*self.flags, "--out", str(self.folder), *flags.split()])

    def resume(self, flags: str = "") -> int:
        """`python train.py --resume FOLDER …`, with no other flags than these; the exit status."""
        return self._command(["--resume", str(self.folder), *flags.split()])

    def _command(self, argv: list[str]) -> int:
        try:
            status = run_from_command_line(parse_config(argv))
        finally:
            self.out, error = self._capsys.readouterr()
        assert "Traceback" not in error
        assert not (self.folder / LOCK_NAME).exists()
        return status

    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader((self.folder / "metrics.csv").open()))

    def steps(self) -> list[tuple[int, bool]]:
        """Of each row of metrics.csv: the step, and whether it was evaluated."""
        return [(int(row["step"]), bool(row.get("map"))) for row in self.rows()]

    def files(self) -> dict[str, bytes]:
        """What a run leaves to look at, but for its checkpoint and TensorBoard's events."""
        paths = [self.folder / name for name in ("config.json", "environment.json", "metrics.csv", "rollout.npz")]
        paths += [path for name in ("figures", "pretrained") for path in (self.folder / name).iterdir()]
        paths.remove(self.folder / "pretrained" / "config.json")  # which has the flags of the last command
        return {str(path): path.read_bytes() for path in paths}

    def assert_summary(self, position: str, begins: str = "done, in ") -> None:
        """The summary says how far the run is and the metrics of its last row, and lists files that are there."""
        text, _, listed = self.out.partition("wrote:\n" if begins.startswith("done") else "it holds:\n")
        assert f"\n{begins}" in text
        assert f" s: {position}; --resume {self.folder} with more " in text
        last = self.rows()[-1]
        assert f"\nmAP {float(last['map']):.3f} (pooled {float(last['pooled_map']):.3f}), AP_0 " in text
        paths = [Path(line.strip()) for line in listed.splitlines()]
        assert all(path.exists() for path in paths)
        figures = {"rollout.png", "rollout.gif", "ap.png", "training.png"}
        assert {"metrics.csv", CHECKPOINT_NAME, "pretrained", *figures} <= {path.name for path in paths}

    def assert_stopped(self, by: str = "stopped") -> None:
        """What was printed last is the command that goes on."""
        told = f"{by}; continue with: python train.py --resume {shlex.quote(str(self.folder))}"
        assert self.out.splitlines()[-1] == told

    def saved_step(self) -> int:
        return int(load_checkpoint(self.folder / CHECKPOINT_NAME)["progress"]["global_step"])


# ---- the endings -----------------------------------------------------------------------------------------------------

NOTHING_LEFT = "nothing was left to do, in "


def max_steps_inside_the_first_epoch(run: Run, _: pytest.MonkeyPatch) -> None:
    assert run.begin("--max_steps 2 --epochs 1") == 0
    run.assert_summary("0 of 1 epochs and 2 steps of the next, 2 steps in all")
    assert run.steps() == [(2, True)]
    assert run.resume("--max_steps 9") == 0
    run.assert_summary("1 of 1 epochs, 3 steps in all")
    assert run.steps() == [(3, True)]  # the row that was cut short has gone


def max_steps_at_the_end_of_an_epoch(run: Run, _: pytest.MonkeyPatch) -> None:
    assert run.begin("--max_steps 3 --eval_every 2") == 0
    run.assert_summary("1 of 2 epochs, 3 steps in all")
    assert run.steps() == [(3, True)]


def max_steps_in_a_later_epoch_with_few_evaluations(run: Run, _: pytest.MonkeyPatch) -> None:
    assert run.begin("--max_steps 5 --eval_every 2") == 0
    run.assert_summary("1 of 2 epochs and 2 steps of the next, 5 steps in all")
    assert run.steps() == [(3, False), (5, True)]


def resumed_when_it_is_finished(run: Run, _: pytest.MonkeyPatch) -> None:
    assert run.begin("--epochs 1") == 0
    before = run.files()
    assert run.resume() == 0
    run.assert_summary("1 of 1 epochs, 3 steps in all", NOTHING_LEFT)
    assert run.files() == before


def resumed_with_more_epochs(run: Run, _: pytest.MonkeyPatch) -> None:
    assert run.begin("--epochs 1") == 0
    assert run.resume("--epochs 2 --eval_every 5") == 0
    run.assert_summary("2 of 2 epochs, 6 steps in all")
    assert run.steps() == [(3, True), (6, True)]


def resumed_with_no_steps_left_in_mid_epoch(run: Run, _: pytest.MonkeyPatch) -> None:
    assert run.begin("--max_steps 5") == 0
    before = run.files()
    for flags in ("", "--epochs 7", "--max_steps 4"):
        assert run.resume(flags) == 0
        epochs = 7 if "7" in flags else 2
        run.assert_summary(f"1 of {epochs} epochs and 2 steps of the next, 5 steps in all", NOTHING_LEFT)
        assert run.steps() == [(3, True), (5, True)]
        assert run.files() == before


def signal_in_the_first_epoch(run: Run, patch: pytest.MonkeyPatch) -> None:
    with patch.context() as once:
        at_step(once, 1, partial(signal.raise_signal, signal.SIGINT))
        assert run.begin() == 128 + signal.SIGINT
    run.assert_stopped("stopped by SIGINT")
    assert not (run.folder / "metrics.csv").exists()
    assert run.resume() == 0
    run.assert_summary("2 of 2 epochs, 6 steps in all")
    assert run.steps() == [(3, True), (6, True)]


def signal_at_the_last_step(run: Run, patch: pytest.MonkeyPatch) -> None:
    """Of max_steps, and of an epoch: training has ended, and what is left is to evaluate."""
    with patch.context() as once:
        at_step(once, 3, partial(signal.raise_signal, signal.SIGTERM))
        assert run.begin("--max_steps 3 --checkpoint_every 9") == 128 + signal.SIGTERM
    run.assert_stopped("stopped by SIGTERM")
    assert run.saved_step() == 3
    assert run.resume() == 0
    run.assert_summary("1 of 2 epochs, 3 steps in all")
    assert run.steps() == [(3, True)]


def signal_in_an_evaluation(run: Run, patch: pytest.MonkeyPatch) -> None:
    """The first goes on with the next epoch later; in the last one a signal changes nothing."""

    def signalled(*arguments: Any, **options: Any) -> Evaluation:
        signal.raise_signal(signal.SIGINT)
        return evaluate(*arguments, **options)

    with patch.context() as twice:
        twice.setattr("fastjepa.training.trainer.evaluate", signalled)
        assert run.begin() == 128 + signal.SIGINT
        run.assert_stopped("stopped by SIGINT")
        assert run.steps() == [(3, True)]
        assert run.resume() == 0
    run.assert_summary("2 of 2 epochs, 6 steps in all")
    assert run.steps() == [(3, True), (6, True)]


def ended_in_its_last_evaluation(run: Run, patch: pytest.MonkeyPatch) -> None:
    """Ended as a second Ctrl-C, or SIGKILL, would: what is on disk is the last checkpoint."""
    with patch.context() as once:
        once.setattr("fastjepa.training.trainer.evaluate", interrupt)
        assert run.begin("--max_steps 2") == 128 + signal.SIGINT
    run.assert_stopped()
    assert run.saved_step() == 2
    assert run.resume() == 0
    run.assert_summary("0 of 2 epochs and 2 steps of the next, 2 steps in all")
    assert run.steps() == [(2, True)]


def ended_while_drawing(run: Run, patch: pytest.MonkeyPatch) -> None:
    with patch.context() as once:
        once.setattr("fastjepa.figures.runs.draw_run", interrupt)
        assert run.begin("--epochs 1") == 128 + signal.SIGINT
    run.assert_stopped()
    metrics = (run.folder / "metrics.csv").read_bytes()
    assert run.resume() == 0
    run.assert_summary("1 of 1 epochs, 3 steps in all", NOTHING_LEFT)
    assert (run.folder / "metrics.csv").read_bytes() == metrics


def resumed_with_fewer_epochs_than_it_has(run: Run, patch: pytest.MonkeyPatch) -> None:
    """It ends where it is: after an epoch that was not evaluated, or in the midst of one."""
    with patch.context() as once:
        at_step(once, 4, interrupt)
        assert run.begin("--eval_every 2") == 128 + signal.SIGINT
    assert run.steps() == [(3, False)]
    assert run.resume("--epochs 1") == 0
    run.assert_summary("1 of 1 epochs, 3 steps in all")
    assert run.steps() == [(3, True)]
    with patch.context() as once:
        at_step(once, 1, partial(signal.raise_signal, signal.SIGINT))
        assert run.resume("--epochs 3") == 128 + signal.SIGINT
    assert run.resume("--epochs 1") == 0
    run.assert_summary("1 of 1 epochs and 1 step of the next, 4 steps in all")
    assert run.steps() == [(3, True), (4, True)]


ENDINGS: tuple[Callable[[Run, pytest.MonkeyPatch], None], ...] = (
    max_steps_inside_the_first_epoch, max_steps_at_the_end_of_an_epoch,
    max_steps_in_a_later_epoch_with_few_evaluations, resumed_when_it_is_finished, resumed_with_more_epochs,
    resumed_with_no_steps_left_in_mid_epoch, signal_in_the_first_epoch, signal_at_the_last_step,
    signal_in_an_evaluation, ended_in_its_last_evaluation, ended_while_drawing, resumed_with_fewer_epochs_than_it_has,
)  # fmt: skip


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def at_step(patch: pytest.MonkeyPatch, number: int, act: Callable[[], object]) -> None:
    """`act()` in the `number`-th step that the next command makes."""
    steps, step = itertools.count(1), Trainer._step

    def acting(self: Trainer, *arguments: Any) -> None:
        if next(steps) == number:
            act()
        step(self, *arguments)

    patch.setattr(Trainer, "_step", acting)


# ---- the matrix ------------------------------------------------------------------------------------------------------

VALUES = (tuple(PRESETS), ("fp32", "bf16"), ("embedded", "idx", "official"), ENDINGS)


def pairs(case: tuple[Any, ...]) -> set[tuple[int, Any, int, Any]]:
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


def covering() -> list[tuple[Any, ...]]:
    """Cases in which every pair of values meets: whichever holds the most pairs that are missing, until none is."""
    everything = list(itertools.product(*VALUES))
    missing = set().union(*map(pairs, everything))
    chosen = []
    while missing:
        chosen.append(max(everything, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


CASES = covering()


def test_the_matrix_is_no_larger_than_it_must_be() -> None:
    assert len(CASES) <= len(ENDINGS) * max(map(len, VALUES[:3])) + 3


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The flags of each kind of data; tiny files of digits, as MNIST's, and of sequences, as the official ones."""
    folder = tmp_path_factory.mktemp("data")
    digits = embedded_digits()[0][:40]
    with gzip.open(folder / "images.gz", "wb") as file:
        file.write(struct.pack(">4I", 0x803, *digits.shape) + digits.tobytes())
    n = OFFICIAL.n_sequences
    sequences = generate_clips(digits, n, n_frames=OFFICIAL.n_frames, canvas=OFFICIAL.size, digit_size=8, seed=0)
    np.save(folder / OFFICIAL.name, sequences.transpose(1, 0, 2, 3))
    cache = ["--cache_dir", str(folder / "cache")]
    return {
        "embedded": cache,
        "idx": [*cache, "--digits", str(folder / "images.gz")],
        "official": [*cache, "--data", "official", "--data_path", str(folder / OFFICIAL.name)],
    }


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official file is the tiny one, and a picture is its name; what it is drawn from is read and checked all the
    same. Real pictures, of a second in all, are drawn in the other tests.
    """
    monkeypatch.setattr("fastjepa.training.run_clips.load_clips", partial(load_clips, official_file=OFFICIAL))

    def draw(_: object, path: Path, *__: object) -> Path:
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.name)
        return path

    for name in ("draw_rollout_strip", "draw_rollout_gif", "draw_ap_curves", "draw_training_curves"):
        monkeypatch.setattr(f"fastjepa.figures.runs.{name}", draw)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("preset", "precision", "data", "ending"), CASES, ids=lambda value: getattr(value, "__name__", value)
)
def test_an_ending(
    preset: str, precision: str, data: str, ending: Callable[[Run, pytest.MonkeyPatch], None],
    sources: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = ["--preset", preset, "--precision", precision, *sources[data], *TINY]
    ending(Run(tmp_path / "run", flags, capsys), monkeypatch)


def test_a_run_that_was_finished_keeps_its_scalars_in_tensorboard(
    sources: dict[str, list[str]], quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resumed run hides what was told of later steps, and not of the one that it goes on from."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = Run(tmp_path / "run", [*sources["embedded"], *TINY], capsys)
    assert run.begin() == 0
    assert run.resume() == 0
    assert run.resume("--epochs 3") == 0
    board = events.EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("val/map")] == [3, 6, 9]
    assert [event.step for event in board.Scalars("train/total")] == [2, 4, 6, 8]


# ---- a real process --------------------------------------------------------------------------------------------------


def test_train_py_with_two_steps_and_again(
    sources: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that once ended in an IndexError; real pictures, and a folder that is named relatively."""
    run = Run(Path("here/run"), [], capsys)
    flags = [*sources["idx"], *TINY, "--max_steps", "2", "--epochs", "1", "--out", str(run.folder)]
    command = [sys.executable, str(ROOT / "train.py"), "--preset", list(PRESETS)[-1], *flags]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert first.returncode == 0, first.stderr
    monkeypatch.chdir(tmp_path)
    run.out = first.stdout
    run.assert_summary("0 of 1 epochs and 2 steps of the next, 2 steps in all")
    before = run.files()
    assert run.resume() == 0
    run.assert_summary("0 of 1 epochs and 2 steps of the next, 2 steps in all", NOTHING_LEFT)
    assert run.files() == before
