from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command_line
from bench.audit import command as audit
from bench.audit.command import SHARED_MEMORY_LIMIT, collect_cases
from bench.audit.hazard import find_hazards
from bench.audit.sass import Binary, Compiled, Instruction, inspect, parse_sass
from bench.harness.roofline import H200
from fastjepa.kernels.launch import AuditCase

ROOT = Path(__file__).resolve().parent.parent


def sass(*lines: str) -> str:
    """Instructions at 0x0000, 0x0010, ... as cuobjdump prints them."""
    return "\n".join(f"        /*{16 * i:04x}*/    {line} ;   /* 0x0000000014107fae */" for i, line in enumerate(lines))


def hazards(*lines: str) -> list[tuple[int, int]]:
    """[(line of the wgmma, line of the write)] of each finding."""
    found = find_hazards(parse_sass(sass(*lines)))
    return [(hazard.wgmma.address // 16, hazard.write.address // 16) for hazard in found]


RS = "HGMMA.64x32x16.F32.BF16 R24, R56, gdesc[UR4].tnspB, R24"  # accumulators R24..R39, operand A R56..R59
COMMIT = RS + ", gsb0"
WAIT_ALL, WAIT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
WRITE_A = "FMNMX R57, RZ, R20, !PT"


def test_parser_reads_guard_opcode_and_operands() -> None:
    text = "\tFunction : _kernel\n\t.headerflags @x\n" + sass(
        "@!P0 LDG.E.128 R4, desc[UR14][R2.64+0x80]", "EXIT", "@UP0 UIADD3 UR4, UR4, 0x1, URZ"
    )
    load, leave, uniform = parse_sass(text)
    assert (load.address, load.guard, load.opcode, load.mnemonic) == (0, "@!P0", "LDG.E.128", "LDG")
    assert load.operands == ("R4", "desc[UR14][R2.64+0x80]")
    assert (leave.address, leave.opcode, leave.operands, leave.guard) == (16, "EXIT", (), "")
    assert (uniform.guard, uniform.opcode) == ("@UP0", "UIADD3")


def binary(log: str, *lines: str) -> Binary:
    return Binary(parse_sass(sass(*lines)), log, shared_bytes=1024, tensor_memory_columns=0)


LOG = (
    "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "non wgmma instructions defining accumulator registers of a wgmma in the function '_kernel'\n"
    "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
    "ptxas info    : Used 159 registers, used 1 barriers\n"
)


def test_inspection_counts_what_the_audit_judges() -> None:
    facts = inspect(
        binary(
            LOG,
            *("LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.U16 R8, desc[UR4][R2.64]", "UTMALDG.2D [UR8], [UR6]"),
            *("LDGSTS.E.BYPASS.128 [R16], desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R4", "STS.128 [R3], R4"),
            *("STG.E desc[UR4][R2.64], R4", "LDS.128 R4, [R3]", RS, "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24"),
            *("HMMA.16816.F32.BF16 R4, R8, R2, R4", "UTCHMMA tmem[UR4], gdesc[UR6], tmem[UR8]", "FFMA R1, R2, R3, R4"),
        )
    )
    assert (facts.registers, facts.spill_bytes, facts.shared_bytes, facts.instructions) == (159, 12, 1024, 13)
    assert (facts.wide_loads, facts.global_loads) == (3, 4)  # LDG.128, LDGSTS.128 and the bulk copy; not LDG.U16
    assert (facts.wide_stores, facts.global_stores) == (1, 2)
    assert facts.tensor_cores == {
        "HGMMA.64x32x16.F32.BF16 RS": 1,
        "HGMMA.64x32x16.F32.BF16 SS": 1,
        "HMMA.16816.F32.BF16": 1,
        "UTCHMMA": 1,
    }
    (warning,) = facts.warnings
    assert warning.startswith("C7515: wgmma.mma_async instructions are serialized")
    assert "_kernel" not in warning


@pytest.mark.parametrize("log", ["", "ptxas info    : Used 32 registers\n"])
def test_inspection_refuses_a_log_it_cannot_read(log: str) -> None:
    with pytest.raises(ValueError, match="register or spill"):
        inspect(binary(log, "EXIT"))


def test_write_to_operand_a_in_flight_is_a_hazard() -> None:
    assert hazards(COMMIT, WRITE_A, WAIT_ALL, "EXIT") == [(0, 1)]


def test_write_before_the_group_is_committed_is_a_hazard() -> None:
    assert hazards(RS, WRITE_A, COMMIT, WAIT_ALL, "EXIT") == [(0, 1)]


def test_write_to_an_accumulator_in_flight_is_a_hazard() -> None:
    assert hazards(COMMIT, "MOV R39, RZ", "MOV R40, RZ", "EXIT") == [(0, 1)]


@pytest.mark.parametrize(
    "write",
    ["MOV R56, RZ", "@P3 MOV R59, RZ", "LDS.128 R56, [R3]", "IMAD.WIDE R58, R1, R2, R4", "SHFL.BFLY PT, R57, R1"],
)
def test_every_form_of_write_is_seen(write: str) -> None:
    assert hazards(COMMIT, write, "EXIT") == [(0, 1)]


@pytest.mark.parametrize("wide", ["LDS.64 R54, [R3]", "LDS.128 R52, [R3]", "LDSM.16.M88.2 R54, [R3]", "CS2R R54, SRZ"])
def test_width_of_the_destination_is_exact(wide: str) -> None:
    assert hazards(COMMIT, wide, "EXIT") == []  # ends at R55
    assert hazards(COMMIT, wide.replace(" R54", " R55").replace(" R52", " R53"), "EXIT") == [(0, 1)]


@pytest.mark.parametrize(
    "reads",
    [
        "STS [R56], R57",
        "ISETP.GT.AND P0, PT, R56, R57, PT",
        "LDGSTS.E.BYPASS.128 [R56], desc[UR4][R2.64]",
        "IADD3 R1, R57, R2, R3",
    ],
)
def test_reads_are_no_hazard(reads: str) -> None:
    assert hazards(COMMIT, reads, "EXIT") == []


def test_a_wait_makes_the_registers_free() -> None:
    assert hazards(COMMIT, WAIT_ALL, WRITE_A, "EXIT") == []


def test_operand_a_from_shared_memory_has_no_registers() -> None:
    shared = "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"
    assert hazards(shared, WRITE_A, WAIT_ALL, "EXIT") == []


def test_a_partial_wait_frees_the_older_group_only() -> None:
    newer = COMMIT.replace("R56", "R64")
    assert hazards(COMMIT, newer, WAIT_ONE, WRITE_A, "EXIT") == []
    assert hazards(newer, COMMIT, WAIT_ONE, WRITE_A, "EXIT") == [(1, 3)]


def test_hazard_over_the_back_edge_of_a_loop() -> None:
    # One group stays in flight over the branch; the next iteration refills its operand.
    assert hazards(WRITE_A, COMMIT, WAIT_ONE, "@P0 BRA 0x0", WAIT_ALL, "EXIT") == [(1, 0)]
    assert hazards(WRITE_A, COMMIT, WAIT_ALL, "@P0 BRA 0x0", "EXIT") == []


def test_only_paths_that_exist_count() -> None:
    assert hazards(COMMIT, "BRA 0x30", WRITE_A, WAIT_ALL, WRITE_A, "EXIT") == []  # line 2 is jumped over
    assert hazards(COMMIT, "@P0 BRA 0x30", WRITE_A, WAIT_ALL, "EXIT") == [(0, 2)]
    assert hazards(COMMIT, "EXIT", WRITE_A) == []


def test_paths_that_meet_are_joined_from_the_newest_group() -> None:
    # Two groups are in flight at the wait if line 6 ran, one if not: waiting for all but one leaves the newest, which
    # is that of line 0 on the other path. That path is the longer one, so the wait has been seen when it arrives.
    newer = COMMIT.replace("R56", "R64")
    shortcut = ("NOP", "NOP", "NOP", "BRA 0x70")
    assert hazards(COMMIT, "@P0 BRA 0x60", *shortcut, newer, WAIT_ONE, WRITE_A, WAIT_ALL, "EXIT") == [(0, 8)]


def test_half_precision_accumulators_take_half_the_registers() -> None:
    half = "HGMMA.64x32x16.F16 R24, gdesc[UR4], R24, gsb0"
    assert hazards(half, "MOV R31, RZ", "MOV R32, RZ", "EXIT") == [(0, 1)]


def test_indirect_branch_is_refused() -> None:
    with pytest.raises(ValueError, match="indirect branch"):
        find_hazards(parse_sass(sass(COMMIT, "BRX R2 -0x100", "EXIT")))


def test_shared_memory_limits_are_those_of_the_data_sheets() -> None:
    assert SHARED_MEMORY_LIMIT == {80: 166912, 90: 232448, 100: 232448}


def test_roofline_is_the_slower_of_memory_and_arithmetic() -> None:
    assert H200.seconds(4_300_000, 0, "bf16") == pytest.approx(1e-6)
    assert H200.seconds(4_300_000, 1_576_000_000, "bf16") == pytest.approx(2e-6)
    assert H200.seconds(0, 788_000_000, "tf32") == pytest.approx(2e-6)
    assert (H200.bound(4_300_000, 1, "bf16"), H200.bound(1, 788, "bf16")) == ("memory", "arithmetic")
    with pytest.raises(ValueError, match="arithmetic is 'int4'"):
        H200.seconds(1, 1, "int4")


def test_case_names_must_be_unique_and_there_must_be_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "twice.py").write_text("from tests.audit_planted import audit_cases\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"two audit cases are called 'copy': in tests\.audit_planted and twice"):
        collect_cases(["tests.audit_planted", "twice"])
    with pytest.raises(ValueError, match=r"no audit_cases\(\) in json"):
        collect_cases(["json"])


def test_planted_faults_fail_the_audit_even_when_the_interpreter_is_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "audit.json"
    command = [
        sys.executable,
        "-m",
        "bench",
        "audit",
        "--module",
        "tests.audit_planted",
        "--arch",
        "sm_90",
        "--jobs",
        "2",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, "--json", str(out)],
        **{"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 300, "check": False},
    )
    assert done.returncode == 1, done.stderr
    findings: dict[str, dict[str, Any]] = {finding["case"]: finding for finding in json.loads(out.read_text())}
    failures = {name: finding["failures"] for name, finding in findings.items()}
    assert failures["copy"] == failures["spills allowed"] == []
    assert findings["copy"]["facts"]["wide_loads"] == findings["copy"]["facts"]["global_loads"] > 0
    assert findings["copy"]["roofline_us"] == pytest.approx(1.0)
    (spills,) = failures["spills"]
    assert spills.startswith("spills ")
    assert findings["spills"]["facts"]["spill_bytes"] > 0
    assert findings["spills allowed"]["notes"]
    # Triton 3.6 serialises the wgmmas of this kernel as well.
    (shared,) = [failure for failure in failures["too much shared memory"] if not failure.startswith("ptxas warns")]
    assert "of shared memory; a block has 232448" in shared
    assert any("HGMMA" in form for form in findings["too much shared memory"]["facts"]["tensor_cores"])
    assert failures["no tensor cores"] == ["has no tensor-core instruction, but should"]
    (broken,) = failures["does not compile"]
    assert "power of 2" in broken
    (forgotten,) = failures["argument forgotten"]
    assert "n neither in signature nor in constexprs" in forgotten
    assert f"FAIL: spills on sm_90 {spills}" in done.stdout
    assert failures["too few trips"] == ["accesses 5.41e+07 bytes by its programs and loop_trips, not 1.08e+08"]
    check_declared_instructions(failures)
    assert "11 of 21 pass" in done.stdout
    check_issue_slots(findings)


def check_declared_instructions(failures: dict[str, list[str]]) -> None:
    """Of the planted kernels that are made for one kind of matrix instruction."""
    assert failures["wgmma as declared"] == failures["mma.sync as declared"] == []
    for name, found, wanted in (
        ("mma.sync instead of wgmma", "mma.sync (", "wgmma"),
        ("wgmma instead of mma.sync", "wgmma (", "mma.sync"),
        ("wgmma and mma.sync", "mma.sync, wgmma (", "wgmma"),
        ("nothing instead of wgmma", "no matrix instruction;", "wgmma"),
    ):
        (failure,) = failures[name]
        assert failure.startswith(f"has {found}"), failure
        assert failure.endswith(f"it is made for {wanted}"), failure
    assert "does not matter on sm_90" not in failures


WGMMA, MMA, TCGEN05 = "HGMMA.64x64x16.F32.BF16", "HMMA.16816.F32.BF16", "UTCHMMA.2CTA"


@pytest.mark.parametrize(
    ("arch", "found", "passes"),
    [
        *((90, [f"{WGMMA} {operand}"], True) for operand in ("RS", "SS")),  # of either, the hazard check is the judge
        (90, [f"{WGMMA} SS", MMA], False),
        (90, [], False),
        (80, [MMA, "IMMA.16816.S8.S8"], True),
        (80, [TCGEN05], False),
        (100, [TCGEN05], True),
        (100, [MMA], False),
    ],
)
def test_instructions_are_those_that_a_case_declares(arch: int, found: list[str], passes: bool) -> None:
    case = planted("does not matter on sm_90", {80: "mma.sync", 90: "wgmma", 100: "tcgen05"})
    failures = list(audit._other_instructions(case, arch, dict.fromkeys(found, 8)))
    assert bool(failures) != passes
    assert not list(audit._other_instructions(replace(case, instructions={}), arch, dict.fromkeys(found, 8)))


def planted(name: str, instructions: dict[int, str]) -> AuditCase:
    from tests.audit_planted import audit_cases

    (case,) = (case for case in audit_cases() if case.name == name)
    return replace(case, instructions=instructions)


def test_findings_come_case_by_case_however_they_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def judge_together(cases: list[AuditCase], arch: int) -> list[audit.Finding]:
        seen.append((len(cases), arch))
        return [audit.Finding(case.name, arch, ()) for case in cases]

    monkeypatch.setattr(audit, "judge_together", judge_together)
    monkeypatch.setattr(audit, "_TOGETHER", 2)
    cases = {name: ("tests.audit_planted", replace(planted("copy", {}), name=name)) for name in "cba"}
    judged = [(finding.case, finding.arch) for finding in audit.judge_all(cases, (90, 80), jobs=1)]
    assert judged == [(name, arch) for name in "cba" for arch in (90, 80)]
    assert seen == [(2, 90), (1, 90), (2, 80), (1, 80)]


def test_a_kernel_that_cannot_be_read_hides_no_other_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disassembler fails for all that it was given; each is then given to it alone."""

    def disassemble(kernels: list[Compiled]) -> list[tuple[Instruction, ...]]:
        if any(kernel.ptx == "broken" for kernel in kernels):
            raise RuntimeError("nvdisasm failed (1): what is this?")
        return [parse_sass(sass("EXIT")) for _ in kernels]

    def compile_case(case: AuditCase, arch: int) -> Compiled:
        if case.name == "does not compile":
            raise TypeError("at 1:2\n  source\nno such thing")
        return Compiled(b"", LOG.splitlines()[-1] + "\n0 bytes spill stores, 0 bytes spill loads", 0, 0, case.name)

    monkeypatch.setattr(audit, "disassemble", disassemble)
    monkeypatch.setattr(audit, "compile_case", compile_case)
    cases = [replace(planted("copy", {}), name=name) for name in ("first", "does not compile", "broken", "last")]
    found = {finding.case: finding.failures for finding in audit.judge_together(cases, 80)}
    assert list(found) == ["first", "does not compile", "broken", "last"]
    assert found["first"] == found["last"] == ()
    assert found["does not compile"] == ("cannot be audited: TypeError: at 1:2 no such thing",)
    assert found["broken"] == ("cannot be audited: RuntimeError: nvdisasm failed (1): what is this?",)


def test_a_case_is_compiled_for_the_architectures_that_it_declares(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(
        audit, "judge_together", lambda cases, arch: [audit.Finding(case.name, arch, ()) for case in cases]
    )
    declared, anywhere = planted("does not matter on sm_90", {80: "wgmma", 100: "tcgen05"}), planted("copy", {})
    cases = {case.name: ("tests.audit_planted", case) for case in (declared, anywhere)}
    judged = [(finding.case, finding.arch) for finding in audit.judge_all(cases, iter((80, 90, 100)), jobs=1)]
    assert judged == [(declared.name, 80), (declared.name, 100), *(("copy", arch) for arch in (80, 90, 100))]
    with pytest.raises(SystemExit, match="2"):  # nothing judged is nothing passed
        audit.main(["--module", "tests.audit_planted", "--filter", declared.name, "--arch", "sm_90"])
    assert "none of the cases is made for sm_90" in capsys.readouterr().err


@pytest.mark.parametrize("instructions", [{75: "mma.sync"}, {90: "hmma"}])
def test_instructions_that_nobody_would_look_for_are_refused(
    instructions: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unseen.py").write_text(
        f"from tests.test_audit import planted\ndef audit_cases():\n    return [planted('copy', {instructions})]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "unseen", raising=False)
    with pytest.raises(ValueError, match=r"audit case 'copy' is made for .* accepted: mma\.sync, wgmma, tcgen05 on 80"):
        collect_cases(["unseen"])


def check_issue_slots(findings: dict[str, dict[str, Any]]) -> None:
    """Of the planted kernels with loops; 1320 programs, so 10 warps for each scheduler."""
    copies, arithmetic, nested = (
        findings[name] for name in ("copy in a loop", "100 FMAs in a loop", "1000 FMAs in an inner loop")
    )
    for finding in (copies, arithmetic, nested):
        assert finding["failures"] == []
        per_warp, per_trip = finding["instructions_per_warp"], finding["instructions_per_trip"][0]
        assert 10 * per_trip < per_warp < 10 * per_trip + 100
        assert finding["issue_us"] == pytest.approx(10 * per_warp / 1.8e3)
    (per_copy,) = copies["instructions_per_trip"]
    (per_tile,) = arithmetic["instructions_per_trip"]
    assert 800 + 4 <= per_tile < 800 + per_copy  # 8 numbers for each thread, and what a copy does as well
    per_outer, per_inner = nested["instructions_per_trip"]
    assert 8 <= per_inner <= 11  # the FMAs and, once for each of ptxas's copies, the counting
    assert 1000 * per_inner < per_outer < 1000 * per_inner + 2 * per_copy  # a few trips are straight code
    assert [finding["bound"] for finding in (copies, arithmetic, nested)] == ["memory", "issue-bound", "issue-bound"]
    assert copies["issue_us"] < copies["roofline_us"]
    assert arithmetic["issue_us"] > arithmetic["roofline_us"] == pytest.approx(25.15, abs=0.01)
    # A thread's load, store, counter and jump, of which ptxas makes four copies with one counter and jump.
    assert 2 < findings["copy in a short loop"]["instructions_per_trip"][0] < 6
    assert findings["copy"]["instructions_per_trip"] == []
    assert 5 < findings["copy"]["instructions_per_warp"] <= findings["copy"]["facts"]["instructions"]
    for name, notes in (
        ("programs forgotten", []),
        (
            "trips of the inner loop forgotten",
            ["has no estimate of issue slots: the case has no loop_trips for one of its loops"],
        ),
    ):
        finding = findings[name]
        assert (finding["issue_us"], finding["instructions_per_trip"], finding["notes"]) == (None, [], notes)
        assert finding["bound"] == "memory"


def test_table_says_what_bounds_a_kernel_and_leaves_out_what_is_not_known() -> None:
    facts = {"tensor_cores": {}, "warnings": (), "registers": 9, "spill_bytes": 0, "shared_bytes": 0}
    facts |= {"wide_loads": 1, "global_loads": 2, "wide_stores": 3, "global_stores": 4}
    known = audit.Finding(
        *("slow", 90, ()),
        facts=facts,
        roofline_us=1.25,
        issue_us=9.75,
        instructions_per_trip=(190.0, 4.75),
        bound="issue-bound",
    )
    unknown = audit.Finding("case", 90, (), facts=facts, roofline_us=1.25, bound="memory")
    header, _, *lines = audit.render([known, unknown, audit.Finding("other", 80, (), facts=facts)]).splitlines()
    first, last = header.index("hazard") + len("hazard"), header.index("verdict")
    assert [line[first:last].split() for line in lines] == [
        ["190,", "4.75", "9.8", "us", "1.2", "us", "issue-bound"],
        ["1.2", "us", "memory"],
        [],
    ]


def test_table_sums_matrix_instructions_over_their_shapes() -> None:
    forms = {
        "HGMMA.64x32x16.F32.BF16 RS": 2,
        "HGMMA.64x8x16.F32.BF16 RS": 3,
        "HGMMA.64x8x8.F32.TF32 SS": 1,
        "UTCHMMA": 4,
    }
    facts = {"tensor_cores": forms, "warnings": (), "registers": 9, "spill_bytes": 0, "shared_bytes": 0}
    facts |= {"wide_loads": 1, "global_loads": 2, "wide_stores": 3, "global_stores": 4}
    line = audit.render([audit.Finding("case", 90, (), facts=facts)]).splitlines()[-1]
    assert "5 HGMMA.BF16 RS, 1 HGMMA.TF32 SS, 4 UTCHMMA" in line
    assert "1/2" in line
    assert "3/4" in line


@pytest.mark.parametrize(("failures", "status"), [((), 0), (("is slow",), 1)])
def test_exit_status_says_whether_all_pass(
    failures: tuple[str, ...], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    findings = [audit.Finding("copy", 80, ()), audit.Finding("copy", 90, failures)]
    monkeypatch.setattr(audit, "judge_all", lambda cases, archs, jobs: findings)
    assert audit.main(["--module", "tests.audit_planted"]) == status
    out = capsys.readouterr().out
    assert f"{2 - status} of 2 pass" in out
    assert ("FAIL: copy on sm_90 is slow" in out) == bool(failures)


def test_filter_that_matches_nothing_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match="2"):
        audit.main(["--module", "tests.audit_planted", "--filter", "nothing like it"])
    assert "matches none of: copy, spills" in capsys.readouterr().err


def test_unknown_subcommand_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["fly"]) == 2
    error = capsys.readouterr().err
    assert "unknown subcommand 'fly'" in error
    assert all(name in error for name in command_line.COMMANDS)
    assert command_line.main([]) == 2
    assert command_line.main(["--help"]) == 0
