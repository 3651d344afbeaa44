"""The audit's estimate of issue slots, on machine code and PTX written down here; `test_audit` runs it on kernels."""

from __future__ import annotations

import pytest

from bench.audit.control_flow import Loop, find_loops, longest_way, successors
from bench.audit.issue import Estimate, estimate_issue
from bench.audit.ptx import parse_ptx
from bench.audit.sass import parse_sass
from fastjepa.kernels.launch import AuditCase, LaunchConfig
from tests.test_audit import sass

TRAP = ("EXIT", "BRA {self}", "NOP", "NOP")  # how every kernel ends
LOAD, STORE, FMA = "LDG.E.128 R4, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R4", "FFMA R4, R4, R4, 1"
PTX_LOAD = "@%p2 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd2 + 0 ];"
PTX_STORE, PTX_FMA = "st.global.v4.b32 [ %rd2 + 0 ], { %r1, %r2, %r3, %r4 };", "fma.rn.f32 %f1, %f1, %f1, 0f3F800000;"


def kernel(*lines: str) -> str:
    """The lines, and the end that every kernel has."""
    lines += TRAP
    return sass(*(line.format(self=hex(16 * i)) for i, line in enumerate(lines)))


def loops(*lines: str) -> tuple[Loop, ...]:
    return find_loops(successors(parse_sass(kernel(*lines))))


def ptx(*lines: str) -> str:
    return "\n".join([".version 8.7", ".visible .entry k(", "\t.param .u64 a", ")", "{", *lines, "ret;", "}"])


def estimate(code: str, source: str, *, programs: int = 132, trips: tuple[int, ...] = (), warps: int = 4) -> Estimate:
    config = LaunchConfig(num_warps=warps)
    case = AuditCase("case", None, {}, {}, config, 0, 0, programs=programs, loop_trips=trips)
    return estimate_issue(case, parse_sass(code), source)


PTX_LOOP = ptx("setp.lt.s32 %p1, %r1, 1;", "$L__BB0_1:  // the loop", PTX_LOAD, PTX_STORE, "@%p1 bra \t$L__BB0_1;")


def test_the_end_of_every_kernel_is_no_loop() -> None:
    assert loops("MOV R1, R2", "@P0 EXIT") == ()


def test_what_nothing_reaches_is_no_loop() -> None:
    assert loops("EXIT", "NOP", "BRA 0x10") == ()


@pytest.mark.parametrize("back", ["@!P1 BRA 0x10", "@P0 BRA 0x10", "BRA.U UP0, 0x10", "BRA P0, 0x10"])
def test_a_jump_back_makes_a_loop_from_its_target_to_itself(back: str) -> None:
    (loop,) = loops("NOP", "NOP", "NOP", back)
    assert (loop.header, loop.body, loop.inner) == (1, {1, 2, 3}, ())
    assert sorted(successors(parse_sass(kernel("NOP", "NOP", "NOP", back)))[3]) == [1, 4]  # or on


def test_a_loop_of_one_instruction_that_is_reached_counts() -> None:
    (loop,) = loops("NOP", "@P0 BRA 0x10")
    assert loop.body == {1}


def test_nested_loops_and_loops_side_by_side() -> None:
    first, second = loops("NOP", "NOP", "@P0 BRA 0x10", "NOP", "@P1 BRA 0x0", "NOP", "@P2 BRA 0x50")
    assert (first.header, len(first.body), second.header, second.body) == (0, 5, 5, {5, 6})
    assert [(loop.header, loop.body) for loop in first.inner] == [(1, {1, 2})]
    assert first.own == {0, 3, 4}


def test_two_jumps_to_one_header_make_one_loop() -> None:
    (loop,) = loops("NOP", "@P0 BRA 0x0", "NOP", "@P1 BRA 0x0")
    assert (loop.header, loop.body, loop.inner) == (0, {0, 1, 2, 3}, ())
    (loop,) = loops("@P0 BRA 0x30", "NOP", "BRA 0x0", "NOP", "@P1 BRA 0x0")  # of which neither way back has the other
    assert (loop.header, loop.body, loop.inner) == (0, {0, 1, 2, 3, 4}, ())


def test_a_way_out_of_the_loop_is_not_part_of_it() -> None:
    (loop,) = loops("NOP", "@P0 BRA 0x40", "@P1 BRA 0x0", "EXIT", "NOP")
    assert loop.body == {0, 1, 2}


def test_code_that_is_laid_out_elsewhere_belongs_to_its_loop_but_makes_none() -> None:
    # Line 1 goes to line 4, which comes back to line 2: backwards, but no second time.
    assert loops("NOP", "@P0 BRA 0x40", "NOP", "EXIT", "NOP", "BRA 0x20") == ()
    (loop,) = loops("NOP", "@P0 BRA 0x50", "NOP", "@P1 BRA 0x0", "EXIT", "NOP", "BRA 0x20")
    assert loop.body == {0, 1, 2, 3, 5, 6}


def test_a_loop_with_two_entries_is_refused() -> None:
    with pytest.raises(ValueError, match="entered in two places"):
        loops("@P0 BRA 0x20", "NOP", "NOP", "@P1 BRA 0x10")


def test_of_two_ways_the_longer_counts_and_loops_as_a_whole() -> None:
    code = parse_sass(kernel("@P0 BRA 0x40", "NOP", "NOP", "BRA 0x50", "NOP", "NOP", "@P1 BRA 0x50"))
    edges = successors(code)
    (loop,) = find_loops(edges)
    # 4 instructions on the longer side, the loop, and EXIT
    assert longest_way(edges, [1] * len(code), 0, {loop: 100.0}) == 4 + 100 + 1
    assert longest_way(edges, [1] * len(code), loop.header, {}, loop.body) == 2


@pytest.mark.parametrize(
    ("lines", "longest"),
    [
        (("@P0 BRA 0x40", "NOP", "NOP", "BRA 0x50", "NOP", "NOP"), 6),  # they meet again
        (("@P0 BRA 0x20", "BRA 0x50", "NOP", "NOP", "NOP", "NOP"), 6),
        (("@P0 BRA 0x50", "NOP", "NOP", "NOP", "EXIT", "NOP"), 5),  # they end apart
        (("@P0 BRA 0x20", "EXIT", "NOP", "NOP", "NOP", "NOP"), 6),
    ],
)
def test_the_longer_way_counts_whichever_is_taken_first(lines: tuple[str, ...], longest: int) -> None:
    code = parse_sass(kernel(*lines))
    assert longest_way(successors(code), [1] * len(code), 0, {}) == longest


def test_ptx_is_read_as_far_as_loops_need_it() -> None:
    text = ptx(
        "\t.reg .b32 \t%r<6>;",
        "$L__BB0_2:                              // %loop",
        "\t// begin inline asm",
        "\t{ mov.u32 %r13, 0x0; @!%p2 ld.global.v2.b32 { %r13, %r14 }, [ %rd26 + 0 ]; }",
        "\tmbarrier.init.shared::cta.b64 [%r1], 1;",
        "\t@%p2 bra \t$L__BB0_3;",
        "\tbra.uni \t$L__BB0_2;",
        "$L__BB0_3:",
    )
    read = [(i.address, i.guard, i.opcode) for i in parse_ptx(text)]
    assert read == [
        (0, "", "mov.u32"),
        (1, "@!%p2", "ld.global.v2.b32"),
        (2, "", "mbarrier.init.shared::cta.b64"),
        (3, "@%p2", "BRA"),
        (4, "", "BRA"),
        (5, "", "RET"),
        (6, "", "RET"),
    ]
    assert [i.operands for i in parse_ptx(text)[3:5]] == [("0x5",), ("0x0",)]
    (loop,) = find_loops(successors(parse_ptx(text)))
    assert loop.body == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(("text", "error"), [("", "no entry"), (ptx("a:", "nop;", "a:"), "label a twice")])
def test_ptx_that_cannot_be_read_is_refused(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse_ptx(text)


def test_straight_code_is_counted_once_up_to_its_exit() -> None:
    code = kernel("NOP", "@P0 EXIT", LOAD, STORE)
    found = estimate(code, ptx(PTX_LOAD, PTX_STORE))
    assert (found.instructions_per_warp, found.instructions_per_trip) == (5, ())
    assert found.accessed_bytes == 132 * 128 * 32
    assert found.microseconds == pytest.approx(1e6 * 5 / 1.8e9)  # one warp for each scheduler


def test_a_loop_counts_its_trips() -> None:
    code = kernel("NOP", "@P1 BRA 0x70", LOAD, FMA, FMA, STORE, "@P0 BRA 0x20")
    found = estimate(code, PTX_LOOP, trips=(10,))
    assert (found.instructions_per_warp, found.instructions_per_trip) == (2 + 10 * 5 + 1, (5.0,))
    assert found.accessed_bytes == 10 * 132 * 128 * 32


@pytest.mark.parametrize(
    ("programs", "warps", "slots"),
    [
        (132, 4, 1),
        (1320, 4, 10),
        (198, 4, 1.5),  # programs are spread evenly, though an SM cannot run half of one
        (4, 8, 2),  # four SMs, not 132
        (1, 4, 1),
        (2112, 1, 4),
        (132, 1, 1),  # one warp for each SM: three schedulers have nothing to do
        (264, 1, 1),
    ],
)
def test_time_is_that_of_the_schedulers_which_the_programs_reach(programs: int, warps: int, slots: float) -> None:
    found = estimate(kernel(*["NOP"] * 17), ptx(), programs=programs, warps=warps)
    assert found.microseconds == pytest.approx(1e6 * 18 * slots / 1.8e9)


def test_a_nested_loop_counts_for_each_trip_of_the_outer_one() -> None:
    code = kernel("NOP", LOAD, FMA, "@P0 BRA 0x20", STORE, "@P1 BRA 0x10")
    source = ptx("a:", PTX_LOAD, "b:", PTX_FMA, "@%p1 bra b;", PTX_STORE, "@%p2 bra a;")
    found = estimate(code, source, trips=(10, 7))
    assert found.instructions_per_trip == (3 + 7 * 2, 2)
    assert found.instructions_per_warp == 1 + 10 * (3 + 7 * 2) + 1
    with pytest.raises(ValueError, match="no loop_trips for one of its loops"):
        estimate(code, source, trips=(10,))


def test_loops_side_by_side_have_the_same_trips() -> None:
    code = kernel(LOAD, "@P0 BRA 0x0", FMA, FMA, STORE, "@P0 BRA 0x20")
    source = ptx("a:", PTX_LOAD, "@%p1 bra a;", "b:", PTX_FMA, PTX_STORE, "@%p2 bra b;")
    found = estimate(code, source, trips=(10,))
    assert (found.instructions_per_warp, found.instructions_per_trip) == (10 * 2 + 10 * 4 + 1, (2, 4))


def test_unrolled_loop_counts_a_trip_for_each_copy_and_not_the_loop_behind_it() -> None:
    unrolled = [LOAD, STORE] * 4
    code = kernel(*unrolled, "IADD3 R0, R0, -0x4, RZ", "@P0 BRA 0x0", LOAD, STORE, "@P0 BRA 0xa0")
    found = estimate(code, PTX_LOOP, trips=(100,))
    assert found.instructions_per_trip == (10 / 4,)
    assert found.instructions_per_warp == 25 * 10 + 1
    assert found.accessed_bytes == 100 * 2 * 16 * 132 * 128


def test_unrolling_of_a_loop_without_accesses_is_seen_by_its_arithmetic() -> None:
    code = kernel(*[FMA] * 16, "@P0 BRA 0x0")
    found = estimate(code, ptx("a:", PTX_FMA, PTX_FMA, "@%p1 bra a;"), trips=(80,))
    assert found.instructions_per_trip == (17 / 8,)


def test_an_inner_loop_that_was_unrolled_whole_does_not_look_like_an_unrolled_outer_one() -> None:
    code = kernel(*[LOAD] * 5, STORE, "@P0 BRA 0x0")
    source = ptx("a:", PTX_FMA, "b:", PTX_LOAD, "@%p1 bra b;", PTX_STORE, "@%p2 bra a;")
    assert estimate(code, source, trips=(10, 5)).instructions_per_trip == (7,)


def test_accesses_of_an_inner_loop_do_not_say_how_often_the_outer_one_was_unrolled() -> None:
    code = kernel(*[LOAD] * 4, LOAD, LOAD, LOAD, "@P0 BRA 0x40", "@P1 BRA 0x0")
    source = ptx("a:", PTX_LOAD, PTX_LOAD, "b:", PTX_LOAD, PTX_LOAD, PTX_LOAD, "@%p1 bra b;", "@%p2 bra a;")
    assert estimate(code, source, trips=(10, 7)).instructions_per_trip == ((5 + 7 * 4) / 2, 4)


def test_a_load_that_the_assembler_took_out_of_the_loop_changes_nothing() -> None:
    code = kernel(LOAD, LOAD, FMA, STORE, "@P0 BRA 0x10")
    source = ptx("a:", PTX_LOAD, PTX_LOAD, PTX_STORE, "@%p1 bra a;")
    assert estimate(code, source, trips=(10,)).instructions_per_trip == (4,)
    code, source = kernel(LOAD, FMA, "@P0 BRA 0x10"), ptx("a:", PTX_LOAD, PTX_FMA, "@%p1 bra a;")
    assert estimate(code, source, trips=(10,)).instructions_per_trip == (2,)


def test_a_loop_that_was_unrolled_whole_is_straight_code() -> None:
    assert estimate(kernel(*[LOAD] * 5), ptx(*[PTX_LOAD] * 5), trips=(5,)).instructions_per_warp == 6


def test_a_call_counts_its_subroutine() -> None:
    code = kernel("CALL.REL.NOINC 0x40", "CALL.REL.NOINC 0x40", "NOP", "EXIT", *[FMA] * 6, "RET.REL.NODEC R2 0x0")
    assert estimate(code, ptx()).instructions_per_warp == 2 * (1 + 7) + 2


def test_where_loops_cannot_be_told_apart_there_is_no_estimate() -> None:
    code = kernel("NOP", "@P0 BRA 0x0", "NOP", "@P0 BRA 0x20", "NOP", "@P0 BRA 0x40")
    two = ptx("a:", PTX_FMA, "@%p1 bra a;", "b:", PTX_FMA, "@%p2 bra b;")
    with pytest.raises(ValueError, match="2 loops of the PTX are 3 in the machine code"):
        estimate(code, two, trips=(10,))
    with pytest.raises(ValueError, match="0 loops of the PTX are 3"):
        estimate(code, ptx(), trips=(10,))


def test_without_programs_there_is_no_estimate() -> None:
    with pytest.raises(ValueError, match="how many programs"):
        estimate(kernel("NOP"), ptx(), programs=0)


def test_bulk_copies_do_not_say_how_much_they_move() -> None:
    assert estimate(kernel("UTMALDG.2D [UR8], [UR6]"), ptx()).accessed_bytes is None


@pytest.mark.parametrize(
    ("load", "size"), [("LDG.E.U16", 2), ("LDG.E", 4), ("LDG.E.64", 8), ("LDGSTS.E.BYPASS.128", 16)]
)
def test_width_of_an_access_is_read_off(load: str, size: int) -> None:
    assert estimate(kernel(f"{load} R4, desc[UR4][R2.64]"), ptx()).accessed_bytes == size * 132 * 128
