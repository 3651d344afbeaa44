"""The proof, rehearsed: variants that crash, hang, lie or exhaust memory cost themselves; a kill costs one variant."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.harness.row_file import RowFile
from bench.harness.rows import Row, read_rows, write_rows
from bench.prove import archive, card, command, supervise
from bench.prove import parts as prove_parts
from bench.prove.parts import Part
from bench.prove.proof import FAILED, OUT_OF_TIME, PASSED, PENDING, SKIPPED, Outcome, Proof
from bench.recipe import GRAPH
from bench.step import COMPILED, ORIGINAL
from fastjepa.environment import ROOT
from fastjepa.sweeping.child_process import Ended
from stand_in_suite import KINDS

CPU = torch.device("cpu")
STAND_IN = Path(__file__).parent / "stand_in_suite.py"


def a_row(**changes: Any) -> Row:
    fields = {"suite": "step", "case": "a case", "variant": ORIGINAL, "phase": "step", "status": "exact"}
    fields |= {"rounds": 3, "median_ms": 10.0, "low_ms": 9.0, "high_ms": 11.0, "device": "a CPU", "commit": "c" * 40}
    return Row(**{**fields, "date": "2026-01-02T03:04:05+00:00", **changes})


def python_part(name: str, code: str, seconds: float = 60.0, **changes: Any) -> Part:
    return Part(name, [sys.executable, "-c", code], seconds, **changes)


def suite_part(folder: Path, *flags: str, seconds: float = 300.0, variant_seconds: float = 6.0) -> Part:
    words = [sys.executable, str(STAND_IN), "--device", "cpu", "--quick", "--no-memory", "--out", str(folder)]
    words += ["--missing", "--keep", str(folder / "kept"), *flags]
    variables = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(STAND_IN.parent)]), "OMP_NUM_THREADS": "1"}
    variables |= {"STAND_IN_LOG": str(folder / "built")}
    return Part("stand-in", words, seconds, "stand_in", variant_seconds, variables=variables)


def quiet(text: str) -> None:
    """Say nothing."""


# -- parts that are commands


def test_each_command_runs_once_and_what_has_not_passed_is_repeated(tmp_path: Path) -> None:
    note = f"open({str(tmp_path / 'ran')!r}, 'a').write"
    every = [
        python_part("good", f"print('hello'); {note}('g')"),
        python_part("bad", f"{note}('b'); raise SystemExit(3)"),
        python_part("elsewhere", f"{note}('e')", unavailable="needs a CUDA device"),
        python_part("sum", f"{note}('s')", again=True),
    ]
    proof = Proof(tmp_path, {"quick": True})
    supervise.prove(proof, every, 100, say=quiet)
    assert [o.status for o in proof.outcomes.values()] == [PASSED, FAILED, SKIPPED, PASSED]
    assert proof.outcomes["bad"].note == "exit status 3; see logs/bad.log"
    assert "hello" in (tmp_path / "logs" / "good.log").read_text()
    again = Proof(tmp_path, {"quick": True})
    supervise.prove(again, every, 100, say=quiet)
    assert (tmp_path / "ran").read_text() == "gbsbs"
    assert {n: o.status for n, o in again.outcomes.items()} == {n: o.status for n, o in proof.outcomes.items()}
    with pytest.raises(ValueError, match="was begun with"):
        Proof(tmp_path, {"quick": False})


def test_a_damaged_memory_of_a_proof_is_refused_with_its_name(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", '{"settings": {}, "parts": {"x": {"color": 1}}}'):
        (tmp_path / "prove.json").write_text(text)
        with pytest.raises(ValueError, match=r"prove\.json"):
            Proof(tmp_path, {})


def test_a_command_that_takes_too_long_is_ended_and_its_last_words_are_kept(tmp_path: Path) -> None:
    part = python_part("slow", "import time; print('still here', flush=True); time.sleep(600)", seconds=5.0)
    outcome = supervise.run_part(part, 5.0, tmp_path)
    assert outcome.status == OUT_OF_TIME
    assert "KeyboardInterrupt" in outcome.note
    assert "still here" in (tmp_path / "logs" / "slow.log").read_text()


def test_a_program_that_is_not_there_is_a_failure_with_its_name(tmp_path: Path) -> None:
    outcome = supervise.run_part(Part("x", ["/no/such/program"], 5.0), 5.0, tmp_path)
    assert (outcome.status, "/no/such/program" in outcome.note) == (FAILED, True)


def test_when_the_time_is_over_the_other_parts_wait_for_the_next_call(tmp_path: Path) -> None:
    every = [python_part("late", "pass"), python_part("elsewhere", "pass", unavailable="needs a CUDA device")]
    every.append(python_part("sum", "pass", again=True))
    proof = Proof(tmp_path, {})
    supervise.prove(proof, every, 0.0, say=quiet)
    assert [o.status for o in proof.outcomes.values()] == [PENDING, SKIPPED, PASSED]
    supervise.prove(proof, every, 100.0, say=quiet)
    assert proof.outcomes["late"].status == PASSED


# -- parts that are suites


def expect_all(rows: list[Row]) -> None:
    for name in ("one", "two"):
        found = {row.variant: row for row in rows if row.case == name}
        assert set(found) == set(KINDS)
        status = {kind: row.status for kind, row in found.items()}
        assert [status[kind] for kind in ("good", "slow", "last")] == ["exact"] * 3
        assert [status[kind] for kind in ("abort", "hang", "raise", "exit")] == ["failed"] * 4
        assert (status["wrong"], status["out of memory"]) == ("inexact", "out of memory")
        assert found["abort"].reason == "ended by SIGABRT; last output: about to abort"
        assert "its time was over" in found["hang"].reason
        assert found["raise"].reason == "RuntimeError: a launch failure"
        assert found["exit"].reason.startswith("exit status 7")
        assert "Tried to allocate" in found["out of memory"].reason
        assert found["slow"].speedup is not None
        assert found["slow"].speedup < 1
        assert found["wrong"].speedup is None
        assert found["last"].baseline_ms is not None


def test_whatever_a_variant_does_costs_that_variant_only(tmp_path: Path) -> None:
    part = suite_part(tmp_path)
    outcome = supervise.run_part(part, 300.0, tmp_path)
    rows = read_rows(tmp_path / "stand_in.jsonl")
    expect_all(rows)
    assert outcome.status == FAILED
    assert "failed: abort, exit, hang, raise; inexact: wrong" in outcome.note
    # A second call finds nothing missing and builds nothing.
    built = (tmp_path / "built").read_text()
    supervise.run_part(part, 300.0, tmp_path)
    assert (tmp_path / "built").read_text() == built
    assert read_rows(tmp_path / "stand_in.jsonl") == rows


def test_on_request_what_did_not_succeed_is_measured_again_and_nothing_else(tmp_path: Path) -> None:
    part = suite_part(tmp_path, "--variant", "good", "wrong", "out of memory")
    proof = Proof(tmp_path, {})
    supervise.prove(proof, [part], 300.0, say=quiet)
    assert proof.outcomes["stand-in"].status == PASSED  # neither is a failure of the part
    (tmp_path / "built").unlink()
    command.forget_failures(proof, [part])
    supervise.prove(proof, [part], 300.0, say=quiet)
    assert {row.variant for row in read_rows(tmp_path / "stand_in.jsonl")} == {"good", "wrong", "out of memory"}
    built = (tmp_path / "built").read_text().split("\n")
    assert built.count("wrong") == built.count("out of memory") == 2  # once for each case


def test_a_time_that_is_over_blames_nobody_and_the_next_call_goes_on(tmp_path: Path) -> None:
    part = suite_part(tmp_path, "--variant", "good", "hang", variant_seconds=600.0)
    outcome = supervise.run_part(part, 8.0, tmp_path)
    assert outcome.status == OUT_OF_TIME
    assert "failed" not in [row.status for row in RowFile(tmp_path, "stand_in").rows()]
    outcome = supervise.run_part(suite_part(tmp_path, "--variant", "good", "last"), 300.0, tmp_path)
    assert outcome.status == PASSED
    assert {row.variant for row in read_rows(tmp_path / "stand_in.jsonl")} == {"good", "last"}


def test_a_suite_that_cannot_even_start_is_a_failure(tmp_path: Path) -> None:
    outcome = supervise.run_part(suite_part(tmp_path, "--variant", "magic"), 60.0, tmp_path)
    assert outcome.status == FAILED
    assert "'magic' is not one of" in outcome.note


_KILLED = """
import sys
from pathlib import Path
from bench.prove import supervise
from bench.prove.proof import Proof
from test_bench_prove import suite_part
folder = Path(sys.argv[1])
part = suite_part(folder, "--variant", "good", "wrong", "out of memory", "slow", "last", variant_seconds=60.0)
supervise.prove(Proof(folder, {}), [part], 300.0)
"""


def begin_anew(folder: Path) -> None:
    for path in ("stand_in.jsonl", "stand_in.csv", "prove.json"):
        (folder / path).unlink(missing_ok=True)


def test_rows_survive_kills_at_any_moment(tmp_path: Path) -> None:
    """Twenty kills, at moments from before the first import to after the last row."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(STAND_IN.parent)])}
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], cwd=ROOT, env=environment, check=True, timeout=300)
    whole = time.monotonic() - started
    begin_anew(tmp_path)
    random.seed(9)
    before: list[Row] = []
    kills = 0
    for _ in range(60):
        if kills == 20:
            break
        process = subprocess.Popen(
            [sys.executable, "-c", _KILLED, str(tmp_path)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=random.uniform(0.0, whole))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        rows = RowFile(tmp_path, "stand_in").rows()  # whole and valid, whenever the kill came
        assert rows[: len(before)] == before  # nothing that was measured is lost or measured again
        before = rows
        if len(rows) == 10:  # all there: begin anew, so that kills find something to hit
            begin_anew(tmp_path)
            before = []
    assert kills == 20
    subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], cwd=ROOT, env=environment, check=True, timeout=300)
    rows = read_rows(tmp_path / "stand_in.jsonl")
    assert {(row.case, row.variant): row.status for row in rows} == {
        (case, kind): status
        for case in ("one", "two")
        for kind, status in {
            "good": "exact", "wrong": "inexact", "out of memory": "out of memory", "slow": "exact", "last": "exact"
        }.items()
    }  # fmt: skip


def test_a_variant_that_ends_while_it_is_asked_to_leaves_no_blame_on_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has taken too long, and writes its rows after all; what its process has begun then is not to blame."""
    file, calls = RowFile(tmp_path, "stand_in"), []

    def failed(variant: str) -> Row:
        return a_row(suite="stand_in", variant=variant, status="failed", reason="?", median_ms=None, rounds=0)

    def run_child(*_: object, overdue: Any, **__: object) -> Ended:
        calls.append(file.running())
        if len(calls) > 1:
            file.clear()
            return Ended(0, 1.0, "")
        file.begin([failed("slow")])
        os.utime(tmp_path / "stand_in.now.json", (0, 0))
        assert overdue()
        file.add([a_row(suite="stand_in", variant="slow")])
        file.begin([failed("innocent")])
        return Ended(None, 1.0, "")

    monkeypatch.setattr(supervise, "run_child", run_child)
    outcome = supervise.run_part(suite_part(tmp_path), 60.0, tmp_path)
    assert calls == [None, None]  # the second child finds nothing half done
    assert {row.variant: row.status for row in file.rows()} == {"slow": "exact"}
    assert outcome.status == PASSED


def test_the_default_folder_is_one_begun_with_the_same_code_or_a_new_one(tmp_path: Path) -> None:
    first = command.default_folder(tmp_path, "gpu", {"code": "a"})
    for folder, code in ((first, "a"), (tmp_path / f"{first.name}-2", "b")):
        Proof(folder, {"code": code}).note("x", Outcome(PASSED))
        (folder / "environment.json").write_text("{}")
    assert command.default_folder(tmp_path, "gpu", {"code": "a"}) == first
    assert command.default_folder(tmp_path, "gpu", {"code": "b"}).name == f"{first.name}-2"
    assert command.default_folder(tmp_path, "gpu", {"code": "c"}).name == f"{first.name}-3"


# -- the list of parts


def test_parts_of_a_cpu_skip_what_needs_a_gpu_with_the_reason(tmp_path: Path) -> None:
    every = {part.name: part for part in prove_parts.parts(tmp_path, CPU, quick=True)}
    for name in ("tests marked gpu", "kernel tests", "compute-sanitizer batch_norm", "tune", "ncu"):
        assert every[name].unavailable == "needs a CUDA device"
    for name in ("ceilings", "step", "checks", "rollout", "projected_losses", "layers", "eval", "train", "report"):
        assert every[name].unavailable is None
    assert list(every)[-1] == "report"


def test_parts_of_a_gpu_come_in_order_of_value_and_every_op_is_sanitized(tmp_path: Path) -> None:
    every = {part.name: part for part in prove_parts.parts(tmp_path, torch.device("cuda"), quick=False)}
    order = list(every)
    wanted = [
        "ceilings",
        "step",
        "checks",
        "rollout",
        "projected_losses",
        "layers",
        "train",
        "ceilings of convolutions",  # a minute and a quarter, on an H100
        "ncu",
        "step, all variants",
    ]
    assert [name for name in order if name in wanted] == wanted
    assert {name for name in order if name.startswith("compute-sanitizer")} == {
        f"compute-sanitizer {op}" for op in prove_parts.OPS
    }
    headline = every["step"].command[every["step"].command.index("--variant") + 1 :][: len(prove_parts.HEADLINE)]
    assert tuple(headline) == (ORIGINAL, "TF32", "bf16, channels-last", "fused blocks", GRAPH)
    assert {"--backend", "fused", "--cuda_graph", "on"} <= set(every["train"].command)
    files = [Path(word).name for word in every["kernel tests"].command if word.endswith(".py")]
    assert {"test_batch_norm.py", "test_moments.py", "test_projected_losses.py", "test_fused_networks.py"} <= set(files)
    for part in every.values():
        assert part.suite is None or "--missing" in part.command
        # Else a variant that hangs would be what the part ends with, call after call, and never be blamed.
        assert part.suite is None or part.seconds >= 2 * part.variant_seconds + 30


def test_variants_named_in_the_parts_exist(tmp_path: Path) -> None:
    from bench import layers, moments, projected_losses, rollout, step
    from bench.recipe import Recipe

    known = {
        "step": step.make_variants(Recipe(), torch.device("cuda")),
        "rollout": rollout.make_variants(Recipe(), 8),
        "projected_losses": projected_losses.make_variants(),
    }
    known["moments"] = next(iter(moments.plans(Recipe())))[1]
    known["layers"] = next(iter(layers.plans(Recipe())))[1]
    checked = 0
    for part in prove_parts.parts(tmp_path, torch.device("cuda"), quick=False):
        if part.suite in known and "--variant" in part.command:
            rest = list(part.command[part.command.index("--variant") + 1 :])
            named = rest[: next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))]
            assert set(named) <= {variant.name for variant in known[part.suite]}
            checked += 1
    assert checked == 5


def test_a_part_that_needs_a_missing_package_is_skipped_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("cv2", "tyro") else found(name))
    every = {part.name: part for part in prove_parts.parts(tmp_path, CPU, quick=True)}
    assert every["train"].unavailable == "not installed: opencv-python-headless, tyro"
    assert every["step"].unavailable is None


def test_a_test_that_is_missing_ends_the_proof_and_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prove_parts, "_KERNEL_TESTS", ("batch_norm", "no_such_op"))
    with pytest.raises(SystemExit) as ended:
        command.main(["--device", "cpu", "--quick", "--out", str(tmp_path / "proof")])
    assert ended.value.code == 2
    assert "test_no_such_op.py is to be proved, but there is no such file" in capsys.readouterr().err
    assert not (tmp_path / "proof").exists()  # nothing was begun


def test_a_proof_fails_if_a_part_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, status in (("pass", 0), ("raise SystemExit(1)", 1)):
        monkeypatch.setattr(command, "parts", lambda *_, code=code: [python_part("only", code)])
        assert command.main(["--device", "cpu", "--quick", "--out", str(tmp_path / str(status))]) == status
        saved = json.loads((tmp_path / str(status) / "environment.json").read_text())
        assert saved["versions"]["torch"] == torch.__version__
        assert (tmp_path / str(status) / f"{status}.tar.gz").is_file()


# -- the card and the archive


def test_the_card_says_what_the_rows_say_and_states_no_ratio_without_exactness(tmp_path: Path) -> None:
    half = {"precision": "bf16", "peak_extra_bytes": 9_900_000_000}
    rows = [
        a_row(median_ms=600.0, speedup=1.0),
        a_row(variant=GRAPH, median_ms=60.0, speedup=10.0, baseline=ORIGINAL, peak_extra_bytes=20_000),
        a_row(variant=COMPILED, median_ms=150.0, speedup=4.0, baseline=ORIGINAL, given="each thing once", **half),
        a_row(variant="fused blocks", median_ms=70.0, speedup=8.6, baseline=ORIGINAL, **half),
        a_row(suite="rollout", case="B=1 steps=8", variant="fast", phase="rollout", median_ms=0.5, speedup=8.0),
        a_row(suite="rollout", case="B=1 steps=8", variant="off", phase="rollout", median_ms=0.1,
              status="inexact", reason="frames: error"),
        a_row(suite="train", variant="fused bf16", phase="step 9", status="unjudged", reason="a run",
              quality={"mAP": 0.61, "seconds": 118.0, "epoch": 4.5}),
        a_row(suite="checks", case="c1", variant="fused"),
        a_row(suite="checks", case="c1", variant="fused bf16", status="failed", reason="x", median_ms=None, rounds=0),
    ]  # fmt: skip
    proof = Proof(tmp_path, {})
    proof.note("tune", Outcome(SKIPPED, note="needs a CUDA device"))
    lines = card.card(rows, proof)
    text = card.render("title", lines)
    values = {line.what: line.value for line in lines}
    assert values["training step, original"] == "600.0 ms"
    assert values[f"training step, {GRAPH}"] == "60.0 ms"
    assert values[f"{GRAPH} against torch.compile"] == "2.50x"
    assert values["peak memory of a step"] == "9.9 GB"
    assert values["rollout B=1 steps=8"] == "0.50 ms"
    assert values["mAP"] == "0.610"
    assert values["checks passed"] == "1 of 2"
    assert "c1, fused bf16: failed" in text
    assert "10.00x original" in text
    assert "each thing once" in text
    assert "tune (needs a CUDA device)" in text
    wrong = [a_row(variant=GRAPH, median_ms=1.0, status="inexact", reason="losses: error 1 exceeds 0.1", **half)]
    assert "10.00x" not in card.render("t", card.card(wrong, proof))
    assert "losses: error 1 exceeds 0.1" in card.render("t", card.card(wrong, proof))
    pytest.importorskip("matplotlib")
    card.draw("title", lines, tmp_path / "card.png")
    assert (tmp_path / "card.png").read_bytes().startswith(b"\x89PNG")


def test_the_archive_has_rows_and_logs_and_stays_small(tmp_path: Path) -> None:
    folder = tmp_path / "proof"
    write_rows([a_row()], folder / "step")
    for name, size in (
        ("run/latest.pth.tar", 10),
        ("kept/truth.pt", 10),
        ("noise.png", 400_000),
        ("more.png", 300_000),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(size).randbytes(size))
    (folder / "logs").mkdir()
    (folder / "logs" / "long.log").write_text("begin\n" + "x" * 1_000_000 + "\nend\n")
    target = folder / "proof.tar.gz"
    for _ in range(2):  # the archive of an earlier call is not in the next one
        left_out = archive.pack(folder, target, most_bytes=350_000)
        assert left_out == ["noise.png"]
        assert target.stat().st_size < 350_000
        with tarfile.open(target) as packed:
            names = packed.getnames()
            log = packed.extractfile("proof/logs/long.log")
            assert log is not None
            text = log.read().decode()
        assert names == ["proof/logs/long.log", "proof/more.png", "proof/step.csv", "proof/step.jsonl"]
        assert text.startswith("begin\n")
        assert text.endswith("\nend\n")
        assert len(text) < 250_000
    assert io.BytesIO(target.read_bytes()).read(2) == b"\x1f\x8b"
