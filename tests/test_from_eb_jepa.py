"""The page for users of the original: its code runs, in order, as one script of a user of `eb_jepa`."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import original
from fastjepa.environment import ROOT
from fastjepa.model.jepa import JEPA
from fastjepa.verification import Verification
from graph_cases import some_clips

PAGE = ROOT / "docs" / "from-eb-jepa.md"
CLASSES = {
    "eb_jepa.architectures": {
        "ResNet5": original.Encoder, "ResUNet": original.UNet, "StateOnlyPredictor": original.PairPredictor,
        "Projector": original.MLP, "DetHead": original.Detector,
    },
    "eb_jepa.image_decoder": {"ImageDecoder": original.Painter},
    "eb_jepa.jepa": {"JEPA": original.OriginalJEPA, "JEPAProbe": original.Probe},
    "eb_jepa.losses": {"VCLoss": original.Regularizer, "SquareLossSeq": original.PredictionCost},
}  # fmt: skip
SAVED = {"model": "jepa", "optimizer": "optimizer"}
CFG = SimpleNamespace(
    model=SimpleNamespace(dobs=1, henc=2, hpre=2, dstc=16, steps=2),
    loss=SimpleNamespace(std_coeff=10.0, cov_coeff=100.0),
    optim=SimpleNamespace(lr=1e-3, epochs=1),
    data=SimpleNamespace(batch_size=3),
)


@pytest.fixture(autouse=True)
def eb_jepa(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name, of the stand-in's classes."""
    monkeypatch.setitem(sys.modules, "eb_jepa", types.ModuleType("eb_jepa"))
    for name, classes in CLASSES.items():
        module: Any = types.ModuleType(name)
        vars(module).update(classes)
        monkeypatch.setitem(sys.modules, name, module)


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def script() -> dict[str, Any]:
    """What a user's script has at hand."""
    clips = some_clips()
    video, digit_location = clips.batch(torch.arange(len(clips)))
    batches = zip(video.split(3), digit_location.split(3), strict=True)
    return {
        "cfg": CFG,
        "device": "cpu",
        "torch": torch,
        "train_set": SimpleNamespace(data=clips.video.numpy(), digit_locations=clips.digit_maps.float()),
        "train_loader": [{"video": x, "digit_location": y} for x, y in batches],
    }


def run(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, str(PAGE), "exec"), names)


@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
def test_the_page_is_a_script_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = script()
    torch.manual_seed(0)
    for code in blocks():
        if "latest.pth.tar" in code:
            states = {f"{name}_state_dict": names[key].state_dict() for name, key in SAVED.items()}
            torch.save({"epoch": 1, "step": 3, **states}, "latest.pth.tar")  # as its save_checkpoint writes it
        run(code, names)
    printed = capsys.readouterr().out
    assert "Regularizer → ClosedFormVCLoss" in printed
    assert "fastjepa.verify: passed" in printed
    assert isinstance(names["report"], Verification)
    assert isinstance(names["jepa"], JEPA)
    assert (names["run"].epoch, names["run"].step) == (2, 3)
    assert torch.load("back.pth.tar", weights_only=True)["step"] == 3
    assert names["step"].loss_problem is None
    assert names["graphed"].recordings_made == 2
    assert all(torch.isfinite(loss) for loss in names["losses"])


def test_the_loops_before_and_after_train_the_same() -> None:
    build, before, after = blocks()[:3]
    outcomes = []
    for loop in (before, after):
        names = script()
        torch.manual_seed(0)
        run(build, names)
        parts = [names["jepa"], names["pixel_decoder"].head, names["detection_head"].head]
        for module in parts:
            module.double()
        names["train_loader"] = [{name: x.double() for name, x in batch.items()} for batch in names["train_loader"]]
        run(loop, names)
        outcomes.append([tensor for module in parts for tensor in tensors(module)])
    assert len(outcomes[0]) == len(outcomes[1])
    for expected, found in zip(*outcomes, strict=True):
        assert float((found - expected).norm()) <= 1e-9 * max(float(expected.norm()), 1e-3)


def tensors(module: nn.Module) -> Iterator[Tensor]:
    state = module.state_dict()
    return (state[name].double() for name in sorted(state))


def test_the_page_is_linked_and_its_links_are_there() -> None:
    assert "docs/from-eb-jepa.md" in (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", PAGE.read_text(encoding="utf-8"))
    assert links
    assert all((PAGE.parent / link).is_file() for link in links)
