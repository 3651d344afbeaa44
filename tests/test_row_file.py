"""Rows that are written while they are measured: none is lost, none is measured twice, and a dead process is blamed."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from bench.harness import suite
from bench.harness.case import Case
from bench.harness.kept import Kept
from bench.harness.row_file import RowFile
from bench.harness.rows import Row, read_rows
from bench.harness.run import DeviceLostError, run_case
from bench.harness.session import Session, Settings
from bench.harness.variants import Tensors, Variant, eager, needs_cuda
from fastjepa.environment import Environment
from fastjepa.policy import Error

CPU = torch.device("cpu")
ENVIRONMENT = Environment("python -m bench toy", "abc", False, "2026-01-02T03:04:05+00:00", "a CPU", "", 1, {})
SETTINGS = Settings(warmup=0, rounds=2, least=2, memory=False)


def inputs(device: torch.device, dtype: torch.dtype) -> Tensors:
    return {"x": torch.arange(1.0, 5.0, dtype=torch.float64).to(device, dtype)}


def double(tensors: Tensors) -> Tensors:
    return {"y": 2 * tensors["x"]}


def third(tensors: Tensors) -> Tensors:
    return {"y": tensors["x"] / 3}


def toy_case(name: str = "a case", truth: object = double) -> Case:
    return Case(
        "toy",
        name,
        inputs,
        truth,
        lambda phase, dtype: None,
        "eager",
        {"fp32": "eager", "bf16": "eager bf16"},  # type: ignore[arg-type]
    )


def a_row(variant: str, **changes: object) -> Row:
    fields = {"suite": "toy", "case": "a case", "variant": variant, "phase": "forward", "status": "exact", "rounds": 3}
    return Row(**{**fields, "median_ms": 1.5, **changes})  # type: ignore[arg-type]


def failed(variant: str, reason: str = "unknown") -> Row:
    return a_row(variant, status="failed", reason=reason, median_ms=None, rounds=0)


def test_every_variant_is_on_disk_before_the_next_begins(tmp_path: Path) -> None:
    file, seen = RowFile(tmp_path, "toy"), []

    def before(rows: list[Row]) -> None:
        seen.append(([row.variant for row in file.rows()], rows[0].variant))
        file.begin(rows)
        assert file.running() == f"a case: {rows[0].variant}"

    variants = [eager(double), eager(double, "second"), eager(double, "third")]
    run_case(toy_case(), variants, CPU, ENVIRONMENT, SETTINGS, before=before, after=file.add)
    assert seen == [([], "eager"), (["eager"], "second"), (["eager", "second"], "third")]
    assert file.running() is None
    assert read_rows(tmp_path / "toy.jsonl") == file.rows()


def test_what_has_rows_is_not_measured_again_and_still_serves_as_the_baseline() -> None:
    calls = []

    def counted(tensors: Tensors) -> Tensors:
        calls.append("eager")
        return double(tensors)

    variants = [eager(counted), eager(double, "second")]
    (row,) = run_case(toy_case(), variants, CPU, ENVIRONMENT, SETTINGS, measured={"eager": True})
    assert (row.variant, row.status, row.baseline) == ("second", "exact", "eager")
    assert row.baseline_ms is not None
    assert calls
    calls.clear()
    (row,) = run_case(toy_case(), variants, CPU, ENVIRONMENT, SETTINGS, measured={"eager": False})
    assert (row.status, row.speedup, calls) == ("exact", None, [])  # a baseline that has failed is not tried again


def test_a_process_that_died_is_blamed_with_the_reason(tmp_path: Path) -> None:
    file = RowFile(tmp_path, "toy")
    file.add([a_row("eager")])
    file.begin([failed("bad")])
    assert file.running_seconds() < 60
    assert file.blame("ended by SIGABRT") == "a case: bad"
    assert [(row.variant, row.status, row.reason) for row in file.rows()] == [
        ("eager", "exact", ""),
        ("bad", "failed", "ended by SIGABRT"),
    ]
    assert file.blame("again") is None
    assert (file.running(), file.running_seconds()) == (None, 0.0)


def test_a_torn_note_of_what_is_running_blames_nobody(tmp_path: Path) -> None:
    file = RowFile(tmp_path, "toy")
    for text in ("", "{", "[1]", '[{"suite": "toy"}]', "{}"):
        (tmp_path / "toy.now.json").write_text(text)
        assert file.running() is None
        assert file.blame("nobody") is None
        assert file.rows() == []


def test_rows_are_replaced_in_their_place(tmp_path: Path) -> None:
    file = RowFile(tmp_path, "toy")
    file.add([a_row("one"), a_row("two")])
    file.add([a_row("one", median_ms=9.0)])
    assert [(row.variant, row.median_ms) for row in file.rows()] == [("one", 9.0), ("two", 1.5)]


def test_only_what_failed_is_forgotten_on_request(tmp_path: Path) -> None:
    file = RowFile(tmp_path, "toy")
    file.add([a_row("good"), failed("bad"), a_row("off", status="inexact", reason="y: too large")])
    assert file.measured("a case") == {"good": True, "bad": False, "off": True}
    assert file.forget() == 2
    assert file.measured("a case") == {"good": True}


# -- the truth, and eager's errors


def test_truth_and_errors_are_computed_once_and_kept(tmp_path: Path) -> None:
    calls = []

    def counted(tensors: Tensors) -> Tensors:
        calls.append(tensors["x"].dtype)
        return third(tensors)

    half = {"precision": "bf16", "dtype": torch.bfloat16}
    variants = [Variant("eager", lambda _: third), Variant("eager bf16", lambda _: third, **half)]  # type: ignore[arg-type]
    fused = Variant("fused bf16", lambda _: third, **half)  # type: ignore[arg-type]
    for expected in (2, 2):  # in fp32 and bf16 once each; then not at all
        rows = run_case(
            toy_case(truth=counted), [fused], CPU, ENVIRONMENT, SETTINGS,
            known=[*variants, fused], kept=Kept(tmp_path / "kept"),
        )  # fmt: skip
        assert [row.status for row in rows] == ["exact"]
        run_case(toy_case(truth=counted), variants[:1], CPU, ENVIRONMENT, SETTINGS, kept=Kept(tmp_path / "kept"))
        assert len(calls) == expected


def test_kept_tensors_that_are_torn_or_of_other_code_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept(tmp_path)
    kept.keep_tensors("x", {"y": torch.ones(2)})
    kept.keep_errors("e", {"forward": {"y": Error(0.5, torch.bfloat16)}})
    assert torch.equal((kept.tensors("x", CPU) or {})["y"], torch.ones(2))
    assert kept.errors("e") == {"forward": {"y": Error(0.5, torch.bfloat16)}}
    assert kept.tensors("e", CPU) is None
    assert kept.errors("x") is None
    monkeypatch.setattr("bench.harness.kept.source_digest", lambda: "other")
    assert kept.tensors("x", CPU) is None
    monkeypatch.undo()
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    assert kept.tensors("x", CPU) is None
    assert kept.errors("e") is None
    nowhere = Kept(None)
    nowhere.keep_tensors("x", {"y": torch.ones(2)})
    assert nowhere.tensors("x", CPU) is None


def test_a_precision_is_judged_by_its_eager_variant_though_that_one_was_not_asked_for() -> None:
    half = {"precision": "bf16", "dtype": torch.bfloat16}
    known = [eager(third), Variant("eager bf16", lambda _: third, **half), Variant("fused", lambda _: third, **half)]  # type: ignore[arg-type]
    (row,) = run_case(toy_case(truth=third), known[2:], CPU, ENVIRONMENT, SETTINGS, known=known)
    assert row.status == "exact"
    assert (row.error or 0) > 1e-4


def test_a_case_without_a_truth_is_unjudged() -> None:
    (row,) = run_case(toy_case(truth=None), [eager(double)], CPU, ENVIRONMENT, SETTINGS)
    assert (row.status, row.reason, row.error) == ("unjudged", "there is nothing that it must equal", None)


def test_a_lost_device_ends_the_process_after_the_row_of_the_one_who_lost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(tensors: Tensors) -> Tensors:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Session, "_device_problem", lambda self: "CUDA error: an illegal memory access")
    file = RowFile(tmp_path, "toy")
    variants = [eager(double), eager(broken, "broken"), eager(double, "innocent")]
    with pytest.raises(DeviceLostError, match="broken has left the device unusable"):
        run_case(toy_case(), variants, CPU, ENVIRONMENT, SETTINGS, before=file.begin, after=file.add)
    assert {row.variant: row.status for row in file.rows()} == {"eager": "exact", "broken": "failed"}
    monkeypatch.undo()
    run_case(
        toy_case(), variants, CPU, ENVIRONMENT, SETTINGS,
        measured=file.measured("a case"), before=file.begin, after=file.add,
    )  # fmt: skip
    assert {row.variant: row.status for row in file.rows()}["innocent"] == "exact"


def test_a_command_given_again_measures_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = suite.make_parser("toy", "A toy.")
    calls: list[str] = []

    def run(*flags: str) -> int:
        argv = ["--device", "cpu", "--quick", "--no-memory", "--out", str(tmp_path), *flags]
        options = suite.resolve("toy", parser, parser.parse_args(argv), argv)

        def counted(name: str) -> Variant:
            def function(tensors: Tensors) -> Tensors:
                calls.append(name)
                return double(tensors)

            return Variant(name, lambda _: function)

        return suite.run(options, parser, [(toy_case(), [counted("eager"), counted("other")])])

    assert run("--variant", "eager") == 0
    assert set(calls) == {"eager"}
    first = read_rows(tmp_path / "toy.jsonl")
    assert run("--missing") == 0
    assert [row.variant for row in read_rows(tmp_path / "toy.jsonl")] == ["eager", "other"]
    assert read_rows(tmp_path / "toy.jsonl")[0] == first[0]
    calls.clear()
    assert run("--missing") == 0
    assert calls == []
    assert run() == 0  # without the flag everything is measured again
    assert set(calls) == {"eager", "other"}
    assert json.loads((tmp_path / "toy.jsonl").read_text().splitlines()[0])["variant"] == "eager"
    alone = ["--device", "cpu", "--missing"]
    with pytest.raises(SystemExit, match="2"):
        suite.resolve("toy", parser, parser.parse_args(alone), alone)
    assert "--missing needs --out" in capsys.readouterr().err


# -- what is nobody's fault


def test_a_truth_that_cannot_be_had_fails_no_variant() -> None:
    def broken(tensors: Tensors) -> Tensors:
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    rows = run_case(toy_case(truth=broken), [eager(double), eager(double, "second")], CPU, ENVIRONMENT, SETTINGS)
    assert [row.status for row in rows] == ["unjudged", "unjudged"]
    assert all(row.median_ms is not None and row.baseline_ms is not None for row in rows)
    assert rows[0].reason.startswith("no memory for the float64 reference (RuntimeError: GET was unable")


class Hungry:
    """While one of these is alive and has been called, there is no memory for anybody else."""

    alive: ClassVar[weakref.WeakSet[Hungry]] = weakref.WeakSet()

    def __call__(self, tensors: Tensors) -> Tensors:
        Hungry.alive.add(self)
        return double(tensors)


def test_a_baseline_without_room_beside_one_variant_is_tried_again_beside_the_next() -> None:
    def baseline(tensors: Tensors) -> Tensors:
        if len(Hungry.alive):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return double(tensors)

    variants = [eager(baseline), Variant("hungry", lambda _: Hungry()), eager(double, "frugal")]
    rows = {row.variant: row for row in run_case(toy_case(), variants, CPU, ENVIRONMENT, SETTINGS)}
    assert (rows["hungry"].status, rows["hungry"].speedup) == ("exact", None)
    assert rows["frugal"].speedup is not None


def test_where_zeros_would_pass_nothing_is_exact() -> None:
    def far_off(tensors: Tensors) -> Tensors:
        return {"y": 1.6 * double(tensors)["y"]}

    half = {"precision": "bf16", "dtype": torch.bfloat16}
    known = [eager(double), Variant("eager bf16", lambda _: far_off, **half)]  # type: ignore[arg-type]
    known.append(Variant("zeros", lambda _: lambda x: {"y": torch.zeros_like(x["x"])}, **half))  # type: ignore[arg-type]
    (row,) = run_case(toy_case(), known[2:], CPU, ENVIRONMENT, SETTINGS, known=known)
    assert row.status == "unjudged"
    assert "zeros would pass" in row.reason


def test_variants_of_two_precisions_on_the_same_inputs_share_one_truth() -> None:
    calls = []

    def counted(tensors: Tensors) -> Tensors:
        calls.append(1)
        return double(tensors)

    def single(device: torch.device, dtype: torch.dtype) -> Tensors:
        return inputs(device, torch.float32)  # as in mixed precision

    case = replace(toy_case(truth=counted), make_inputs=single)
    half = {"precision": "bf16", "dtype": torch.bfloat16}
    run_case(case, [eager(double), Variant("eager bf16", lambda _: double, **half)], CPU, ENVIRONMENT, SETTINGS)  # type: ignore[arg-type]
    assert len(calls) == 1


def test_variants_asked_for_by_name_that_cannot_run_are_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    parser = suite.make_parser("toy", "A toy.")
    elsewhere = eager(double, "kernel")
    elsewhere = replace(elsewhere, available=needs_cuda)
    for names, status in ((["kernel"], suite.VARIANT_FAILED), (["eager", "kernel"], 0)):
        argv = ["--device", "cpu", "--quick", "--no-memory", "--variant", *names]
        options = suite.resolve("toy", parser, parser.parse_args(argv), argv)
        assert suite.run(options, parser, [(toy_case(), [eager(double), elsewhere])]) == status
    assert "none of the variants asked for can run here: kernel" in capsys.readouterr().err
