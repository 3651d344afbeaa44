"""Rows on disk: the key, the file, the lock, the rows of the package, and the command that shows them."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration_standins import BOTH, CHANNELS_LAST, some_setting, trial
from fastjepa import calibrate
from fastjepa.calibration import setting as setting_module
from fastjepa.calibration import store
from fastjepa.calibration.choice import Choice
from fastjepa.calibration.layers import LAYERS, LAYERS_OF
from fastjepa.calibration.memory import Memory
from fastjepa.calibration.setting import Setting, setting_of_config, setting_of_jepa, sources_hash
from fastjepa.calibration.store import (
    MEASURED,
    LockTimeoutError,
    find_rows,
    only_one_process,
    read_rows,
    rows_path,
    write_rows,
)
from fastjepa.calibration.trial import Trial
from fastjepa.calibration.verdict import Verdict
from fastjepa.config import Config
from fastjepa.fused.folded_networks import FoldedEncoder, FoldedPredictor
from original import original_jepa
from tiny import tiny_jepa

CPU = torch.device("cpu")
ROWS = (trial(BOTH, 4.0, error=1e-7, bound=1e-5, checked_batch=1, rounds=5), trial(CHANNELS_LAST, status="hung"))


def test_rows_survive(tmp_path: Path) -> None:
    setting = some_setting()
    path = write_rows(setting, ROWS, tmp_path / "calibration")
    assert read_rows(path) == (setting, ROWS)
    assert find_rows(setting, path.parent, pytest.fail) == (ROWS, path)
    assert find_rows(some_setting(batch=2), path.parent, pytest.fail) is None


@pytest.mark.parametrize("faster", [None, (), ("encoder.conv1", "predictor.up1"), tuple(sorted(LAYERS))])
def test_rows_of_own_convolutions_survive(faster: tuple[str, ...] | None, tmp_path: Path) -> None:
    setting = some_setting(purpose="inference")
    some = Choice(cuda_graph=True, convolutions="encoder.conv1,predictor.up1")
    rows = (trial(Choice(convolutions="all"), 4.0, faster_layers=faster), trial(some, 3.0))
    assert read_rows(write_rows(setting, rows, tmp_path)) == (setting, rows)


def test_rows_of_before_own_convolutions_are_measured_again(tmp_path: Path) -> None:
    """They were made by other code, so that no start looks for them; who shows all of them is told."""
    path = write_rows(some_setting(), ROWS, tmp_path)
    values = json.loads(path.read_text())
    for row in values["trials"]:
        del row["choice"]["convolutions"], row["faster_layers"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="a trial is a table of choice, status"):
        read_rows(path)
    path.write_text(json.dumps({**values, "version": 2}))
    with pytest.raises(ValueError, match="it has version 2; this fastjepa reads 3"):
        read_rows(path)


def test_an_error_without_limit_is_kept_as_none(tmp_path: Path) -> None:
    rows = (trial(BOTH, status="wrong", error=float("inf"), bound=1.0),)
    assert read_rows(write_rows(some_setting(), rows, tmp_path))[1][0].error is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "it is not a file of calibration"),
        ({"version": 1}, "it has version 1; this fastjepa reads 3"),
        ({"trials": []}, "it has no trials"),
        ({"trials": [1]}, "a trial is a table of choice, status"),
        ({"trials": "same twice"}, "it has two rows for one candidate"),
        ({"setting": {"batch": "2"}}, "batch must be int, got '2'"),
        ({"setting": {"batch": True}}, "batch must be int, got True"),
        ({"setting": {"batch": 0}}, "batch must be at least 1, got 0"),
        ({"setting": {"purpose": "fun"}}, "purpose must be one of train, inference; got 'fun'"),
        ({"setting": {"colour": 1}}, "a setting is a table of gpu"),
        ({"trial": {"status": "great"}}, "status must be one of exact, wrong"),
        ({"trial": {"milliseconds": None}}, "an exact candidate has its time"),
        ({"trial": {"milliseconds": -1.0}}, "milliseconds must be a number ≥ 0 or null, got -1.0"),
        ({"trial": {"milliseconds": 0}}, "milliseconds must be from 1e-06 to 1e+09, got 0"),
        ({"trial": {"milliseconds": 10**400}}, "milliseconds must be at most 1e+100, got 1000"),
        ({"trial": {"milliseconds": 1e-300}}, "milliseconds must be from 1e-06 to 1e+09, got 1e-300"),
        ({"trial": {"reference_milliseconds": 10**4200}}, "reference_milliseconds must be at most"),
        ({"trial": {"error": float("inf")}}, "error must be at most 1e+100, got inf"),
        ({"trial": {"error": float("nan")}}, "error must be a number ≥ 0 or null, got nan"),
        ({"trial": {"rounds": 10**400}}, "rounds must be a whole number ≥ 1 or null, got 1000"),
        ({"trial": {"reason": "\x1b[2J"}}, "reason must be printable text of at most 300 characters"),
        ({"trial": {"reason": "\ud800"}}, "reason must be printable text of at most 300 characters"),
        ({"trial": {"reason": "x" * 301}}, "reason must be printable text of at most 300 characters"),
        ({"setting": {"gpu": "\x1b[2J"}}, "gpu must be printable text of at most 200 characters"),
        ({"setting": {"gpu": "x" * 201}}, "gpu must be printable text of at most 200 characters"),
        ({"setting": {"batch": 10**400}}, "batch must be at most 2147483648, got 1000"),
        ({"choice": {"\x1b[2J\ud800": 1}}, "convolutions, ?[2J?"),
        ({"version": "\x1b" * 999}, "it has version '"),
        ({"trial": {"error": "1"}}, "error must be a number ≥ 0 or null, got '1'"),
        ({"trial": {"rounds": 1.5}}, "rounds must be a whole number ≥ 1 or null, got 1.5"),
        ({"trial": {"attempts": 0}}, "attempts must be a whole number ≥ 1, got 0"),
        ({"trial": {"reason": 1}}, "status and reason must be text"),
        ({"trial": {"choice": 1}}, "a choice is a table of fields, got int"),
        ({"choice": {"cuda_graph": 1}}, "cuda_graph must be bool, got 1"),
        ({"choice": {"losses": "quick"}}, "losses must be one of eager, closed_form, fused; got 'quick'"),
        ({"choice": {"recompute": True}}, "recompute belongs to the fused networks: it needs batch_norm"),
        ({"choice": {"convolutions": True}}, "convolutions must be str, got True"),
        (
            {"choice": {"convolutions": "\x1b[2J"}},
            "convolutions must be names of layers as encoder.conv1 or predictor.",
        ),
        ({"choice": {"convolutions": "encoder.conv1,"}}, "convolutions must be names of layers as encoder.conv1 or "),
        ({"choice": {"convolutions": "predictor.up1,encoder.conv1"}}, "convolutions must be sorted, and each layer in"),
        ({"choice": {"convolutions": "encoder.conv1,encoder.conv1"}}, "convolutions must be sorted, and each layer in"),
        ({"choice": {"convolutions": ",".join(sorted(LAYERS))}}, "convolutions names every layer; say 'all'"),
        ({"choice": {"convolutions": "all", "batch_norm": True}}, "convolutions are of networks with BatchNorm folded"),
        ({"choice": {"convolutions": "all"}}, "it has a row of training with own convolutions"),
        ({"trial": {"faster_layers": "all"}}, "faster_layers must be a list of names or null, got 'all'"),
        ({"trial": {"faster_layers": [1]}}, "faster_layers must be a list of names or null, got [1]"),
        ({"trial": {"faster_layers": ["up1"]}}, "faster_layers must be names of layers as encoder.conv1 or predictor."),
        ({"trial": {"faster_layers": []}}, "faster_layers belong to own convolutions in all layers that were found"),
        ({"choice": {"colour": 1}}, "a choice has the fields batch_norm, losses"),
    ],
)
def test_every_field_of_a_file_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_rows(some_setting(), ROWS, tmp_path)
    values = json.loads(path.read_text())
    for name, value in change.items():
        if name == "trial":
            values["trials"][0] |= value
        elif name == "choice":
            values["trials"][0]["choice"] |= value
        elif value == "same twice":
            values["trials"][1]["choice"] = values["trials"][0]["choice"]
        else:
            values[name] = values[name] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        read_rows(path)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) <= 300
    told: list[str] = []
    assert find_rows(some_setting(), tmp_path, told.append) is None
    assert len(told) == 1
    assert "will be measured again" in told[0]


def test_a_reason_is_made_printable_where_it_comes_up() -> None:
    quoted = Trial(BOTH, "crashed", "\x1b[31mptxas fatal\n\ud800" + "x" * 999)
    assert quoted.reason == ("?[31mptxas fatal??" + "x" * 999)[:300]
    assert Trial.from_json(quoted.to_json()) == quoted


def test_a_folder_that_may_not_be_entered_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretended, because root may enter any. Before Python 3.12, `Path.exists` raises there too."""

    def refused(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refused)
    monkeypatch.setattr(Path, "open", refused)
    told: list[str] = []
    assert find_rows(some_setting(), tmp_path / "no", told.append) is None
    (line,) = told
    assert line.endswith("cannot be read (Permission denied) and is passed over")


def test_a_file_of_another_setting_under_this_name_is_not_taken(tmp_path: Path) -> None:
    other = write_rows(some_setting(henc=4), ROWS, tmp_path)
    other.rename(rows_path(some_setting(), tmp_path))
    told: list[str] = []
    assert find_rows(some_setting(), tmp_path, told.append) is None
    assert "is of another setting" in told[0]


def test_rows_of_the_package_count_for_the_same_gpu_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MEASURED", tmp_path / "measured")
    path = write_rows(some_setting(), ROWS, tmp_path / "measured")
    user = tmp_path / "user"
    assert find_rows(some_setting(driver="other", torch="other"), user, pytest.fail) == (ROWS, path)
    for change in ({"gpu": "Other GPU"}, {"sources": "0"}, {"batch": 2}, {"precision": "bf16"}, {"steps": 2}):
        assert find_rows(some_setting(**change), user, pytest.fail) is None
    own = write_rows(some_setting(), ROWS[:1], user)
    assert find_rows(some_setting(), user, pytest.fail) == (ROWS[:1], own)  # the user's own go first


def check_committed(folder: Path) -> None:
    for path in folder.glob("*.json"):
        setting, rows = read_rows(path)
        assert path.name == f"{setting.key}.json"
        assert setting.sources == sources_hash(), f"{path} was measured with other code: no run would take it"
        assert any(row.status == "exact" for row in rows)


def test_committed_rows_can_be_read_and_are_of_this_code(tmp_path: Path) -> None:
    check_committed(MEASURED)
    assert (MEASURED / "README.md").is_file()
    write_rows(some_setting(), ROWS, tmp_path)
    check_committed(tmp_path)
    write_rows(some_setting(sources="0"), ROWS, tmp_path)
    with pytest.raises(AssertionError, match="was measured with other code"):
        check_committed(tmp_path)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Setting)])
def test_every_field_is_in_the_key(field: str) -> None:
    value = getattr(some_setting(), field)
    other = {"precision": "bf16", "purpose": "inference"}.get(field)
    if other is None:
        other = not value if isinstance(value, bool) else value + (1 if isinstance(value, int) else "x")
    assert some_setting(**{field: other}).key != some_setting().key


def test_a_setting_is_read_off_any_jepa_of_the_published_structure() -> None:
    sizes = {"henc": 2, "hpre": 2, "dstc": 4, "projector": "4-6-5"}
    for jepa in (tiny_jepa(), original_jepa()):
        setting = setting_of_jepa(jepa, CPU, example=(3, 1, 5, 16, 24), purpose="train", precision="fp32")
        assert isinstance(setting, Setting)
        assert {name: getattr(setting, name) for name in sizes} == sizes
        assert (setting.batch, setting.frames, setting.height, setting.width) == (3, 5, 16, 24)
    default = setting_of_jepa(tiny_jepa(), CPU, example=None, purpose="inference", precision="fp32")
    assert isinstance(default, Setting)
    assert (default.batch, default.frames, default.height, default.steps) == (64, 10, 64, 8)
    half = tiny_jepa().bfloat16()
    assert "its weights are torch.bfloat16" in str(
        setting_of_jepa(half, CPU, example=None, purpose="train", precision="bf16")
    )
    for other in (original_jepa(s2=2), original_jepa(avg_pool=True)):
        strided = setting_of_jepa(other, CPU, example=None, purpose="train", precision="fp32")
        assert "its encoder strides or pools" in str(strided)
    other = tiny_jepa()
    other.encoder = torch.nn.Identity()
    assert "not of the published form" in str(
        setting_of_jepa(other, CPU, example=None, purpose="train", precision="fp32")
    )


def test_a_run_and_its_model_ask_the_same_question() -> None:
    config = Config(batch_size=3, n_frames=5, canvas=16, digit_size=8, henc=2, hpre=2, dstc=4)
    setting = setting_of_config(config, CPU, "fp32")
    jepa = tiny_jepa(projector="4-64-64")
    assert setting == setting_of_jepa(jepa, CPU, example=(3, 1, 5, 16, 16), purpose="train", precision="fp32")


ROOMS = ("kernels", "fused", "graphs", "model", "moving_mnist", "trials", "calibration")


@pytest.mark.parametrize("changed", ROOMS)
def test_the_hash_is_of_the_code_that_decides(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(sources_hash()) == 12
    package = Path(store.__file__).parents[1]
    for room in ROOMS:
        assert list((package / room).glob("*.py")), room
        (tmp_path / room).mkdir()
        (tmp_path / room / "some.py").write_text("1")
    monkeypatch.setattr(setting_module, "_PACKAGE", tmp_path)
    before = sources_hash.__wrapped__()
    (tmp_path / changed / "some.py").write_text("2")
    assert sources_hash.__wrapped__() != before


# ---- the lock --------------------------------------------------------------------------------------------------------


def test_a_lock_that_is_held_is_waited_for_and_then_given_up(tmp_path: Path) -> None:
    told: list[str] = []
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with only_one_process(tmp_path, 1.0, pytest.fail):
            entered.set()
            leave.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(30)
    held = only_one_process(tmp_path, 0.2, told.append)
    with pytest.raises(LockTimeoutError, match="another process has been calibrating"), held:
        pytest.fail("it was held")
    assert told == ["another process is calibrating; waiting for its rows (at most 0 s)"]
    leave.set()
    holder.join(30)
    with only_one_process(tmp_path, 0.2, pytest.fail):
        pass


def test_a_folder_that_cannot_hold_a_lock_is_told(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    told: list[str] = []
    with only_one_process(blocked / "calibration", 1.0, told.append):
        pass
    assert "cannot hold a lock" in told[0]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_shows_what_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show = ["--show", "--cache_dir", str(tmp_path)]
    assert calibrate.main(show) == 0
    assert "nothing is calibrated yet" in capsys.readouterr().out or list(MEASURED.glob("*.json"))
    path = write_rows(some_setting(), ROWS, tmp_path / "calibration")
    (path.parent / "torn.json").write_text("{")
    assert calibrate.main(show) == 0
    shown = capsys.readouterr().out
    assert "→ channels-last + CUDA graph: 2.50× eager, 4.00 ms instead of 10.00" in shown
    assert "    channels-last: hung" in shown
    assert "torn.json cannot be used: it is not whole" in shown


def test_the_command_measures_on_a_gpu_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        calibrate.main(["--device", "cpu"])
    assert "there is nothing to calibrate on a CPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        calibrate.main(["--show", "--redo"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"purpose": "train", "steps": 4, "precision": "bf16", "redo": False, "deterministic": True}),
        (["--redo", "--nondeterministic"], {"redo": True, "deterministic": False}),
        (
            ["--inference", "--precision", "fp32", "--batch_size", "3"],
            {"purpose": "inference", "steps": 8, "frames": 2, "batch": 3, "precision": "fp32"},
        ),
        (["--batch_size", "2", "--canvas", "32", "--n_frames", "5"], {"batch": 2, "height": 32, "frames": 5}),
    ],
)
def test_what_the_command_asks_on_a_gpu(
    flags: list[str], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The GPU is pretended."""
    asked: dict[str, Any] = {}

    def pretended(setting: Setting, device: torch.device, **options: Any) -> Verdict:
        asked.update(setting.to_json(), **options)
        return Verdict(setting, ROWS, "pretended")

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(calibrate, "resolve_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(calibrate, "resolve_precision", lambda name, _: "bf16" if name == "auto" else name)
    monkeypatch.setattr("fastjepa.calibration.setting.device_name", lambda _: "Some GPU")
    monkeypatch.setattr("fastjepa.calibration.setting.driver_version", lambda _: "1")
    monkeypatch.setattr(calibrate, "resolve", pretended)
    scarce = Memory(keeping=3, recomputing=2, free=2)
    monkeypatch.setattr(calibrate, "memory_on", lambda setting, _: "" if setting.purpose == "inference" else scarce)
    assert calibrate.main(flags) == 0
    assert {name: asked[name] for name in expected} == expected
    told = capsys.readouterr().out
    assert "2.50× eager" in told
    assert told.endswith(f"\n  {scarce}\n") == (asked["purpose"] == "train")
    assert asked["allowed"](Choice(batch_norm=True)) == (asked["purpose"] == "inference")


def test_a_rollout_has_no_steps_of_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "resolve_device", lambda _: torch.device("cuda"))
    for flag in ("--n_frames", "--steps"):
        with pytest.raises(SystemExit, match=r"^2$"):
            calibrate.main(["--inference", flag, "3"])
        assert "a rollout is of 8 frames from 2: --n_frames and --steps are of training" in capsys.readouterr().err


def test_words_of_a_choice() -> None:
    assert str(Choice()) == "eager"
    assert str(Choice(True, "fused", True, True, True)) == (
        "fused losses + fused blocks + recomputation + channels-last + CUDA graph"
    )
    assert not Choice(losses="closed_form").needs_kernels
    own = Choice(convolutions="all")
    assert (str(own), own.needs_kernels, own.own_layers) == ("own convolutions", True, LAYERS)
    some = Choice(cuda_graph=True, convolutions="encoder.conv1,predictor.dec1.conv2,predictor.up1")
    assert str(some) == "own convolutions (3 of 25 layers) + CUDA graph"
    assert some.own_layers == ("encoder.conv1", "predictor.up1", "predictor.dec1.conv2")  # in the networks' order
    with pytest.raises(ValueError, match="convolutions must be names of layers"):
        Choice(convolutions="conv1")
    no_memory = Trial(own, "exact", "no memory to time its layers", milliseconds=3.0)
    assert str(no_memory).endswith("; no memory to time its layers")


@pytest.mark.usefixtures("needs_triton")
def test_layers_are_those_of_the_kernels() -> None:
    from fastjepa.kernels.convolution.recipe import encoder_layers, predictor_layers

    assert {"encoder": tuple(encoder_layers(1)), "predictor": tuple(predictor_layers(1))} == LAYERS_OF


def test_layers_are_those_of_the_folded_networks() -> None:
    jepa = tiny_jepa()
    networks = (
        FoldedEncoder.from_eager(jepa.encoder, layers=()),
        FoldedPredictor.from_eager(jepa.predictor, layers=()),
    )
    assert tuple(network.layer_names for network in networks) == tuple(LAYERS_OF.values())


def test_words_of_a_row() -> None:
    assert Trial(BOTH, "exact", milliseconds=3.0).speedup is None
