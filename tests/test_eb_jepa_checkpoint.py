"""Checkpoints of the original load exactly, whatever torch.compile did to their keys; anything else is refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastjepa.eb_jepa import load_eb_jepa_checkpoint
from fastjepa.files.safe_files import CheckpointError
from fastjepa.model.jepa import JEPA, build_jepa

GOLDEN = Path(__file__).parent / "data" / "golden_video_jepa.npz"
SIZES = {"dobs": 2, "henc": 3, "hpre": 4, "dstc": 5}


def some_jepa(projector: str = "5-7-8-6") -> JEPA:
    torch.manual_seed(0)
    jepa = build_jepa(**SIZES, projector=projector, std_coeff=1.0, cov_coeff=1.0)
    jepa.unroll(torch.rand(2, 2, 4, 8, 8))  # moves the BatchNorm buffers off their defaults
    return jepa


def save(path: Path, state: dict[str, Any], **others: Any) -> Path:
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}}, **others}, path)
    return path


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


def with_prefixes(key: str) -> str:
    """As after compiling the whole model, the encoder, and the predictor's network."""
    key = key.replace("encoder.", "encoder._orig_mod.", 1).replace(
        "predictor.predictor.", "predictor.predictor._orig_mod."
    )
    return "_orig_mod." + key


RENAMINGS: dict[str, Callable[[str], str | None]] = {
    "plain": lambda key: key,
    "compiled whole": lambda key: "_orig_mod." + key,
    "distributed": lambda key: "module." + key,
    "compiled whole and in parts": with_prefixes,
    "no second names": lambda key: None if key.startswith(("action_encoder.", "predcost.")) else key,
    "second name of one": lambda key: None if key.startswith("predcost.") else key,
}


@pytest.mark.parametrize("projector", ["5-7-8-6", "5-6", "5-7-6"])
@pytest.mark.parametrize("renaming", RENAMINGS)
def test_every_tensor_and_size_is_found(tmp_path: Path, renaming: str, projector: str) -> None:
    jepa = some_jepa(projector)
    renamed = {RENAMINGS[renaming](key): value for key, value in jepa.state_dict().items()}
    state = {key: value for key, value in renamed.items() if key is not None}
    draw = torch.get_rng_state()
    loaded = load_eb_jepa_checkpoint(save(tmp_path / "latest.pth.tar", state), std_coeff=3.0, cov_coeff=4.0)
    assert torch.equal(torch.get_rng_state(), draw)  # loading does not move the seeds of a run
    assert_same_state(loaded.state_dict(), jepa.state_dict())
    assert loaded.action_encoder is loaded.encoder
    assert loaded.predcost.proj is loaded.regularizer.proj
    assert (loaded.regularizer.std_coeff, loaded.regularizer.cov_coeff) == (3.0, 4.0)
    assert loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    video = torch.rand(1, 2, 4, 8, 8)
    assert torch.equal(loaded.infer(video), jepa.infer(video))


def test_the_published_recipe_is_the_default(tmp_path: Path) -> None:
    loaded = load_eb_jepa_checkpoint(save(tmp_path / "latest.pth.tar", some_jepa().state_dict()))
    assert (loaded.regularizer.std_coeff, loaded.regularizer.cov_coeff) == (10.0, 100.0)


def test_the_dtype_of_the_file_is_kept(tmp_path: Path) -> None:
    jepa = some_jepa().double()
    loaded = load_eb_jepa_checkpoint(save(tmp_path / "latest.pth.tar", jepa.state_dict()))
    assert_same_state(loaded.state_dict(), jepa.state_dict())


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda state: state.update({key: value})


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "encoder missing": (lambda s: s.pop("encoder.conv1.weight"), "cannot tell the sizes .* conv1.weight is missing"),
    "BatchNorm missing": (lambda s: s.pop("encoder.bn1.running_var"), "encoder.bn1.running_var is missing"),
    "unknown key": (_set("encoder.extra", torch.ones(1)), "extra is not expected"),
    "unknown second name": (_set("predcost.proj.extra", torch.ones(1)), "predcost.proj.extra is not expected"),
    "not a tensor": (_set("encoder.bn1.weight", 1.0), "encoder.bn1.weight is not a plain tensor"),
    "wrong rank": (_set("encoder.conv1.weight", torch.ones(3, 2)), r"conv1.weight is \(3, 2\), expected a 4-D"),
    "wrong shape": (_set("encoder.bn1.weight", torch.ones(4)), r"encoder.bn1.weight is \(4,\)"),
    "mixed dtypes": (_set("encoder.bn1.weight", torch.ones(3).double()), "tensors of 2 floating dtypes"),
    "action encoder differs": (
        _set("action_encoder.bn1.weight", torch.full((3,), 9.0)),
        "action_encoder.bn1.weight and encoder.bn1.weight differ",
    ),
    "projectors differ": (
        _set("predcost.proj.net.0.bias", torch.full((7,), 9.0)),
        "predcost.proj.net.0.bias and regularizer.proj.net.0.bias differ",
    ),
    "second name of another shape": (_set("action_encoder.bn1.weight", torch.ones(9)), "action_encoder.bn1.weight is"),
    "no projector": (
        lambda s: [s.pop(key) for key in list(s) if key.startswith("regularizer.proj.net.") and s[key].dim() == 2],
        "the projector has no Linear",
    ),
    "projector of another width": (_set("regularizer.proj.net.0.weight", torch.ones(7, 4)), "must start with dstc = 5"),
    "predictor of other states": (
        _set("predictor.predictor.head.weight", torch.ones(2, 4, 1, 1)),
        r"predictor.predictor.head.weight is \(2, 4, 1, 1\) torch.float32, expected \(5, 4",
    ),
    "predictor of part of a state": (
        _set("predictor.predictor.head.weight", torch.ones(3, 4, 1, 1)),
        "10 input channels cannot read whole states of 3",
    ),
    "size of 0": (_set("encoder.conv1.weight", torch.ones(0, 2, 3, 3)), "henc must be at least 1"),
    "a huge claim over little data": (
        lambda s: s.update(
            {
                key: torch.zeros(1).expand(shape)
                for key, shape in {
                    "regularizer.proj.net.3.weight": (2**40, 7),
                    "regularizer.proj.net.3.bias": (2**40,),
                    "regularizer.proj.net.4.weight": (2**40,),
                    "regularizer.proj.net.4.bias": (2**40,),
                    "regularizer.proj.net.4.running_mean": (2**40,),
                    "regularizer.proj.net.4.running_var": (2**40,),
                    "regularizer.proj.net.6.weight": (6, 2**40),
                }.items()
            }
        ),
        "larger than the data it has",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_named(tmp_path: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    state = dict(some_jepa().state_dict())
    spoil(state)
    path = save(tmp_path / "latest.pth.tar", state)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_eb_jepa_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content", [torch.ones(2), {"state_dict": {}}, {"model_state_dict": [1]}, {"model_state_dict": {1: 2}}]
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "latest.pth.tar")
    with pytest.raises(CheckpointError, match="not a checkpoint of eb_jepa"):
        load_eb_jepa_checkpoint(tmp_path / "latest.pth.tar")


def test_other_pickled_objects_are_named_and_not_loaded(tmp_path: Path) -> None:
    path = save(tmp_path / "latest.pth.tar", some_jepa().state_dict(), cfg=argparse.Namespace(lr=1.0))
    with pytest.raises(CheckpointError, match=r"other pickled objects \(argparse.Namespace\)"):
        load_eb_jepa_checkpoint(path)


def test_the_weights_recorded_from_the_original_give_its_predictions(tmp_path: Path) -> None:
    """The recording has the original's own parameter names; it was made in evaluation mode after one training step."""
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        golden = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
    parts = ("encoder.", "predictor.", "regularizer.")
    state = {name.removeprefix("init/"): value for name, value in golden.items() if name.startswith("init/")}
    state = {key: golden.get(f"after/{key}", value) for key, value in state.items() if key.startswith(parts)}
    jepa = load_eb_jepa_checkpoint(save(tmp_path / "latest.pth.tar", state)).eval()
    expected = golden["eval/parallel_step0"]
    assert (jepa.infer(golden["video"]) - expected).norm() <= 1e-9 * expected.norm()
