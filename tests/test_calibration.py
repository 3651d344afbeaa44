"""A calibration rehearsed without a GPU: stand-ins that crash, hang, are wrong, slow, or need too much memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from calibration_standins import BOTH, CHANNELS_LAST, LIMITS, some_setting, trial
from fastjepa.calibration.choice import EAGER, Choice
from fastjepa.calibration.search import everything, neighbours, next_choice, single_parts
from fastjepa.calibration.setting import Purpose
from fastjepa.calibration.store import rows_folder, rows_path
from fastjepa.calibration.trial import Trial
from fastjepa.calibration.verdict import Verdict, resolve

CPU = torch.device("cpu")
ALL = everything("train")


@dataclass
class Rehearsal:
    verdict: Verdict
    said: list[str]
    folder: Path

    def of(self, choice: Choice) -> Trial:
        return next(row for row in self.verdict.rows if row.choice == choice)


def rehearse(cache: Path, makers: str, **options: bool) -> Rehearsal:
    said: list[str] = []
    verdict = resolve(
        some_setting(), CPU, cache_dir=cache, makers=f"calibration_standins:{makers}", limits=LIMITS, say=said.append,
        **options,  # type: ignore[arg-type]
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


def test_later_starts_read_the_file(rehearsal: Rehearsal) -> None:
    again = rehearse(rehearsal.folder, "nothing")
    assert again.said == []
    assert again.verdict.rows == rehearsal.verdict.rows
    assert again.verdict.origin.startswith("measured before: ")


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
    assert "nothing could be measured, so nothing was kept (exit status 3" in found.verdict.origin
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
    assert set(single_parts(purpose)).isdisjoint(order[: len(list(neighbours(purpose, top)))])
    if purpose == "inference":
        assert not any(choice.recompute or choice.losses != "eager" for choice in order)


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
