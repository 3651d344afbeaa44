"""What is made of rows and suites: the report, the proof, and the tables of profilers."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import prove
from bench.harness.rows import Row, write_rows
from bench.profile import target, top_kernels
from bench.report import figures
from bench.report import page as report

CPU = torch.device("cpu")


def a_row(**changes: Any) -> Row:
    fields = {"suite": "step", "case": "a case", "variant": "original", "phase": "step", "status": "exact"}
    fields |= {"rounds": 3, "median_ms": 10.0, "low_ms": 9.0, "high_ms": 11.0, "device": "a CPU", "commit": "c" * 40}
    return Row(**{**fields, "date": "2026-01-02T03:04:05+00:00", **changes})


# -- report


def test_report_shows_what_the_rows_say_and_nothing_else(tmp_path: Path) -> None:
    rows = [
        a_row(peak_extra_bytes=8_000_000, error=1e-6, error_bound=2e-6, speedup=1.0),
        a_row(variant="faster", median_ms=4.0, speedup=2.5, peak_extra_bytes=4_000_000),
        a_row(variant="wrong", median_ms=1.0, status="inexact", reason="losses: too large | far"),
        a_row(variant="elsewhere", median_ms=None, rounds=0, status="unavailable", reason="needs a CUDA device"),
        a_row(variant="big", median_ms=None, rounds=0, status="out of memory", reason="no room"),
    ]
    write_rows(rows, tmp_path / "one" / "step")
    write_rows([a_row(suite="rollout", case="B=8 steps=50", device="a GPU")], tmp_path / "two" / "rollout")
    assert report.main([str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in page.splitlines()}
    assert "2.50×" in lines["faster"]
    assert "×" not in lines["wrong"]
    assert "inexact" in lines["wrong"]
    assert "no room" in lines["big"]
    assert "elsewhere" not in lines
    assert page.index("## a CPU") < page.index("## a GPU")
    pictures = re.findall(r"\]\((.*?)\)", page)
    assert pictures == ["a-cpu-training-step.png", "a-cpu-memory.png", "a-gpu-rollout-latency.png"]
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_bars_have_the_heights_of_the_rows() -> None:
    drawn = figures.waterfall([a_row(), a_row(variant="faster", median_ms=4.0, speedup=2.5)])
    assert drawn is not None
    (axes,) = drawn.axes
    assert [bar.get_width() for bar in axes.patches] == [10.0, 4.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["original", "faster"]
    assert "2.50×" in axes.texts[1].get_text()


def test_report_refuses_what_is_not_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path)])
    assert "no .jsonl" in capsys.readouterr().err
    (tmp_path / "x.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path)])
    assert "x.jsonl, line 1" in capsys.readouterr().err


# -- prove


def python_part(name: str, code: str, seconds: float = 60.0, **changes: Any) -> prove.Part:
    return prove.Part(name, [sys.executable, "-c", code], seconds, **changes)


def test_proof_runs_each_part_once_and_repeats_what_has_not_passed(tmp_path: Path) -> None:
    note = f"open({str(tmp_path / 'ran')!r}, 'a').write"
    every = [
        python_part("good", f"print('hello'); {note}('g')"),
        python_part("bad", f"{note}('b'); raise SystemExit(3)"),
        python_part("elsewhere", f"{note}('e')", unavailable="needs a CUDA device"),
    ]
    proof = prove.Proof(tmp_path, {"quick": True})
    outcomes = prove.prove(proof, every, 100, tmp_path / "logs", say=lambda text: None)
    assert [o.status for o in outcomes.values()] == [prove.PASSED, prove.FAILED, prove.SKIPPED]
    assert outcomes["bad"].note == "exit status 3; see bad.log"
    assert "hello" in (tmp_path / "logs" / "good.log").read_text()
    again = prove.prove(prove.Proof(tmp_path, {"quick": True}), every, 100, tmp_path / "logs", say=lambda text: None)
    assert (tmp_path / "ran").read_text() == "gbb"
    assert {name: o.status for name, o in again.items()} == {name: o.status for name, o in outcomes.items()}
    with pytest.raises(ValueError, match="was begun with"):
        prove.Proof(tmp_path, {"quick": False})


def test_part_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    )
    code += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(600)"
    outcome = prove.run_part(python_part("slow", code), 3.0, tmp_path / "slow.log")
    assert outcome.status == prove.OUT_OF_TIME
    assert outcome.seconds < 60
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not _is_running(child):
            break
        time.sleep(0.1)
    assert not _is_running(child)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie, which nobody has collected yet, runs no more.
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_when_the_time_is_over_the_other_parts_wait_for_the_next_call(tmp_path: Path) -> None:
    every = [python_part("late", "pass"), python_part("elsewhere", "pass", unavailable="needs a CUDA device")]
    outcomes = prove.prove(prove.Proof(tmp_path, {}), every, 0.0, tmp_path / "logs", say=lambda text: None)
    assert [o.status for o in outcomes.values()] == [prove.PENDING, prove.SKIPPED]
    again = prove.prove(prove.Proof(tmp_path, {}), every, 100.0, tmp_path / "logs", say=lambda text: None)
    assert again["late"].status == prove.PASSED


def test_parts_of_a_cpu_skip_what_needs_a_gpu_with_the_reason(tmp_path: Path) -> None:
    every = {part.name: part for part in prove.parts(tmp_path, CPU, quick=True)}
    for name in ("tests marked gpu", "op tests", "compute-sanitizer", "tune", "ncu"):
        assert every[name].unavailable == "needs a CUDA device"
    for name in ("projected_losses", "layers", "rollout", "step", "eval", "train", "report"):
        assert every[name].unavailable is None
    assert list(every)[-1] == "report"
    on_gpu = {part.name: part for part in prove.parts(tmp_path, torch.device("cuda"), quick=False)}
    files = [Path(word).name for word in on_gpu["op tests"].command if word.endswith(".py")]
    assert {"test_batch_norm.py", "test_moments.py", "test_projected_losses.py", "test_fused_networks.py"} <= set(files)
    assert sum(part.seconds for part in on_gpu.values() if part.name != "train") <= 600  # limits; most end far sooner


def test_a_test_that_is_missing_ends_the_proof_and_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prove, "_KERNEL_TESTS", ("batch_norm", "no_such_op"))
    with pytest.raises(SystemExit) as ended:
        prove.main(["--device", "cpu", "--quick", "--out", str(tmp_path / "proof")])
    assert ended.value.code == 2
    assert "test_no_such_op.py is to be proved, but there is no such file" in capsys.readouterr().err
    assert not (tmp_path / "proof").exists()  # nothing was begun


def test_a_proof_fails_if_a_part_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, status in (("pass", 0), ("raise SystemExit(1)", 1)):
        monkeypatch.setattr(prove, "parts", lambda *_, code=code: [python_part("only", code)])
        assert prove.main(["--device", "cpu", "--quick", "--out", str(tmp_path / str(status))]) == status
        saved = json.loads((tmp_path / str(status) / "environment.json").read_text())
        assert saved["versions"]["torch"] == torch.__version__


# -- profile


def test_top_kernels_of_an_nsys_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.csv"
    path.write_text(
        "Processing [step.sqlite] with [cuda_gpu_kern_sum.py]...\n\n"
        "Time (%),Total Time (ns),Instances,Avg (ns),Name\n"
        "20.0,2000000,4,500000.0,_batch_norm_grad_kernel\n"
        '80.0,8000000,2,4000000.0,"void cutlass::gemm<float, (int)2>(cutlass::Params<float>, int)"\n'
    )
    assert top_kernels.main([str(path), "--count", "1"]) == 0
    line = capsys.readouterr().out.splitlines()[2].split()
    assert line[:5] == ["80.0", "80.0", "8.000", "2", "4000.0"]
    assert top_kernels.main([str(path), "--regex"]) == 0
    expression = capsys.readouterr().out.strip()
    assert [bool(re.match(expression, name)) for name in ("gemm", "_batch_norm_grad_kernel", "gemm2")] == [1, 1, 0]
    path.write_text("no table\n")
    with pytest.raises(SystemExit, match="2"):
        top_kernels.main([str(path)])


def test_profile_target_writes_a_table_that_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "kernels.csv"
    flags = ["--device", "cpu", "--quick", "--steps", "1", "--variant", "closed-form losses"]
    assert target.main([*flags, "--kernels", str(path)]) == 0
    kernels = top_kernels.read_kernels(path)
    assert any("convolution" in kernel.name for kernel in kernels[:3])  # they are the most work
    with pytest.raises(SystemExit, match="2"):
        target.main(flags)  # nothing for nsys to watch
