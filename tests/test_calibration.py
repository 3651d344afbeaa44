"""A calibration rehearsed without a GPU: stand-ins that crash, hang, are wrong, slow, or need too much memory."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from calibration_standins import (
    BOTH,
    CHANNELS_LAST,
    LIMITS,
    MANY_BEST,
    SOME,
    SOME_LAYERS,
    some_setting,
    trial,
)  # fmt: skip
from fastjepa.calibration import children
from fastjepa.calibration.choice import EAGER, Choice
from fastjepa.calibration.layers import LAYERS
from fastjepa.calibration.memory import Memory
from fastjepa.calibration.search import among, everything, neighbours, next_choice, rival, single_parts
from fastjepa.calibration.setting import Purpose, Setting
from fastjepa.calibration.store import read_rows, rows_folder, rows_path, write_rows
from fastjepa.calibration.trial import Trial, settled
from fastjepa.calibration.verdict import Verdict, _Kept, resolve

CPU = torch.device("cpu")
ALL = everything("train")


@dataclass
class Rehearsal:
    verdict: Verdict
    said: list[str]
    folder: Path

    def of(self, choice: Choice) -> Trial:
        return next(row for row in self.verdict.rows if row.choice == choice)


def rehearse(cache: Path, makers: str, setting: Setting | None = None, **options: Any) -> Rehearsal:
    said: list[str] = []
    verdict = resolve(
        setting or some_setting(), CPU, cache_dir=cache, makers=f"calibration_standins:{makers}", limits=LIMITS,
        say=said.append, **options,
    )  # fmt: skip
    return Rehearsal(verdict, said, cache)


@pytest.fixture(scope="module", autouse=True)
def stand_ins_can_be_imported() -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))
    yield  # type: ignore[misc]
    patch.undo()


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Rehearsal:
    return rehearse(tmp_path_factory.mktemp("cache"), "of_every_kind")


def test_the_winner_is_the_fastest_that_is_exact(rehearsal: Rehearsal) -> None:
    assert rehearsal.verdict.best() == BOTH
    assert rehearsal.verdict.best(lambda choice: not choice.cuda_graph) == CHANNELS_LAST
    assert rehearsal.of(BOTH).status == "exact"


def test_every_other_candidate_is_a_row_that_says_why_not(rehearsal: Rehearsal) -> None:
    crashed, hung = rehearsal.of(ALL), rehearsal.of(Choice(True, "fused", False, True, True))
    assert crashed.status == "crashed"
    assert "SIGABRT" in crashed.reason
    assert hung.status == "hung"
    assert "no result after" in hung.reason
    wrong = rehearsal.of(Choice(losses="fused"))
    assert (wrong.status, wrong.error) == ("wrong", pytest.approx(1e-3, rel=1e-3))
    assert "numbers is off by 1.0e-03 of its norm" in wrong.reason
    assert rehearsal.of(Choice(batch_norm=True, recompute=True)).status == "out of memory"
    assert rehearsal.of(Choice(batch_norm=True, recompute=True, cuda_graph=True, channels_last=True)).reason == (
        "does not fit in memory"
    )
    slow = rehearsal.of(Choice(losses="closed_form"))
    assert slow.status == "exact"
    assert slow.speedup is not None
    assert slow.speedup < 1
    report = rehearsal.verdict.report(BOTH)
    for row in rehearsal.verdict.rows:
        assert str(row.choice) in report
        assert row.reason in report
    for row in rehearsal.verdict.rows:  # progress: a line for each as it came
        assert any(line.endswith(str(row)) for line in rehearsal.said)


def test_nothing_that_contains_a_broken_part_is_tried(rehearsal: Rehearsal) -> None:
    with_fused_losses = [row.choice for row in rehearsal.verdict.rows if row.choice.losses == "fused"]
    assert len(with_fused_losses) == 3  # with everything, twice, and alone


def changed(cache: Path, rows: list[Trial]) -> Path:
    write_rows(some_setting(), tuple(rows), rows_folder(cache))
    return cache


def test_later_starts_read_the_file(rehearsal: Rehearsal, tmp_path: Path) -> None:
    """Once all is settled: see below."""
    written = read_rows(rows_path(some_setting(), rows_folder(rehearsal.folder)))[1]
    assert written == rehearsal.verdict.rows
    assert "; the next start goes on with the rest; " in rehearsal.verdict.origin
    rows = [row if row.settled else dataclasses.replace(row, attempts=2) for row in written]
    again = rehearse(changed(tmp_path, rows), "nothing")
    assert again.said == []
    assert again.verdict.rows == tuple(rows)
    assert again.verdict.origin.startswith("measured before: ")


def test_a_search_without_an_end_is_gone_on_with(rehearsal: Rehearsal, tmp_path: Path) -> None:
    """As it is where the time was over: rows are kept as they are, and only what is missing is measured."""
    kept = [row for row in rehearsal.verdict.rows if row.settled and row.choice != CHANNELS_LAST]
    assert len(kept) > 5
    cache = changed(tmp_path, kept)
    looked_up = resolve(some_setting(), CPU, cache_dir=cache, measuring=False, say=lambda _: None)
    assert looked_up.rows == tuple(kept)
    assert looked_up.origin.startswith("measured before, not all of it yet: ")
    again = rehearse(cache, "only_channels_last")  # in which all others would be failures
    assert again.verdict.rows[: len(kept)] == tuple(kept)
    assert again.of(CHANNELS_LAST).status == "exact"
    assert again.said[0].startswith(f"going on after {len(kept)} candidates with what is fastest on Some GPU")
    assert rehearse(cache, "nothing").verdict.origin.startswith("measured before: ")


def test_what_may_be_the_moments_fault_is_tried_once_more(tmp_path: Path) -> None:
    """A first search that met a cold compiler, a GPU in use, and TRITON_INTERPRET=1."""
    top, plain = ALL, dataclasses.replace(ALL, cuda_graph=False)
    first = [trial(top, status="hung"), trial(BOTH, status="unavailable"), trial(CHANNELS_LAST, 9.9)]
    assert {row.choice for row in settled([*first, trial(plain, status="out of memory")])} == {CHANNELS_LAST}
    found = rehearse(changed(tmp_path, first), "many")
    assert found.of(top).status == "exact"
    assert found.of(top).attempts == 2
    assert found.of(CHANNELS_LAST) == first[2]
    assert found.verdict.best() == MANY_BEST
    assert rehearse(tmp_path, "nothing").verdict.rows == found.verdict.rows


def test_what_hung_twice_stays_so(tmp_path: Path) -> None:
    rows = [trial(ALL, status="hung", attempts=2), trial(CHANNELS_LAST, 5.0)]
    assert settled(rows) == rows
    found = rehearse(changed(tmp_path, rows), "only_channels_last")
    assert found.of(ALL) == rows[0]
    assert rehearse(tmp_path, "nothing").said == []


def test_a_second_attempt_is_counted_and_one_that_had_no_time_is_not() -> None:
    kept: list[tuple[Trial, ...]] = []
    hung = trial(ALL, status="hung")
    trials = children._Trials([hung, trial(BOTH, 5.0)], lambda _: True, kept.append)
    trials.add(Trial(ALL, "not measured", "the time was over"))
    assert hung in trials.all()
    assert kept == []
    trials.add(hung)
    assert trials.all() == (trial(BOTH, 5.0), dataclasses.replace(hung, attempts=2))
    assert kept == [trials.all()]


def test_where_nothing_was_measured_nothing_is_settled() -> None:
    """Another program had the GPU, perhaps more than once."""
    rows = [trial(ALL, status="crashed"), trial(BOTH, status="out of memory", attempts=2)]
    assert settled(rows) == []
    assert settled([*rows, trial(CHANNELS_LAST, 5.0)]) == [*rows, trial(CHANNELS_LAST, 5.0)]


def test_measuring_again_in_vain_leaves_what_was_there(tmp_path: Path) -> None:
    rows = (trial(CHANNELS_LAST, 5.0),)
    path = write_rows(some_setting(), rows, rows_folder(tmp_path))
    kept = _Kept(some_setting(), rows_folder(tmp_path), redo=True)
    kept.write((trial(ALL, status="crashed"),))
    assert read_rows(path)[1] == rows
    kept.write((trial(ALL, status="crashed"), trial(BOTH, 5.0)))
    assert len(read_rows(path)[1]) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_rows_survive_kills_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty kills, at moments from before the first child to after the last row."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where those that are killed leave their folders
    path = rows_path(some_setting(), rows_folder(tmp_path))
    started = time.monotonic()
    assert os.waitpid(forked(tmp_path), 0)[1] == 0
    whole = time.monotonic() - started
    every = read_rows(path)[1]
    path.unlink()
    random.seed(9)
    before: tuple[Trial, ...] = ()
    kills = 0
    gains = 0
    for _ in range(40):
        if kills == 20:
            break
        process = forked(tmp_path)
        until = time.monotonic() + random.uniform(0.0, whole)
        while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
            time.sleep(0.005)
        if ended == (0, 0):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            kills += 1
        rows = read_rows(path)[1] if path.exists() else ()  # whole and valid, whenever the kill came
        assert rows[: len(before)] == before  # nothing that was measured is lost or measured again
        gains += ended == (0, 0) and len(rows) > len(before)
        before = rows
        if ended != (0, 0):  # all is there: begin anew, so that kills find something to hit
            assert os.waitstatus_to_exitcode(ended[1]) == 0
            path.unlink()
            before = ()
    assert kills == 20
    assert gains > 1  # some were killed in the middle, and what they had was kept
    final = rehearse(tmp_path, "many").verdict
    assert final.rows[: len(before)] == before
    assert final.best() == MANY_BEST
    assert {row.choice: row.status for row in final.rows} == {row.choice: row.status for row in every}


def forked(cache: Path) -> int:
    """A process that calibrates with stand-ins; forked, because importing torch would take most of its time."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            rehearse(cache, "many")
            status = 0
        finally:
            os._exit(status)
    return process


@pytest.mark.parametrize("keep", [0, 100, -3])
def test_a_torn_file_is_measured_again(rehearsal: Rehearsal, tmp_path: Path, keep: int) -> None:
    folder = rows_folder(tmp_path)
    folder.mkdir()
    whole = rows_path(some_setting(), rows_folder(rehearsal.folder)).read_bytes()
    path = rows_path(some_setting(), folder)
    path.write_bytes(whole[:keep])
    if keep == 100:  # once through children; what comes of the others is the same
        again = rehearse(tmp_path, "only_channels_last")
        assert again.verdict.best() == CHANNELS_LAST
        assert rehearse(tmp_path, "nothing").verdict.best() == CHANNELS_LAST
        (told,) = (line for line in again.said if "cannot be used" in line)
    else:
        lines: list[str] = []
        assert resolve(some_setting(), CPU, cache_dir=tmp_path, measuring=False, say=lines.append).rows == ()
        (told,) = lines
    assert told.startswith(f"{path} cannot be used and will be measured again: it is not whole")


def test_two_processes_measure_once(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_calibration import rehearse
found = rehearse(Path({str(tmp_path)!r}), "only_channels_last")
print(found.verdict.origin)
"""
    command = [sys.executable, "-c", code]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    origins = [other.communicate(timeout=300)[0].strip() for other in others]
    assert sorted(origin.split(" ")[1] for origin in origins) == ["before:", "now,"]


def test_where_nothing_can_be_measured_nothing_is_kept(tmp_path: Path) -> None:
    found = rehearse(tmp_path, "nothing")
    assert found.verdict.best() == EAGER
    assert "nothing could be measured, and the next start tries again (exit status 3" in found.verdict.origin
    assert list(rows_folder(tmp_path).glob("*.json")) == []


def test_calibration_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, rehearsal: Rehearsal) -> None:
    monkeypatch.setenv("FASTJEPA_CALIBRATE", "0")
    off = rehearse(rehearsal.folder, "nothing")
    assert off.verdict.best() == EAGER
    assert off.verdict.why_not(lambda choice: choice.batch_norm) == (
        "FASTJEPA_CALIBRATE=0 is set: eager, and nothing was measured"
    )
    monkeypatch.setenv("FASTJEPA_CALIBRATE", "no")
    with pytest.raises(ValueError, match=r"FASTJEPA_CALIBRATE must be 0 .* or 1; got 'no'"):
        rehearse(rehearsal.folder, "nothing")


# ---- the search ------------------------------------------------------------------------------------------------------


def search(purpose: Purpose, outcome: dict[Choice, Trial]) -> list[Choice]:
    """The candidates in order, where those not in `outcome` are exact, and as fast as eager."""
    trials: list[Trial] = []
    while (choice := next_choice(purpose, trials)) is not None:
        assert choice not in [t.choice for t in trials]
        trials.append(outcome.get(choice, trial(choice, 10.0)))
        assert len(trials) < 50
    return [t.choice for t in trials]


@pytest.mark.parametrize("purpose", ["train", "inference"])
def test_everything_comes_first_and_then_each_part_is_left_out(purpose: Purpose) -> None:
    top = everything(purpose)
    order = search(purpose, {top: trial(top, 1.0)})
    assert order[0] == top
    assert set(neighbours(purpose, top)) <= set(order)
    plain = dataclasses.replace(top, cuda_graph=False)
    assert order[1] == plain
    assert (set(single_parts(purpose)) - {plain}).isdisjoint(order[: len(list(neighbours(purpose, top)))])
    if purpose == "inference":
        assert not any(choice.recompute or choice.losses != "eager" for choice in order)


OWN = everything("inference")
OWN_PLAIN = dataclasses.replace(OWN, cuda_graph=False)
FEW = ("encoder.conv1", "predictor.up1")


def own(choice: Choice, milliseconds: float, faster: tuple[str, ...]) -> Trial:
    return trial(choice, milliseconds, faster_layers=faster)


def test_inference_tries_own_convolutions_then_the_layers_that_won_and_then_their_rival() -> None:
    some = Choice(cuda_graph=True, convolutions=",".join(FEW))
    order = search("inference", {OWN: own(OWN, 3.0, FEW), OWN_PLAIN: own(OWN_PLAIN, 9.0, FEW), some: trial(some, 2.0)})
    assert order == [
        OWN, OWN_PLAIN, some, rival(), dataclasses.replace(rival(), cuda_graph=False),
        # Around the best, and around the best without a graph.
        Choice(convolutions=some.convolutions), Choice(cuda_graph=True, channels_last=True), Choice(cuda_graph=True),
        Choice(channels_last=True),
    ]  # fmt: skip


@pytest.mark.parametrize("faster", [(), tuple(sorted(LAYERS)), None])
def test_where_all_layers_won_or_none_did_no_other_choice_of_them_is_tried(faster: tuple[str, ...] | None) -> None:
    order = search("inference", {OWN: trial(OWN, 3.0, faster_layers=faster)})
    assert {choice.convolutions for choice in order} == {"", "all"}
    assert order[2] == rival()
    assert len(order) <= 9


def test_layers_that_won_where_the_graph_does_not_work_are_tried_without() -> None:
    some = Choice(convolutions=",".join(FEW))
    order = search("inference", {OWN: trial(OWN, status="crashed"), OWN_PLAIN: own(OWN_PLAIN, 3.0, FEW)})
    assert order[:3] == [OWN, OWN_PLAIN, some]


@pytest.mark.parametrize("status", ["wrong", "failed", "crashed"])
def test_where_own_convolutions_do_not_work_fused_blocks_are_still_measured(status: str) -> None:
    broken = {choice: trial(choice, status=status) for choice in (OWN, OWN_PLAIN)}
    order = search("inference", {**broken, rival(): trial(rival(), 2.0)})
    assert order[:4] == [OWN, OWN_PLAIN, rival(), dataclasses.replace(rival(), cuda_graph=False)]
    assert sum(bool(choice.convolutions) for choice in order) == 2
    assert set(neighbours("inference", rival())) <= set(order)


@pytest.mark.parametrize("status", ["wrong", "failed", "crashed", "hung", "unavailable"])
def test_inference_where_no_kernels_work(status: str) -> None:
    tried: list[Choice] = []
    trials: list[Trial] = []
    while (choice := next_choice("inference", trials)) is not None:
        tried.append(choice)
        trials.append(trial(choice, status=status) if choice.needs_kernels else trial(choice, 5.0))
    assert {Choice(cuda_graph=True), Choice(channels_last=True), BOTH} <= set(tried)
    assert sum(choice.needs_kernels for choice in tried) <= 5


def test_after_a_cold_compiler_own_convolutions_are_tried_alone() -> None:
    hung = {choice: trial(choice, status="hung") for choice in (OWN, rival())}
    order = search("inference", {**hung, OWN_PLAIN: own(OWN_PLAIN, 2.0, FEW)})
    assert order[:4] == [OWN, rival(), OWN_PLAIN, Choice(convolutions=",".join(FEW))]


def test_training_knows_no_own_convolutions() -> None:
    for outcome in ({}, {ALL: trial(ALL, status="crashed")}, {ALL: trial(ALL, 1.0)}):
        assert not any(choice.convolutions for choice in search("train", outcome))


def test_what_is_not_allowed_of_the_layers_that_won_is_not_tried() -> None:
    trials = [own(OWN_PLAIN, 3.0, FEW)]
    while (choice := next_choice("inference", among(lambda c: not c.cuda_graph, trials))) is not None:
        assert not choice.cuda_graph
        trials.append(trial(choice, 2.0 if choice.convolutions else 5.0))
        assert len(trials) < 20
    assert Choice(convolutions=",".join(FEW)) in [t.choice for t in trials]


def test_a_verdict_by_layer(tmp_path: Path) -> None:
    """Through child processes: own convolutions are faster in some layers, and just those make the fastest whole."""
    setting = some_setting(purpose="inference", frames=2)
    found = rehearse(tmp_path, "some_layers_faster", setting)
    assert [row.choice for row in found.verdict.rows[:3]] == [OWN, OWN_PLAIN, SOME]
    assert found.of(OWN).faster_layers == found.of(OWN_PLAIN).faster_layers == SOME_LAYERS
    assert found.of(SOME).faster_layers is None
    assert found.verdict.best() == SOME
    assert found.verdict.best(lambda choice: not choice.cuda_graph) == dataclasses.replace(SOME, cuda_graph=False)
    report = found.verdict.report(SOME)
    assert "→ own convolutions (3 of 25 layers) + CUDA graph: " in report
    left = next(line for line in report.splitlines() if line.startswith("    torch's convolutions run "))
    assert set(left.removeprefix("    torch's convolutions run ").split(", ")) == set(LAYERS) - set(SOME_LAYERS)
    assert str(found.of(OWN)).endswith(" exact; alone, 3 of 25 layers are faster than torch's")
    again = rehearse(tmp_path, "nothing", setting)
    assert again.said == []
    assert again.verdict.rows == found.verdict.rows


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (Memory(keeping=3, recomputing=2, free=9), [False, True]),
        (Memory(keeping=3, recomputing=2, free=2), [True]),
        (Memory(keeping=3, recomputing=2, free=1), [True, False]),
    ],
)
def test_recomputation_is_tried_as_counted_memory_says(memory: Memory, expected: list[bool]) -> None:
    """Both ways where both fit, and only recomputation where nothing else does; the likelier first."""
    trials: list[Trial] = []

    def following() -> Choice | None:
        return next_choice("train", among(memory.allows, trials), memory.recompute)

    while (choice := following()) is not None:
        trials.append(trial(choice, 5.0 if choice.needs_kernels else 10.0))
    fused = [t.choice.recompute for t in trials if t.choice.batch_norm]
    assert list(dict.fromkeys(fused)) == expected
    assert trials[0].choice == everything("train", recompute=expected[0])


def test_where_a_count_was_wrong_recomputation_is_tried_all_the_same() -> None:
    top = everything("train", recompute=False)
    plain = dataclasses.replace(top, cuda_graph=False)
    trials = [trial(top, status="out of memory"), trial(plain, status="out of memory")]
    assert next_choice("train", trials, recompute=False) == everything("train", recompute=True)
    # One that needed a second process has said enough.
    assert next_choice("train", trials[:1], recompute=False) == plain
    trials = [trial(top, status="crashed"), trial(plain, status="crashed")]
    assert next_choice("train", trials, recompute=False) == Choice(losses="fused")


def test_children_begin_with_what_memory_allows(tmp_path: Path) -> None:
    """Over two starts, between which memory has become scarce: what was measured before is not forgotten."""
    plenty, scarce = Memory(3, 2, 9), Memory(3, 2, 2)
    first = rehearse(tmp_path, "many", allowed=plenty.allows, recompute=plenty.recompute)
    assert first.verdict.rows[0].choice == everything("train", recompute=False)
    assert first.verdict.best(plenty.allows) == MANY_BEST
    second = rehearse(tmp_path, "many", allowed=scarce.allows, recompute=scarce.recompute)
    assert second.verdict.rows[: len(first.verdict.rows)] == first.verdict.rows
    new = [row.choice for row in second.verdict.rows[len(first.verdict.rows) :]]
    assert all(choice.recompute or not choice.batch_norm for choice in new)
    assert second.verdict.best(scarce.allows) == dataclasses.replace(MANY_BEST, recompute=True)


@pytest.mark.parametrize("status", ["crashed", "hung", "wrong", "unavailable", "failed"])
def test_where_kernels_do_not_work_the_rest_is_still_measured(status: str) -> None:
    tried = []
    trials: list[Trial] = []
    while (choice := next_choice("train", trials)) is not None:
        tried.append(choice)
        trials.append(trial(choice, status=status) if choice.needs_kernels else trial(choice, 5.0))
    assert {Choice(losses="closed_form"), Choice(cuda_graph=True), Choice(channels_last=True)} <= set(tried)
    assert Choice(losses="closed_form", cuda_graph=True, channels_last=True) in tried
    assert sum(choice.needs_kernels for choice in tried) <= 4  # everything, without a graph, and each op alone


def test_times_are_compared_relative_to_eager_beside_them() -> None:
    """The machine was twice as slow while the second was measured."""
    slow, fast = trial(BOTH, 4.0), Trial(CHANNELS_LAST, "exact", milliseconds=6.0, reference_milliseconds=20.0)
    verdict = Verdict(some_setting(), (slow, fast), "")
    assert verdict.best() == CHANNELS_LAST


def test_what_is_hardly_faster_than_eager_is_noise() -> None:
    assert Verdict(some_setting(), (trial(BOTH, 9.9),), "").best() == EAGER
    assert Verdict(some_setting(), (trial(BOTH, 9.0),), "").best() == BOTH
    # Where only a graph is allowed, eager is none of the choices.
    graph = Choice(cuda_graph=True)
    assert Verdict(some_setting(), (trial(BOTH, 9.9),), "").best(lambda c: c.cuda_graph, graph) == BOTH


def test_where_eager_does_not_fit_the_fastest_wins() -> None:
    rows = tuple(Trial(choice, "exact", milliseconds=ms) for choice, ms in ((BOTH, 5.0), (CHANNELS_LAST, 4.0)))
    assert Verdict(some_setting(), rows, "").best() == CHANNELS_LAST


def test_a_child_is_told_which_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr(
        "fastjepa.calibration.verdict.measure",
        lambda setting, device, say, **_: asked.append(device) or (trial(BOTH, 4.0),),  # type: ignore[func-returns-value]
    )
    for name in ("cuda", "cuda:1"):
        resolve(some_setting(), torch.device(name), cache_dir=tmp_path, redo=True, say=lambda _: None)
    assert asked == ["cuda:3", "cuda:1"]


def test_rows_that_cannot_be_kept_still_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastjepa.calibration.verdict.measure", lambda *_, **__: (trial(BOTH, 4.0),))
    blocked = tmp_path / "file"
    blocked.touch()
    verdict = resolve(some_setting(), CPU, cache_dir=blocked, say=lambda _: None)
    assert verdict.best() == BOTH
    assert verdict.origin.startswith("measured now, but not kept: ")
    assert "every start will measure again, unless --cache_dir (of commands) or XDG_CACHE_HOME" in verdict.origin
    assert verdict.origin.endswith("or FASTJEPA_CALIBRATE=0 is set")


@pytest.mark.parametrize("purpose", get_args(Purpose))
def test_inference_has_the_time_to_compile_its_kernels(
    purpose: Purpose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    monkeypatch.setattr("fastjepa.calibration.verdict.measure", lambda *_, limits, **__: given.append(limits) or ())
    setting = dataclasses.replace(some_setting(), purpose=purpose)
    resolve(setting, CPU, cache_dir=tmp_path, say=lambda _: None)
    (limits,) = given
    assert limits == children.Limits.of(purpose)
    training = children.Limits.of("train")
    assert (limits.candidate > training.candidate) == (limits.total > training.total) == (purpose == "inference")
    assert limits.start + limits.candidate <= limits.total
