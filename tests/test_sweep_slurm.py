"""A sweep through submitit: what Slurm is asked for, a job that really runs, and one that is taken off its node."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from absence import run_as_main, without
from fastjepa.optional_packages import install_command
from fastjepa.sweep import main
from fastjepa.sweeping import one_run
from fastjepa.sweeping.cluster import Job, parameters_of, parse_slurm, submit
from fastjepa.sweeping.grid import parse_grid
from fastjepa.sweeping.plan import plan_runs
from fastjepa.sweeping.state import FAILURE_NAME, read_state
from made_up_sweep import TINY, leave, leave_finished, planned, row

pytestmark = pytest.mark.packages("tyro", "torchmetrics", "cv2", "sklearn", "matplotlib", "PIL")

# ---- what is asked for ----


def test_parameters_are_submitits_or_slurms() -> None:
    given = parse_slurm("partition=gpu time=60 gpus_per_node=1 mem_gb=32.5 qos=low array-parallelism=4".split())
    assert parameters_of(given) == {
        "name": "fastjepa-sweep", "timeout_min": 60, "gpus_per_node": 1, "mem_gb": 32.5, "slurm_partition": "gpu",
        "slurm_qos": "low", "slurm_array_parallelism": 4,
    }  # fmt: skip
    given = parse_slurm("cluster=local time=5 name=mine max_num_timeout=3 slurm_account=me".split())
    assert parameters_of(given) == {"name": "mine", "timeout_min": 5, "slurm_account": "me"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--slurm partition=gpu", "--slurm needs time=MINUTES of one run"),
        ("--slurm time=1h", "--slurm time must be a whole number of at least 0, got '1h'"),
        ("--slurm time=5 gpus_per_node=-1", "--slurm gpus_per_node must be a whole number of at least 0, got '-1'"),
        ("--slurm time=5 mem_gb=much", "--slurm mem_gb must be a number of at least 0, got 'much'"),
        ("--slurm time", "--slurm takes NAME=VALUE, like partition=gpu time=60 gpus_per_node=1; got 'time'"),
        ("--slurm time=1 time=2", "--slurm has time twice"),
        ("--slurm time=5 nodes=2", "--slurm nodes cannot be given: one run is one process on one node"),
        ("--slurm timeout_min=5", "--slurm timeout_min cannot be given: it is called time here, time=MINUTES"),
        ("--slurm time=5 cluster=nowhere", "--slurm time=5 cluster=nowhere: AutoExecutor doesn't know"),
        ("--slurm time=5 cluster=local hue=red", "--slurm time=5 cluster=local hue=red: Unknown argument 'hue'"),
        ("--slurm time=5 -- --device cpu", "-- --preset must be one of full, readme, demo in a sweep for other"),
        ("--slurm time=5 -- --preset demo --steps x", "--steps must be a whole number; got 'x'"),
    ],
)  # fmt: skip
@pytest.mark.packages("submitit")
def test_what_cannot_be_served_is_one_line(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = arguments.split()
    flags = own[own.index("--") :] if "--" in own else ["--", "--preset", "demo"]
    with pytest.raises(SystemExit) as stopped:
        main(["--grid", "lr=1e-3", "--out", str(tmp_path), *own[: own.index("--") if "--" in own else None], *flags])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}"), line
    assert not (tmp_path / "sweep.json").exists()


def test_without_submitit_the_command_says_what_to_install(tmp_path: Path) -> None:
    argv = ("--grid", "lr=1", "--out", str(tmp_path / "out"), "--slurm", "time=5", "--", "--preset", "demo")
    done = run_as_main(without("submitit"), "fastjepa.sweep", *argv)
    assert (done.returncode, done.stdout) == (2, "")
    install = install_command(["submitit"])
    assert (
        done.stderr == f"error: a sweep on Slurm needs the Python package submitit, which is not installed; {install}\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_run_for_another_machine_leaves_to_it_what_depends_on_it(tmp_path: Path) -> None:
    flags = ("--preset", "full", "--device", "cuda", "--backend=fused", "--cuda_graph", "on")
    (run,) = plan_runs(parse_grid(["lr=1e-3"]), [1], flags, tmp_path, prog="sweep", here=False)
    assert run.flags == (*flags[2:], "--preset", "full", "--lr", "0.001", "--seed", "1")  # handed on as given
    leave(run, row(1, 30, 0.2), precision="bf16", device="cuda:0")
    assert read_state(run).status == "begun"  # bf16 is what auto was there
    (asked,) = plan_runs(parse_grid(["lr=1e-3"]), [1], (*flags, "--precision", "tf32"), tmp_path, prog="", here=False)
    with pytest.raises(ValueError, match="precision is bf16 there and tf32 is asked for"):
        read_state(asked)


# ---- jobs ----


@pytest.mark.packages("submitit")
def test_a_job_that_really_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--grid", "lr=1e-3", "--seeds", "1", "--out", str(tmp_path / "sweep"), "--slurm", "cluster=local", "time=5"]
    flags = [*TINY, "--epochs", "1", "--cache_dir", str(tmp_path / "cache")]
    assert main([*argv, "--", *flags]) == 0
    printed = capsys.readouterr().out
    assert "1 run: 0 finished, 1 to train\n  job " in printed
    (run,) = plan_runs(parse_grid(["lr=1e-3"]), [1], flags, tmp_path / "sweep", prog="", here=False)
    wait_until(lambda: read_state(run).status in ("finished", "broken"))
    assert read_state(run).status == "finished", (run.folder / "sweep.log").read_text()
    assert main(["--out", str(tmp_path / "sweep"), "--report_only"]) == 0
    assert (tmp_path / "sweep" / "heatmap.png").is_file()
    capsys.readouterr()
    assert main([*argv, "--", *flags]) == 0  # nothing is left to submit
    assert "job " not in capsys.readouterr().out


def wait_until(ready: Callable[[], bool], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not ready() and time.monotonic() < until:
        time.sleep(0.1)


@pytest.mark.packages("submitit")
def test_the_runs_that_are_left_are_one_array_of_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for Slurm's own commands."""
    from submitit.core.utils import DelayedSubmission

    for name, code in (("srun", ""), ("sbatch", f'cp "$1" {tmp_path}/submitted.sh; echo Submitted batch job 12')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    runs = planned(tmp_path / "sweep", "lr=1e-3,2e-3", seeds=(1, 2, 3))
    given = parse_slurm("partition=gpu time=60 gpus_per_node=1 constraint=h100".split())
    jobs = submit(runs[1:], given, tmp_path / "sweep")
    assert [job.job_id for job in jobs] == [f"12_{i}" for i in range(5)]
    script = (tmp_path / "submitted.sh").read_text()
    for option in ("partition=gpu", "time=60", "gpus-per-node=1", "constraint=h100", "array=0-4%5"):
        assert f"#SBATCH --{option}\n" in script
    pickled = DelayedSubmission.load(jobs[2].paths.submitted_pickle)
    assert pickled.function._run == runs[3]
    assert pickled._timeout_countdown == 20


def kill_when(ready: Callable[[], bool], number: int) -> None:
    wait_until(ready)
    os.kill(os.getpid(), number)


@pytest.mark.packages("submitit")
def test_what_slurm_refuses_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\necho invalid partition >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    runs = planned(tmp_path / "sweep", "lr=1e-3", seeds=(1,))
    with pytest.raises(ValueError, match=r"^--slurm time=60 partition=no: (.|\n)*invalid partition"):
        submit(runs, parse_slurm(["time=60", "partition=no"]), tmp_path / "sweep")


@pytest.mark.packages("submitit")
def test_a_job_that_is_taken_off_its_node_saves_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`checkpoint` is called in a signal handler amid the job, as submitit does it."""
    (run,) = planned(tmp_path / "sweep", "lr=1e-3", seeds=(1,))
    begun = leave(run, row(1, 30, 0.2), folder=tmp_path / "made" / "begun")
    whole = leave_finished(run, 0.4, folder=tmp_path / "made" / "whole")
    copies = {p: f"shutil.copytree({str(p)!r}, {str(run.folder)!r}, dirs_exist_ok=True)" for p in (begun, whole)}
    code = f"""
import shutil, signal, sys, time
def save(*_):
    {copies[begun]}
    sys.exit(130)
signal.signal(signal.SIGINT, save)
open({str(tmp_path / "started")!r}, "w")
time.sleep(60)
"""
    monkeypatch.setattr(one_run, "train_command", lambda *_: [sys.executable, "-c", code])
    job, requeued = Job(run), []

    def preempt(*_: Any) -> None:
        requeued.append(job.checkpoint())
        sys.exit(-1)

    before = signal.signal(signal.SIGUSR2, preempt)
    try:
        threading.Thread(target=kill_when, args=((tmp_path / "started").exists, signal.SIGUSR2)).start()
        with pytest.raises(SystemExit):
            job()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert read_state(run).status == "begun"  # it had saved before the job was queued again
    assert not (run.folder / FAILURE_NAME).exists()
    code = f"import shutil; {copies[whole]}"
    assert requeued[0].result() == "finished"
    assert read_state(run).status == "finished"
    assert Job(run)() == "finished before"


def test_a_job_whose_run_breaks_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = planned(tmp_path, "lr=1e-3", seeds=(1,))
    monkeypatch.setattr(one_run, "train_command", lambda *_: [sys.executable, "-c", "print('oh'); exit(5)"])
    with pytest.raises(RuntimeError, match="seed-1: exit status 5; last output: oh"):
        Job(run)()
    assert read_state(run).status == "broken"
