"""What a run resolves when it starts, saves, and goes on with; on a pretended GPU where one is meant."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration_standins import LIMITS, some_setting, trial
from fastjepa import evaluate
from fastjepa.calibration.choice import Choice
from fastjepa.calibration.memory import Memory
from fastjepa.calibration.search import among, everything, next_choice
from fastjepa.calibration.setting import Setting
from fastjepa.calibration.store import read_rows, rows_folder, write_rows
from fastjepa.calibration.trial import Trial
from fastjepa.calibration.verdict import Verdict, resolve
from fastjepa.config import Config, resolve_precision
from fastjepa.files.safe_files import CheckpointError
from fastjepa.optional_packages import missing_packages
from fastjepa.storage.checkpoint import load_checkpoint, save_checkpoint
from fastjepa.storage.run_folder import CHECKPOINT_NAME
from fastjepa.training import resolution
from fastjepa.training.command_line import describe, parse_config
from fastjepa.training.resolution import Resolution, read_choice, resolution_of, resolve_run
from fastjepa.training.trainer import Trainer

TINY = (
    "--device cpu --preset demo --henc 2 --hpre 2 --dstc 4 --canvas 16 --digit_size 8 --n_train 6 --n_val 3 "
    "--n_frames 5 --batch_size 3 --epochs 2"
).split()
ALL = everything("train")
PLAIN = dataclasses.replace(ALL, cuda_graph=False)
MIXED = dataclasses.replace(PLAIN, recompute=False)
EAGER_GRAPH = Choice(cuda_graph=True, channels_last=True)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a test says what."""
    monkeypatch.setattr(resolution, "memory_on", lambda *_: "")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if missing := missing_packages("tyro", "torchmetrics", "cv2", "sklearn"):
        pytest.skip(f"needs what is not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("runs")
    flags = [*TINY, "--max_steps", "1", "--cache_dir", str(folder / "cache"), "--out", str(folder / "run")]
    Trainer(parse_config(flags)).run()
    return folder / "run"


def copy_of(run: Path, folder: Path, **changes: Any) -> Path:
    """The run with another record of what was resolved; None takes the record away."""
    folder.mkdir()
    state = load_checkpoint(run / CHECKPOINT_NAME)
    if changes.get("resolved", ...) is None:
        del state["resolved"]
    else:
        state["resolved"] |= changes
    save_checkpoint(folder / CHECKPOINT_NAME, state)
    return folder


def resume(folder: Path, *flags: str) -> Trainer:
    return Trainer(parse_config(["--resume", str(folder), "--device", "cpu", *flags]))


# ---- a new run -------------------------------------------------------------------------------------------------------


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_precision("auto", CPU) == "fp32"
    assert resolve_precision("tf32", GPU) == "tf32"
    for capability, expected in (((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _, capability=capability: capability)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
        monkeypatch.setattr("torch.cuda.device", lambda _: torch.no_grad())
        assert resolve_precision("auto", GPU) == expected


def test_a_command_line_says_the_precision_and_what_changes_it(run: Path) -> None:
    config = parse_config(TINY)
    assert config.precision == "fp32"
    assert parse_config([*TINY, "--precision", "auto"]).precision == "fp32"
    first_lines = describe(resume(run)).splitlines()[:2]
    assert first_lines[1].startswith("precision fp32 (--precision changes it); computes with: closed-form losses")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, Choice(losses="closed_form", channels_last=True)),
        ({"backend": "eager"}, Choice(channels_last=True)),
        ({"backend": "fused"}, PLAIN),
    ],
)
def test_on_a_cpu_nothing_is_measured(flags: dict[str, Any], expected: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolution, "resolve", lambda *_, **__: pytest.fail("it measures"))
    assert resolve_run(Config(precision="fp32", **flags), CPU) == Resolution("fp32", expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ALL),
        ({"cuda_graph": "off"}, PLAIN),
        ({"cuda_graph": "on"}, ALL),
        ({"backend": "fused"}, ALL),
        ({"backend": "eager"}, EAGER_GRAPH),
        # Both said: nothing is left to measure but what has defaults.
        ({"backend": "fused", "cuda_graph": "on"}, ALL),
        ({"backend": "fused", "cuda_graph": "off"}, PLAIN),
        ({"backend": "eager", "cuda_graph": "on"}, EAGER_GRAPH),
        ({"backend": "eager", "cuda_graph": "off"}, Choice(channels_last=True)),
    ],
)
def test_on_a_gpu_the_best_that_flags_allow(
    flags: dict[str, Any], expected: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (
        trial(ALL, 2.0), trial(PLAIN, 4.0), trial(EAGER_GRAPH, 6.0), trial(Choice(losses="closed_form"), 8.0),
        trial(Choice(channels_last=True), 11.0),
    )  # fmt: skip
    asked = []

    def pretended(
        setting: Any, device: torch.device, *, allowed: Any, recompute: bool, cache_dir: Path | None
    ) -> Verdict:
        asked.append((setting, cache_dir))
        return Verdict(some_setting(), rows, "pretended")

    monkeypatch.setattr(resolution, "resolve", pretended)
    monkeypatch.setattr(resolution, "setting_of_config", lambda *arguments: arguments[-1])
    found = resolve_run(Config(precision="bf16", cache_dir=Path("x"), **flags), GPU)
    assert (found.precision, found.choice) == ("bf16", expected)
    if "auto" in (flags.get("backend", "auto"), flags.get("cuda_graph", "auto")):
        assert asked == [("bf16", Path("x"))]
        assert "pretended" in found.report
    else:
        assert asked == []


def rows_of_a_search(allowed: Callable[[Choice], bool], statuses: dict[Choice, str]) -> tuple[Trial, ...]:
    """What the search finds where each part takes a millisecond off, a graph two, and recomputation gives half of one
    back; choices in `statuses` end so instead.
    """
    rows: list[Trial] = []
    while (choice := next_choice("train", among(allowed, rows))) is not None:
        parts = choice.batch_norm - choice.recompute / 2 + (choice.losses == "fused") + choice.channels_last
        parts += 2 * choice.cuda_graph
        status = statuses.get(choice, "exact")
        rows.append(trial(choice, 9.0 - parts) if status == "exact" else trial(choice, status=status))
    return tuple(rows)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"backend": "eager"}, EAGER_GRAPH),
        ({"cuda_graph": "off"}, dataclasses.replace(PLAIN, recompute=False)),
        ({"cuda_graph": "on"}, dataclasses.replace(ALL, recompute=False)),
        ({"backend": "fused"}, dataclasses.replace(ALL, recompute=False)),
    ],
)
def test_a_search_tries_what_flags_allow(
    flags: dict[str, Any], expected: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so finds the best of it, where a search among everything would walk elsewhere."""
    found: list[Trial] = []

    def searched(setting: Any, device: torch.device, *, allowed: Any, recompute: bool, cache_dir: Any) -> Verdict:
        found.extend(rows_of_a_search(allowed, {}))
        assert all(allowed(row.choice) for row in found)
        return Verdict(some_setting(), tuple(found), "searched")

    monkeypatch.setattr(resolution, "resolve", searched)
    monkeypatch.setattr(resolution, "setting_of_config", lambda *arguments: arguments[-1])
    assert resolve_run(Config(precision="bf16", **flags), GPU).choice == expected
    assert len(found) >= 3


def test_backend_eager_is_measured_in_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a search among everything, whose rows it keeps, and with no candidate that has kernels."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(resolution, "setting_of_config", lambda *_: some_setting())

    def on_the_cpu(setting: Setting, device: torch.device, **options: Any) -> Verdict:
        return resolve(
            setting, CPU, makers="calibration_standins:all_work", limits=LIMITS, say=lambda _: None, **options
        )

    monkeypatch.setattr(resolution, "resolve", on_the_cpu)
    before = rows_of_a_search(lambda choice: choice.needs_kernels, {})
    path = write_rows(some_setting(), before, rows_folder(tmp_path))
    config = Config(precision="bf16", backend="eager", cache_dir=tmp_path)
    assert resolve_run(config, GPU).choice == EAGER_GRAPH
    rows = read_rows(path)[1]
    assert rows[: len(before)] == before
    assert {row.choice for row in rows[len(before) :]} == {
        EAGER_GRAPH, Choice(cuda_graph=True), Choice(channels_last=True)
    }  # fmt: skip


def test_where_nothing_allowed_was_measured_it_is_the_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not contiguous eager step by step, only because that has been timed beside the others."""
    rows = (trial(ALL, 2.0), trial(PLAIN, 4.0))
    monkeypatch.setattr(resolution, "resolve", lambda *_, **__: Verdict(some_setting(), rows, ""))
    monkeypatch.setattr(resolution, "setting_of_config", lambda *arguments: arguments[-1])
    usual = Choice(channels_last=True)
    assert resolve_run(Config(precision="bf16", backend="eager"), GPU).choice == usual
    rows += (trial(usual, status="crashed"),)  # but not if it is known not to work
    assert resolve_run(Config(precision="bf16", backend="eager"), GPU).choice == Choice()


@pytest.mark.parametrize(
    ("flags", "status", "attempts", "asked"),
    [
        ({"backend": "fused"}, "wrong", 1, "--backend fused"),
        ({"backend": "fused", "cuda_graph": "auto"}, "crashed", 1, "--backend fused"),
        ({"backend": "fused"}, "failed", 1, "--backend fused"),
        ({"backend": "fused"}, "hung", 2, "--backend fused"),
        ({"backend": "fused"}, "hung", 1, None),  # perhaps its first compilation
        ({"backend": "fused"}, "out of memory", 2, None),  # which says nothing about its numbers, and fails by itself
        ({"backend": "auto"}, "wrong", 1, None),
    ],
)
def test_what_was_found_not_to_work_is_not_run_because_it_was_asked_for(
    flags: dict[str, Any], status: Any, attempts: int, asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both with the very choice that would be run, and where only its like was tried."""
    monkeypatch.setattr(resolution, "setting_of_config", lambda *arguments: arguments[-1])
    config = Config(precision="bf16", **flags)
    for choices in ([ALL, PLAIN], [ALL]):
        rows = [trial(c, status=status, attempts=attempts, reason="some\x1b reason") for c in choices]
        verdict = Verdict(some_setting(), (trial(Choice(channels_last=True), 5.0), *rows), "measured before: there")
        monkeypatch.setattr(resolution, "resolve", lambda *_, verdict=verdict, **__: verdict)
        if asked is None:
            expected = PLAIN if flags["backend"] == "fused" else Choice(channels_last=True)
            assert resolve_run(config, GPU).choice == expected
        else:
            with pytest.raises(ValueError, match=rf"{asked} cannot be served here: .*: {status}: some\? reason; leave"):
                resolve_run(config, GPU)
        works = dataclasses.replace(verdict, rows=(*verdict.rows, trial(MIXED, 5.0)))
        monkeypatch.setattr(resolution, "resolve", lambda *_, works=works, **__: works)
        assert resolve_run(config, GPU).choice in (MIXED, Choice(channels_last=True))


def test_what_may_work_at_the_next_start_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (trial(ALL, status="wrong"), Trial(PLAIN, "not measured", "the time was over"))
    monkeypatch.setattr(resolution, "resolve", lambda *_, **__: Verdict(some_setting(), rows, ""))
    monkeypatch.setattr(resolution, "setting_of_config", lambda *arguments: arguments[-1])
    assert resolve_run(Config(precision="bf16", backend="fused"), GPU).choice == PLAIN


def test_a_graph_that_was_found_not_to_work_is_no_different(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (trial(EAGER_GRAPH, status="crashed"), trial(Choice(channels_last=True), 5.0))
    monkeypatch.setattr(resolution, "resolve", lambda *_, **__: Verdict(some_setting(), rows, ""))
    monkeypatch.setattr(resolution, "setting_of_config", lambda *arguments: arguments[-1])
    monkeypatch.setattr(resolution, "use_cuda_graph", lambda *_: True)
    with pytest.raises(ValueError, match="--cuda_graph on cannot be served here: nothing with it works, for example"):
        resolve_run(Config(precision="bf16", cuda_graph="on"), GPU)


# ---- recomputation ---------------------------------------------------------------------------------------------------

PLENTY, SCARCE = Memory(keeping=3, recomputing=2, free=9), Memory(keeping=3, recomputing=2, free=2)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """A GPU with such memory, on which such rows were measured; gives what the calibration is asked."""

    def pretend(memory: Memory | str | None, rows: tuple[Trial, ...] = ()) -> list[Any]:
        asked: list[Any] = []

        def counted(setting: Any, device: torch.device, clips: int) -> Memory | str:
            assert memory is not None, "it counts"
            assert (setting, device) == ("bf16", GPU)
            asked.append(clips)
            return memory

        def measured(setting: Any, device: torch.device, **options: Any) -> Verdict:
            asked.append(options)
            return Verdict(some_setting(), rows, "pretended")

        monkeypatch.setattr(resolution, "unavailable_reason", lambda _: None)
        monkeypatch.setattr(resolution, "setting_of_config", lambda *arguments: arguments[-1])
        monkeypatch.setattr(resolution, "memory_on", counted)
        monkeypatch.setattr(resolution, "resolve", measured)
        monkeypatch.setattr(resolution, "use_cuda_graph", lambda choice, _: choice == "on")
        return asked

    return pretend


@pytest.mark.parametrize("graph", ["on", "off"])
@pytest.mark.parametrize(
    ("flag", "memory", "expected"),
    [
        ("auto", PLENTY, False),
        ("auto", SCARCE, True),
        ("auto", "it is not known", True),
        ("on", None, True),
        ("off", None, False),
    ],
)
def test_where_nothing_is_measured_memory_is_counted(
    pretend: Any, graph: str, flag: Any, memory: Any, expected: bool
) -> None:
    asked = pretend(memory)
    found = resolve_run(Config(precision="bf16", backend="fused", cuda_graph=graph, recompute=flag), GPU)  # type: ignore[arg-type]
    assert found.choice == dataclasses.replace(PLAIN, recompute=expected, cuda_graph=graph == "on")
    assert found.report == str(memory or "")
    assert asked == ([] if memory is None else [20_000 * 10 * (64 * 64 + 8 * 8)])  # the clips of the recipe


@pytest.mark.parametrize(
    ("flags", "memory", "expected", "first"),
    [
        ({}, PLENTY, dataclasses.replace(ALL, recompute=False), False),
        ({}, SCARCE, ALL, True),
        ({"recompute": "on"}, None, ALL, True),
        ({"recompute": "off"}, None, dataclasses.replace(ALL, recompute=False), False),
        ({"recompute": "on", "cuda_graph": "off"}, None, PLAIN, True),
        ({"backend": "fused"}, SCARCE, ALL, True),
        ({"backend": "eager"}, None, EAGER_GRAPH, True),
        ({"backend": "eager", "recompute": "off"}, None, EAGER_GRAPH, False),
    ],
)
def test_where_it_is_measured_memory_and_flags_say_what_is_tried(
    pretend: Any, flags: dict[str, Any], memory: Memory | None, expected: Choice, first: bool
) -> None:
    keeping = dataclasses.replace(ALL, recompute=False)
    rows = (trial(keeping, 2.0), trial(ALL, 2.5), trial(MIXED, 3.0), trial(PLAIN, 3.5), trial(EAGER_GRAPH, 6.0))
    asked = pretend(memory, rows)
    found = resolve_run(Config(precision="bf16", **flags), GPU)
    assert found.choice == expected
    assert asked[-1]["recompute"] == first
    assert asked[-1]["allowed"](expected)
    if expected == ALL:
        assert not asked[-1]["allowed"](keeping)
    assert found.report.endswith("" if memory is None else f"\n  {memory}")


def test_recomputation_that_is_asked_for_is_served_unmeasured(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By fused networks, which it asks for too; and fails where it is known not to work."""
    pretend(None)
    assert resolve_run(Config(precision="bf16", recompute="on"), GPU).choice == PLAIN
    pretend(None, (trial(PLAIN, status="wrong"), trial(Choice(channels_last=True), 5.0)))
    with pytest.raises(ValueError, match="--recompute on cannot be served here: nothing with it works, for example "):
        resolve_run(Config(precision="bf16", recompute="on"), GPU)
    pretend(None)
    monkeypatch.setenv("FASTJEPA_CALIBRATE", "0")  # and auto is eager, whatever memory there is
    assert resolve_run(Config(precision="bf16"), GPU).choice == Choice(channels_last=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--backend eager --recompute on", "--recompute on is for fused networks, and --backend eager has none"),
        ("--recompute on", "--recompute on is for fused networks, which auto never takes on cpu; use auto or off"),
        ("--recompute maybe", "--recompute must be one of auto, on, off; got 'maybe'"),
    ],
)
@pytest.mark.packages("tyro")
def test_recomputation_without_fused_networks_is_refused(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_config([*TINY, *flags.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    asked = dataclasses.replace(parse_config(TINY), recompute=flags.split()[-1])  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^--recompute (must be auto, on or off; got 'maybe'|on is for fused networks)"
    ):
        resolve_run(asked, CPU)


@pytest.mark.packages("tyro")
def test_no_recomputation_is_always_served_and_recomputation_by_kernels(interpreted: None) -> None:
    for flags in ("--recompute off", "--backend eager --recompute off", "--backend fused --recompute off"):
        config = parse_config([*TINY, *flags.split()])
        assert not resolve_run(config, CPU).choice.recompute
    assert resolve_run(parse_config([*TINY, "--backend", "fused", "--recompute", "on"]), CPU).choice == PLAIN


@pytest.mark.packages("tyro")
def test_recomputation_where_kernels_cannot_run(needs_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastjepa.kernels.launch.INTERPRET", False)
    config = dataclasses.replace(parse_config(TINY), backend="fused", recompute="on")
    with pytest.raises(ValueError, match="--recompute on is for fused networks, which cannot be served: Triton kernel"):
        resolve_run(config, CPU)


def test_a_resumed_run_may_recompute_or_not(run: Path, tmp_path: Path, interpreted: None) -> None:
    """Which changes no number; and keeps to what it began with unless told otherwise."""
    fused = copy_of(run, tmp_path / "fused", batch_norm=True, recompute=True)
    assert resume(fused).jepa.encoder.recompute
    other = resume(fused, "--recompute", "off")
    assert not other.jepa.encoder.recompute
    other.save()
    other._run_folder.release()
    assert not resume(fused).jepa.encoder.recompute
    resolved = {"resolved": {"precision": "fp32", **Choice(batch_norm=True).to_json()}}
    again = Config(precision="fp32", recompute="on")
    assert resolution_of(resolved, again, CPU, tmp_path).choice == Choice(batch_norm=True, recompute=True)
    with pytest.raises(ValueError, match=r"began without \(closed-form losses \+ channels-last\); use auto or off"):
        resolution_of(load_checkpoint(run / CHECKPOINT_NAME), again, CPU, run / CHECKPOINT_NAME)
    with pytest.raises(ValueError, match=r"began without \(channels-last\); use auto or off"):
        resolution_of({}, dataclasses.replace(again, precision="bf16"), GPU, run / CHECKPOINT_NAME)


# ---- saved, and gone on with -----------------------------------------------------------------------------------------


def test_a_run_saves_what_it_resolved(run: Path) -> None:
    expected = {"precision": "fp32", **Choice(losses="closed_form", channels_last=True).to_json()}
    assert load_checkpoint(run / CHECKPOINT_NAME)["resolved"] == expected
    assert json.loads((run / "environment.json").read_text())["resolved"] == expected
    assert json.loads((run / "config.json").read_text())["precision"] == "fp32"


def test_a_resumed_run_computes_as_it_began(run: Path, tmp_path: Path) -> None:
    """Not as a new one would."""
    began = resume(copy_of(run, tmp_path / "run", losses="eager", channels_last=False))
    assert began.resolution.choice == Choice()
    assert began.step.projection == "eager"
    assert began.jepa.acceleration.swapped == ()
    assert began.jepa.encoder.conv1.weight.is_contiguous()
    began.save()
    assert read_choice(load_checkpoint(tmp_path / "run" / CHECKPOINT_NAME), tmp_path) == Choice()


def test_a_run_from_before_own_convolutions_is_read(tmp_path: Path) -> None:
    began = Choice(batch_norm=True, losses="fused", recompute=True)
    record = {"precision": "fp32", **began.to_json()}
    del record["convolutions"]
    assert read_choice({"resolved": record}, tmp_path) == began


def test_a_run_from_before_goes_on_as_it_did(run: Path, tmp_path: Path) -> None:
    old = resume(copy_of(run, tmp_path / "run", resolved=None), "--max_steps", "2")
    assert old.resolution.choice == Choice(losses="closed_form", channels_last=True)
    old.run()
    assert old.global_step == 2
    assert resolution_of({}, Config(precision="fp32"), GPU, tmp_path).choice == Choice()
    assert resolution_of({}, Config(precision="bf16"), GPU, tmp_path).choice == Choice(channels_last=True)


def test_what_cannot_be_served_where_it_goes_on_fails(
    run: Path, tmp_path: Path, needs_triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastjepa.kernels.launch.INTERPRET", False)
    fused = copy_of(run, tmp_path / "fused", losses="fused")
    with pytest.raises(ValueError, match=r"began with fused losses .*, which cannot be served here: Triton kernels"):
        resume(fused)
    graphed = copy_of(run, tmp_path / "graphed", cuda_graph=True)
    with pytest.raises(ValueError, match="began with CUDA graphs, and this runs on cpu; --cuda_graph off goes on"):
        resume(graphed)
    assert not resume(graphed, "--cuda_graph", "off").resolution.choice.cuda_graph


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"convolutions": "all"}, "what the run resolved is damaged: own convolutions are for inference"),
        ({"losses": "quick"}, "what the run resolved is damaged: losses must be one of"),
        ({"colour": 1}, "what the run resolved is damaged: a choice has the fields"),
        ({"precision": 1}, "what the run resolved is damaged: it is no table with a precision"),
        ({"precision": "bf16"}, "was resolved to 'bf16', not 'fp32'"),
    ],
)
def test_a_damaged_record_is_refused(run: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resume(copy_of(run, tmp_path / "run", **changes))


def test_a_run_of_fused_blocks_is_evaluated_anywhere(
    run: Path, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fused = copy_of(run, tmp_path / "run", batch_norm=True, recompute=True)
    _, jepa, *_ = evaluate.load_run(fused, torch.device(device))
    assert type(jepa.encoder).__name__ == "FusedResNet5"
    monkeypatch.setattr("fastjepa.kernels.launch.INTERPRET", False)
    _, jepa, *_ = evaluate.load_run(fused, CPU)
    assert type(jepa.encoder).__name__ == "ResNet5"
    assert "which cannot run here (Triton kernels need a CUDA device" in caplog.text
