"""A resumed run continues bit for bit; a state that does not fit changes nothing."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastjepa.files.safe_files import CheckpointError
from fastjepa.files.state_dicts import plain_state
from fastjepa.model.jepa import build_jepa
from fastjepa.model.probes import build_probes
from fastjepa.storage.checkpoint import (
    check_same_config,
    load_checkpoint,
    load_snapshot,
    save_checkpoint,
    snapshot,
)

CONFIG = {"lr": 1e-3, "steps": 2, "preset": "demo", "out": None}
PROGRESS = {"epoch": 3, "step": 17, "best": 0.25}


class Run:
    """A small run as the trainer makes it: a JEPA, two probes, Adam with three groups."""

    def __init__(self, seed: int, device: str = "cpu", **adam: Any) -> None:
        torch.manual_seed(seed)
        jepa = build_jepa(dobs=1, henc=2, hpre=2, dstc=3, std_coeff=1.0, cov_coeff=1.0, projector="3-4-4")
        decoder, head = build_probes(dobs=1, dstc=3, hdet=2)
        self.device = device
        self.modules: dict[str, nn.Module] = {"jepa": jepa, "decoder": decoder, "detection_head": head}
        groups: list[dict[str, Any]] = [{"params": m.to(device).parameters()} for m in self.modules.values()]
        if "lr" not in adam:
            for group, lr in zip(groups, (1e-2, 1e-3, 1e-2), strict=True):
                group["lr"] = lr
        self.optimizer = torch.optim.Adam(groups, **adam)

    def train(self, steps: int) -> None:
        """Steps on data drawn from every global generator."""
        jepa, decoder, head = self.modules.values()
        for _ in range(steps):
            video = torch.rand(2, 1, 4, 8, 8) + random.random() + np.random.rand()  # noqa: NPY002
            if self.device == "cuda":
                video = video.cuda() + torch.rand(2, 1, 4, 8, 8, device="cuda")
            _, losses = jepa.unroll(video, nsteps=2)
            state = jepa.encode(video)
            loss = losses[0] + head(state).mean() + decoder(state).square().mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()

    def snapshot(self) -> dict[str, Any]:
        return snapshot(self.modules, self.optimizer, PROGRESS, CONFIG)

    def load_snapshot(self, state: dict[str, Any]) -> dict[str, int | float]:
        return load_snapshot(state, self.modules, self.optimizer)


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Equal to the last bit, through dicts and sequences."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


ADAMS: list[dict[str, Any]] = [{}, {"fused": True}, {"foreach": True}, {"amsgrad": True}, {"lr": torch.tensor(1e-2)}]


@pytest.mark.parametrize("adam", ADAMS, ids=["default", "fused", "foreach", "amsgrad", "tensor lr"])
@pytest.mark.parametrize("steps_before", [0, 2], ids=["into a new optimizer", "into one that has stepped"])
def test_a_run_continues_bit_for_bit(tmp_path: Path, adam: dict[str, Any], steps_before: int) -> None:
    run = Run(0, **copy.deepcopy(adam))
    run.train(2)
    save_checkpoint(tmp_path / "latest.pt", run.snapshot())
    run.train(3)

    resumed = Run(1, **copy.deepcopy(adam))
    resumed.train(steps_before)
    progress = resumed.load_snapshot(load_checkpoint(tmp_path / "latest.pt"))
    assert_same(progress, PROGRESS)
    resumed.train(3)
    assert_same(resumed.snapshot(), run.snapshot())


def test_a_captured_state_is_a_copy() -> None:
    run = Run(0)
    run.train(1)
    state = run.snapshot()
    before = copy.deepcopy(state)
    run.train(1)
    assert_same(state, before)


def test_loading_keeps_all_memory() -> None:
    """CUDA graphs and views go on working: every tensor stays where it was."""
    run = Run(0, lr=torch.tensor(1e-2))
    run.train(1)
    state = run.snapshot()
    run.train(1)

    def tensors() -> list[Tensor]:
        groups = [v for group in run.optimizer.param_groups for v in group.values() if isinstance(v, Tensor)]
        moments = [tensor for entry in run.optimizer.state.values() for tensor in entry.values()]
        return [*groups, *moments, *(t for m in run.modules.values() for t in plain_state(m).values())]

    before = [(tensor.data_ptr(), tensor.stride()) for tensor in tensors()]
    run.load_snapshot(state)
    assert [(tensor.data_ptr(), tensor.stride()) for tensor in tensors()] == before
    assert_same(run.snapshot(), state)


def test_a_state_from_before_the_first_step_resets_adam() -> None:
    run = Run(0)
    state = run.snapshot()
    assert not state["optimizer"]["state"]
    run.train(2)
    expected = run.snapshot()
    run.load_snapshot(state)
    run.train(2)
    assert_same(run.snapshot(), expected)


def test_how_adam_is_computed_belongs_to_the_machine() -> None:
    run = Run(0, fused=True)
    run.train(1)
    resumed = Run(1, foreach=True)
    resumed.optimizer.param_groups[1]["lr"] = 123.0
    resumed.load_snapshot(run.snapshot())
    assert [group["fused"] for group in resumed.optimizer.param_groups] == [None] * 3
    assert [group["foreach"] for group in resumed.optimizer.param_groups] == [True] * 3
    assert [group["lr"] for group in resumed.optimizer.param_groups] == [1e-2, 1e-3, 1e-2]
    assert_same(resumed.snapshot()["optimizer"]["state"], run.snapshot()["optimizer"]["state"])


def test_a_new_optimizer_gets_moments_laid_out_like_the_parameters() -> None:
    run = Run(0)
    run.train(1)
    resumed = Run(1)
    resumed.modules["jepa"].to(memory_format=torch.channels_last)
    resumed.load_snapshot(run.snapshot())
    for param, entry in resumed.optimizer.state.items():
        assert entry["exp_avg"].stride() == param.stride()


def test_a_compiled_module_has_the_same_state_as_a_plain_one() -> None:
    run, other = Run(0), Run(1)
    run.modules["jepa"].encoder = torch.compile(run.modules["jepa"].encoder)  # wraps; nothing is compiled before a call
    run.modules["decoder"] = torch.compile(run.modules["decoder"])
    assert any("_orig_mod." in key for key in run.modules["jepa"].state_dict())
    other.load_snapshot(run.snapshot())
    assert_same(other.snapshot(), run.snapshot())


@pytest.mark.gpu
@pytest.mark.parametrize("adam", [{}, {"fused": True}, {"capturable": True}, {"fused": True, "capturable": True}])
def test_a_run_on_a_gpu_continues(adam: dict[str, Any]) -> None:
    run = Run(0, "cuda", **adam)
    run.train(2)
    state = run.snapshot()
    draw = torch.rand(5, device="cuda")
    resumed = Run(1, "cuda", **adam)
    resumed.train(1)
    before = [t.data_ptr() for entry in resumed.optimizer.state.values() for t in entry.values()]
    resumed.load_snapshot(state)
    assert [t.data_ptr() for entry in resumed.optimizer.state.values() for t in entry.values()] == before
    assert_same(resumed.snapshot(), state)
    assert torch.equal(torch.rand(5, device="cuda"), draw)
    step = next(iter(resumed.optimizer.state.values()))["step"]
    fresh = Run(2, "cuda", **adam)
    fresh.load_snapshot(state)
    assert next(iter(fresh.optimizer.state.values()))["step"].device == step.device
    assert_same(fresh.snapshot(), state)


# ---- what does not fit ----


def _first_moment(state: dict[str, Any]) -> dict[str, Tensor]:
    return state["optimizer"]["state"][0]


def _group(state: dict[str, Any]) -> dict[str, Any]:
    return state["optimizer"]["param_groups"][2]


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no section": (lambda s: s.pop("rng"), "no section 'rng'"),
    "section of another type": (lambda s: s.update(modules=[]), "no section 'modules'"),
    "module missing": (lambda s: s["modules"].pop("decoder"), r"\['detection_head', 'jepa'\], expected \['decoder'"),
    "module too many": (lambda s: s["modules"].update(extra={}), "'extra'"),
    "module not a dict": (lambda s: s["modules"].update(decoder=3), "decoder in the checkpoint is not a dict"),
    "weight missing": (lambda s: s["modules"]["detection_head"].pop("head.0.2.bias"), "head.0.2.bias is missing"),
    "weight too many": (lambda s: s["modules"]["decoder"].update(x=torch.ones(1)), "x is not expected"),
    "weight of another shape": (
        lambda s: s["modules"]["detection_head"].update({"head.0.2.bias": torch.ones(2)}),
        r"head.0.2.bias is \(2,\) torch.float32, expected \(1,\)",
    ),
    "weight of another dtype": (
        lambda s: s["modules"]["detection_head"].update({"head.0.2.bias": torch.ones(1).double()}),
        "head.0.2.bias is .* torch.float64, expected",
    ),
    "weight not a tensor": (lambda s: s["modules"]["decoder"].update({"net.0.bias": 1.0}), "net.0.bias is not a plain"),
    "weight sparse": (
        lambda s: s["modules"]["decoder"].update({"net.0.bias": torch.zeros(16).to_sparse()}),
        "net.0.bias is not a plain",
    ),
    "group missing": (lambda s: s["optimizer"]["param_groups"].pop(), "3 parameter groups, the saved one 2"),
    "no groups": (lambda s: s["optimizer"].pop("param_groups"), "3 parameter groups, the saved one no"),
    "no optimizer state": (lambda s: s["optimizer"].pop("state"), "has no state"),
    "group with other parameters": (lambda s: _group(s)["params"].pop(), "optimizer group 2 has 4 parameters"),
    "setting missing": (lambda s: _group(s).pop("betas"), "same settings: betas"),
    "setting too many": (lambda s: _group(s).update(momentum=0.9), "same settings: momentum"),
    "lr not a number": (lambda s: _group(s).update(lr="fast"), "lr is saved as 'fast', here it is 0.01"),
    "betas of another length": (lambda s: _group(s).update(betas=(0.9,)), r"betas is saved as \(0.9,\)"),
    "amsgrad turned on": (lambda s: _group(s).update(amsgrad=True), "max_exp_avg_sq"),
    "moment missing": (lambda s: _first_moment(s).pop("exp_avg"), "parameter 0: the saved state is not"),
    "moment of another shape": (lambda s: _first_moment(s).update(exp_avg=torch.ones(3)), r"exp_avg is \(3,\)"),
    "moment of another dtype": (
        lambda s: _first_moment(s).update(exp_avg_sq=_first_moment(s)["exp_avg_sq"].double()),
        "exp_avg_sq is .* torch.float64",
    ),
    "moment not a tensor": (lambda s: _first_moment(s).update(exp_avg=None), "exp_avg is not a tensor"),
    "step not a number": (lambda s: _first_moment(s).update(step=torch.ones(2)), r"step is \(2,\)"),
    "step not floating": (lambda s: _first_moment(s).update(step=torch.tensor(2)), r"step is \(\) torch.int64"),
    "state of nobody": (lambda s: s["optimizer"]["state"].update({999: {}}), r"do not exist: \[999\]"),
    "python generator": (lambda s: s["rng"]["python"].update(words=torch.ones(5).long()), "random number generator"),
    "numpy generator": (lambda s: s["rng"]["numpy"].update(pos=10_000), "not one of MT19937"),
    "numpy generator's key": (lambda s: s["rng"]["numpy"].update(key=torch.ones(5).long()), "not one of MT19937"),
    "torch generator": (lambda s: s["rng"].update(torch=s["rng"]["torch"][:100]), "random number generator"),
    "generator missing": (lambda s: s["rng"].pop("numpy"), "random number generator"),
    "progress": (lambda s: s["progress"].update(epoch="three"), r"progress\['epoch'\]"),
}


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    run = Run(0)
    run.train(1)
    return run.snapshot()


@pytest.fixture(scope="module")
def victim() -> Run:
    run = Run(1)
    run.train(1)
    return run


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_does_not_fit_changes_nothing(saved: dict[str, Any], victim: Run, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    state = copy.deepcopy(saved)
    spoil(state)
    before = victim.snapshot()
    with pytest.raises(CheckpointError, match=message):
        victim.load_snapshot(state)
    assert_same(victim.snapshot(), before)


def test_loading_into_a_new_optimizer_that_fails_leaves_it_new(saved: dict[str, Any]) -> None:
    run = Run(1)
    state = copy.deepcopy(saved)
    state["rng"]["numpy"]["pos"] = -1
    with pytest.raises(CheckpointError):
        run.load_snapshot(state)
    assert not run.optimizer.state


# ---- files and configurations ----


def test_only_what_can_be_loaded_again_is_saved(tmp_path: Path) -> None:
    nested = {"a": [1, (2.5, None, "x")], "b": {"c": torch.ones(2, 3).half(), 4: True}}
    save_checkpoint(tmp_path / "a.pt", nested)
    assert_same(load_checkpoint(tmp_path / "a.pt"), nested)
    before = (tmp_path / "a.pt").read_bytes()
    for bad in (np.float64(1.0), Path("x"), np.ones(2), {1, 2}, nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=r"state\['a'\]\[0\] is a " + type(bad).__name__):
            save_checkpoint(tmp_path / "a.pt", {"a": [bad]})
    with pytest.raises(TypeError, match="keys must be str or int"):
        save_checkpoint(tmp_path / "a.pt", {"a": {(1, 2): 3}})
    assert (tmp_path / "a.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "not a fastjepa checkpoint"),
        ({"model_state_dict": {}}, "not a fastjepa checkpoint"),
        ({"format": "fastjepa checkpoint", "version": 2, "state": {}}, r"version 2; this fastjepa reads up to 1"),
        ({"format": "fastjepa checkpoint", "version": "1", "state": {}}, "no valid version or state"),
        ({"format": "fastjepa checkpoint", "version": 0, "state": {}}, "no valid version or state"),
        ({"format": "fastjepa checkpoint", "version": 1, "state": [1]}, "no valid version or state"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in str(caught.value)


def test_the_same_configuration_passes() -> None:
    check_same_config(CONFIG, dict(CONFIG), may_differ=())
    check_same_config(CONFIG, {**CONFIG, "out": "elsewhere"}, may_differ={"out"})


def test_every_difference_is_listed_with_both_values() -> None:
    now = {"lr": 1e-4, "steps": 2, "preset": "full", "out": "elsewhere", "seed": 1}
    with pytest.raises(CheckpointError) as caught:
        check_same_config({**CONFIG, "old": 5}, now, may_differ=["out"])
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        "  lr: 0.001 in the checkpoint, 0.0001 now",
        "  preset: 'demo' in the checkpoint, 'full' now",
        "  seed: (absent) in the checkpoint, 1 now",
        "  old: 5 in the checkpoint, (absent) now",
    ]


def test_a_misspelt_exception_is_refused() -> None:
    with pytest.raises(ValueError, match="outt"):
        check_same_config(CONFIG, CONFIG, may_differ=["outt"])
