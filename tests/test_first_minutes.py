"""What goes wrong in the first minutes of a new user: one line that says what is accepted, and exit status 2."""

from __future__ import annotations

import ast
import errno
import gzip
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import train as bench_train
from fastjepa import compare_steps, evaluate, export, rollout
from fastjepa.config import PRESETS, Config
from fastjepa.environment import ROOT
from fastjepa.figures import __main__ as figures
from fastjepa.files import safe_files
from fastjepa.moving_mnist.official import MNIST_TEST_SEQ, DownloadError
from fastjepa.storage.checkpoint import load_checkpoint, save_checkpoint
from fastjepa.storage.folder_lock import FolderLock
from fastjepa.storage.run_folder import CHECKPOINT_NAME
from fastjepa.training import board
from fastjepa.training.command_line import parse_config, run_from_command_line
from fastjepa.training.flags import check_flags

pytestmark = pytest.mark.packages("tyro", "torchmetrics", "cv2", "sklearn", "matplotlib", "PIL")

TINY = (
    "--device cpu --preset demo --henc 2 --hpre 2 --dstc 4 --canvas 16 --digit_size 8 --n_train 6 --n_val 3 "
    "--n_frames 5 --batch_size 3 --epochs 1"
).split()


def train(*flags: str) -> int:
    return run_from_command_line(parse_config(flags))


COMMANDS: dict[str, Callable[[list[str]], object]] = {
    "bench train": bench_train.main,
    "train": lambda argv: train(*argv),
    "train tiny": lambda argv: train(*TINY, *argv),
    "evaluate": evaluate.main,
    "rollout": rollout.main,
    "export": export.main,
    "figures": figures.main,
    "compare_steps": compare_steps.main,
}


def refused(command: str, argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr with which the command ended."""
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[command](argv.split())
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert "wrote" not in out
    lines = [
        line for line in err.splitlines() if not line.startswith(("generating ", "finding ", "downloading ", "cache:"))
    ]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert train(*TINY, "--cache_dir", str(folder / "cache"), "--out", str(folder / "run")) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def things(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with things that are not what they are taken for; `run` in it is a run."""
    folder = tmp_path_factory.mktemp("things")
    (folder / "run").symlink_to(run)
    header = b"\0\0\x08\x03" + b"\0\0\0\x28" + 2 * b"\0\0\0\x1c"
    for name, content in (
        ("file", b"hello\n"),
        ("short", header[:4]),
        ("wrong.gz", gzip.compress(bytes(2000))),
        ("cut.gz", gzip.compress(header + os.urandom(40 * 784))[:9000]),
        ("damaged/checkpoint.pt", os.urandom(3000)),
        ("empty.pt/checkpoint.pt", b""),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "empty").mkdir()
    torch.save({"weights": torch.ones(2)}, folder / "other.pt")
    state = load_checkpoint(run / CHECKPOINT_NAME)
    for name, changes in (("newer", {"config": {**state["config"], "wings": 2}}), ("no_rows", {"rows": None})):
        (folder / name).mkdir()
        save_checkpoint(folder / name / CHECKPOINT_NAME, {**state, **changes})
    return folder


@pytest.fixture
def here(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, of this test alone, with links to the things."""
    monkeypatch.chdir(tmp_path)
    for path in things.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        # a wrong folder
        ("train", "--resume nowhere", "--resume takes the folder of a run; nowhere does not exist"),
        ("train", "--resume file", "--resume takes the folder of a run; file is not a folder"),
        ("train", "--resume run/checkpoint.pt", "--resume takes the folder of a run; run/checkpoint.pt is not a"),
        ("train", "--resume empty", "--resume empty: there is nothing to resume: empty/checkpoint.pt does not exist"),
        ("train", "--resume damaged", "--resume damaged: damaged/checkpoint.pt is damaged, truncated, or not a file"),
        ("train", "--resume empty.pt", "--resume empty.pt: empty.pt/checkpoint.pt is empty"),
        ("train", "--resume newer", "--resume newer: unknown options in a saved configuration: wings"),
        ("train", "--resume no_rows", "no_rows/checkpoint.pt is damaged: it has no rows of metrics"),
        ("train tiny", "--out run", "--out run holds a run already: continue it with --resume run, or choose another"),
        ("train", "--resume run --out other", "--out cannot be given with --resume: a run goes on in its own folder"),
        ("train", "--resume run --lr 1 --henc 4", "another configuration: henc: 2 in the checkpoint, 4 now; lr: "),
        ("evaluate", "--checkpoint nowhere", "--checkpoint takes the folder of a run or its checkpoint.pt; there is"),
        ("evaluate", "--checkpoint empty", "--checkpoint takes the folder of a run or its checkpoint.pt; empty has no"),
        ("evaluate", "--checkpoint file", "--checkpoint file: file is damaged, truncated, or not a file that t"),
        ("evaluate", "--checkpoint other.pt", "other.pt is a file of torch.save, but not a fastjepa checkpoint"),
        ("export", "--checkpoint nowhere --eb_jepa x", "--checkpoint takes the folder of a run or its checkpoint.pt; "),
        ("export", "--checkpoint other.pt --eb_jepa x", "--checkpoint other.pt: other.pt is a file of torch.save, but"),
        ("rollout", "--checkpoint nowhere", "--checkpoint takes the folder of a run or its checkpoint.pt; there is"),
        ("figures", "nowhere", "nowhere is not a run folder: there is no such folder"),
        ("figures", "empty", "empty is not the folder of an evaluated run: it lacks config.json, metrics.csv"),
        ("figures", "", "name at least one run folder"),
        # no data
        ("train tiny", "--digits nowhere", "--digits: there is no file nowhere; expected an MNIST idx3-ubyte"),
        ("train tiny", "--digits short", "--digits: short ends within its 16-byte idx3 header"),
        ("train tiny", "--digits wrong.gz", "--digits: wrong.gz starts with magic number 0x00000000; an idx3-ubyte"),
        ("train tiny", "--digits cut.gz", "--digits: cut.gz is a damaged or truncated gzip file"),
        ("train tiny", "--data idx", "--digits: data 'idx' needs the path of an MNIST idx image file"),
        ("train", "--device cpu --data official --data_path nowhere", "--data_path: there is no file nowhere; "),
        ("train", "--device cpu --data official --data_path file", "file is not mnist_test_seq.npy as published"),
        ("train", "--device cpu --data official --canvas 32", "--canvas: data 'official' has 64, got 32"),
        # a flag that there is not, or what it does not take
        ("train", "--batch_sise 3", "no flag --batch_sise; perhaps --batch_size is meant; train.py --help lists all"),
        ("train", "--profil", "there is no flag --profil; perhaps --profile is meant"),
        ("train", "--xyzzy 3", "there is no flag --xyzzy; train.py --help lists all"),
        ("train", "-lr 3", "'-lr' belongs to no flag; flags begin with --"),
        ("train", "resume runs/1", "'resume' belongs to no flag; flags begin with --"),
        ("train", "--lr abc", "--lr must be a number; got 'abc'"),
        ("train", "--lr=abc", "--lr must be a number; got 'abc'"),
        ("train", "--steps 2.5", "--steps must be a whole number; got '2.5'"),
        ("train", "--max_steps few", "--max_steps must be a whole number; got 'few'"),
        ("train", "--n_train -3", "--n_train must be at least 1, got -3"),
        ("train", "--n_frames 2", "--n_frames must be at least 3 (two frames predict the third), got 2"),
        ("train", "--lr", "--lr needs a value: a number"),
        ("train", "--lr --seed 3", "--lr needs a value: a number"),
        ("train", f"--seed {2**63}", f"--seed must be less than 2^63 = {2**63}, got {2**63}"),
        ("train", "--out=", "--out must be a path; got ''"),
        ("train", "--preset", "argument --preset: expected one argument; see train.py --help"),
        ("train", "--profile=yes", "--profile takes no value, got 'yes'; it is given or not"),
        ("train", "--precision fp8", "--precision must be one of auto, fp32, tf32, bf16; got 'fp8'"),
        ("evaluate", "--chekpoint run", "there is no flag --chekpoint; perhaps --checkpoint is meant"),
        ("evaluate", "", "--checkpoint is needed: a path; see python -m fastjepa.evaluate --help"),
        ("evaluate", "--checkpoint run --batch_size 0", "--batch_size must be at least 1, got 0"),
        ("rollout", "--checkpoint run --horizon 0", "--horizon must be at least 1, got 0"),
        ("rollout", "--checkpoint run --clips 9", "--clips must be at most 3, the validation clips of the run; got 9"),
        ("rollout", "--checkpoint run --out a.png", "--out must end in .gif, got a.png"),
        ("figures", "--compare", "argument --compare: expected one argument; see python -m fastjepa.figures --help"),
        ("compare_steps", "--steps 0", "--steps must be numbers of at least 1, got 0"),
        ("compare_steps", "--steps 2 2", "--steps must be different numbers, got 2 2"),
        ("compare_steps", "--steps many", "argument --steps: invalid int value: 'many'"),
        ("compare_steps", "--lrr 3", "there is no flag --lrr; perhaps --lr is meant"),
        ("bench train", "", "the following arguments are required: --out; see python -m bench train --help"),
        ("bench train", "--out a --seconds nan", "--seconds must be more than 0, got nan"),
        # where nothing can be written
        ("train tiny", "--out file", "--out file cannot be written: it is a file, and a run takes a folder"),
        ("train tiny", "--out file/run", "--out file/run cannot be written: Not a directory"),
        ("train tiny", "--cache_dir file", "cannot write to the cache folder file (File exists); choose a writable"),
        ("train tiny", "--cache_dir file/c", "cannot write to the cache folder file/c (Not a directory); choose a"),
        ("evaluate", "--checkpoint run --device cpu --json file/a", "could not write file/a: Not a directory; nothing"),
        ("rollout", "--checkpoint run --out file/a.gif", "--out file/a.gif cannot be written: file is not a folder"),
    ],
    ids=lambda value: value.replace(" ", "_") or "-",
)  # fmt: skip
def test_a_mistake_is_one_line(
    command: str, argv: str, message: str, here: Path, things: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {*here.iterdir(), *things.rglob("*")}
    assert message in refused(command, argv, capsys)
    assert {*here.iterdir(), *things.rglob("*")} == before, "something half-made was left"


@pytest.mark.parametrize(
    ("own", "more", "message"),
    [
        ("--out file", "", "file/run: Not a directory"),
        ("--out new", "--digits nowhere", "--digits: there is no file nowhere; "),
    ],
)
def test_a_mistake_in_a_timed_run(
    own: str, more: str, message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused("bench train", f"{own} -- {' '.join(TINY)} {more}", capsys)


def test_the_flags_that_are_looked_at_are_those_that_there_are() -> None:
    """Every field of every command's options is of a kind that is understood, and a right flag is let through."""
    for kind in (Config, evaluate.Options, rollout.Options):
        with pytest.raises(
            ValueError, match=r"--\w+ must be one of auto, on, off; got 'x'|there is no flag --cuda_graph"
        ):
            check_flags(kind, ["--cuda_graph", "x"], "train.py", None)
    right = (
        "--lr=1e-3 --batch-size 4 --max_steps None --no_profile --profile --seed 0 --out -3 --precision bf16 --digits x"
    )
    check_flags(Config, right.split(), "train.py", Config())
    assert parse_config(["--device", "cpu", *right.split()]).profile
    with pytest.raises(ValueError, match=r"^--out needs a value: a path$"):
        check_flags(Config, ["--out"], "train.py", Config())
    check_flags(Config, ["--nonsense", "--help"], "train.py", Config())


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
@pytest.mark.parametrize("command", ["train", "evaluate", "rollout"])
def test_a_gpu_where_there_is_none(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--checkpoint run " if command in ("evaluate", "rollout") else ""
    assert refused(command, f"{flags}--device cuda", capsys).startswith("--device cuda was asked for, but ")


def test_no_connection(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fetch(*_: object) -> None:
        raise DownloadError("could not download it: no connection. Download it by other means")

    monkeypatch.setattr("fastjepa.moving_mnist.official._fetch", fetch)
    flags = "--device cpu --data official --cache_dir cache --out new"
    assert refused("train", flags, capsys).startswith("could not download it: no connection.")
    assert list((here / "cache").iterdir()) == []
    assert not (here / "new").exists()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_official_data_has_its_own_size_of_frames(preset: str) -> None:
    flags = ["--device", "cpu", "--preset", preset, "--data", "official"]
    assert parse_config(flags).canvas == MNIST_TEST_SEQ.size
    assert parse_config([*flags, "--canvas", "48"]).canvas == 48


def test_resumed_twice(here: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "metrics.csv").read_bytes()
    lock = FolderLock(run)
    told = refused("train", "--resume run --epochs 9", capsys)
    assert told.startswith(f"the run in run is being trained by process {os.getpid()} on ")
    assert (run / "metrics.csv").read_bytes() == before
    lock.release()


@pytest.mark.parametrize("at", ["data", "self-check"])
def test_ctrl_c_before_training(
    at: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    where = {
        "data": "fastjepa.moving_mnist.clips.generate_clips",
        "self-check": "fastjepa.training.trainer.begun_execution",
    }
    monkeypatch.setattr(where[at], interrupt)
    assert train(*TINY, "--cache_dir", "cache", "--out", "new/run") == 130
    assert capsys.readouterr().out == "stopped\n"
    assert not (here / "new").exists()
    whole = "digits-*.npy"  # made before it was stopped
    assert {*(here / "cache").rglob("*")} == {*(here / "cache").glob(whole)}


@pytest.mark.parametrize("command", ["evaluate", "rollout"])
def test_ctrl_c_in_another_command(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fastjepa.{command}.load_run_clips", interrupt)
    with pytest.raises(SystemExit) as stopped:
        COMMANDS[command](["--checkpoint", "run", "--device", "cpu"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


# ---- a full disk, and too little memory ----


def test_a_full_disk_leaves_the_last_checkpoint(
    here: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full, real = False, os.fsync

    def fsync(descriptor: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    def save(path: Path, state: dict[str, object]) -> None:
        nonlocal full
        save_checkpoint(path, state)
        full = load_checkpoint(path)["progress"]["global_step"] == 1

    flags = f"--cache_dir {run.parent / 'cache'} --out new --checkpoint_every 1"
    with monkeypatch.context() as patch:
        patch.setattr(safe_files.os, "fsync", fsync)
        patch.setattr("fastjepa.training.trainer.save_checkpoint", save)
        with pytest.raises(SystemExit) as stopped:
            train(*TINY, *flags.split())
    assert stopped.value.code == 2
    reason = "could not write new/checkpoint.pt: No space left on device; what was there before is intact"
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1] == f"error: {reason}"
    assert not any("Traceback" in line for line in errors)
    assert load_checkpoint(here / "new" / CHECKPOINT_NAME)["progress"]["global_step"] == 1
    assert not list((here / "new").rglob("*.tmp"))
    assert train("--resume", "new") == 0
    assert (here / "new" / "metrics.csv").read_text().splitlines()[-1].startswith("1,2,")


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_tensorboard_cannot_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread's error comes with the next call, and is a line with the folder; not a traceback of the thread."""
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(safe_files.CheckpointError) as told, board.open_board(tmp_path, 0) as opened:  # noqa: PT012
        monkeypatch.setattr(writer, "write", refuse)
        for step in range(1000):
            opened.add_scalar("loss", 0.0, step)
            opened.add_image("image", torch.zeros(1, 8, 8).numpy(), step)
    assert str(told.value) == f"could not write {tmp_path / 'tensorboard'}: No space left on device"

    monkeypatch.undo()
    closing = pytest.raises(safe_files.CheckpointError, match=r"tensorboard: No space left on device$")
    with closing, board.open_board(tmp_path / "2", 0):
        monkeypatch.setattr(writer, "flush", refuse)
    monkeypatch.undo()
    with pytest.raises(KeyError, match="first"), board.open_board(tmp_path / "3", 0):  # noqa: PT012
        monkeypatch.setattr(writer, "flush", refuse)
        raise KeyError("first")  # and not what closing says after it


def test_too_little_memory(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def allocate(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more lines")

    monkeypatch.setattr("fastjepa.training.trainer.build_jepa", allocate)
    told = refused("train tiny", "--cache_dir cache --out new", capsys)
    assert told == (
        "memory ran out (CUDA out of memory. Tried to allocate 9 GiB); a smaller batch, smaller sizes or fewer clips "
        "need less"
    )
    assert not (here / "new").exists()


# ---- train.py, before anything of the package is there ----

TRAIN_PY = ROOT / "train.py"


def test_old_pythons_can_read_train_py() -> None:
    text = TRAIN_PY.read_text(encoding="ascii")  # Python 2 refuses anything else
    tree = ast.parse(text, feature_version=(3, 6))
    assert not any(isinstance(node, (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr)) for node in ast.walk(tree))
    assert not any(isinstance(node, ast.arg) and node.annotation for node in ast.walk(tree))


def start(code: str, *, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **({} if path is None else {"PYTHONPATH": str(path)})}
    command = [sys.executable, "-c", f"{code}\nimport runpy; runpy.run_path({str(TRAIN_PY)!r}, run_name='__main__')"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=variables)


def test_an_old_python_says_so() -> None:
    done = start("import sys; sys.version_info = (3, 8, 18, 'final', 0); sys.version = '3.8.18 (main)'")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: fastjepa needs Python 3.10 or newer; this is Python 3.8.18, {sys.executable}\n"


def test_an_environment_without_torch_says_so() -> None:
    done = start("import sys; sys.modules['torch'] = None")
    assert (done.returncode, done.stdout) == (2, "")
    told = f"error: training needs the Python package torch, which is not installed in {sys.executable}; "
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        "train.py", "-m fastjepa train", "-m fastjepa.evaluate", "-m fastjepa.rollout", "-m fastjepa.export",
        "-m fastjepa.compare_steps", "-m fastjepa.sweep --grid published",
        "-m fastjepa.figures x",
    ],
)  # fmt: skip
def test_ctrl_c_while_packages_are_loading(command: str, tmp_path: Path) -> None:
    loading = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n"
    for package in ("torch", "matplotlib"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(loading)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))}
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
        env=variables,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "stopped\n")


# ---- nobody reads what is printed, as in `| head` ----


def with_its_reader_gone(*command: str) -> tuple[int, str]:
    """(exit status, stderr) of a Python process whose output nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
            timeout=60,
        )  # fmt: skip
    finally:
        os.close(writer)
    return done.returncode, done.stderr


def test_output_that_nobody_reads_is_no_error() -> None:
    assert with_its_reader_gone("-m", "fastjepa", "--help") == (128 + signal.SIGPIPE, "")
    in_a_run = (
        "import sys; from fastjepa.entry import exit_status; from fastjepa.refusal import refusals\n"
        "def run():\n with refusals(): print('preset demo', flush=True)\n return 0\n"
        "sys.exit(exit_status(run))"
    )
    assert with_its_reader_gone("-c", in_a_run) == (128 + signal.SIGPIPE, "")


def test_help_that_nobody_reads() -> None:
    assert with_its_reader_gone("train.py", "--help") == (128 + signal.SIGPIPE, "")
