"""What is made of rows: the report, and the tables of profilers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bench.harness.rows import Row, write_rows
from bench.profile import target, top_kernels
from bench.report import figures
from bench.report import page as report


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


def test_estimates_are_a_table_that_says_so(tmp_path: Path) -> None:
    parts = {"roofline_us": 1.25, "issue_us": 0.5, "estimate_us": 2.75}
    counted = {"suite": "convolution", "median_ms": None, "rounds": 0, "status": "counted", "reason": "estimated"}
    rows = [
        a_row(**counted, case="estimate of a step", phase="conv1", quality={**parts, "programs": 128.0}),
        a_row(**counted, case="estimate of a step", phase="all", quality=parts),
        a_row(suite="convolution", case="conv1 B=1", variant="measured"),
    ]
    write_rows(rows, tmp_path / "convolution")
    assert report.main([str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    assert "| estimate of a step | original | conv1 | 128 | 1.25 | 0.50 | 2.75 |" in page
    assert "| estimate of a step | original | all |  | 1.25 | 0.50 | 2.75 |" in page
    assert page.count("estimate, not measured") == 1
    assert "**conv1 B=1**" in page
    assert "**estimate of a step**" not in page


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
