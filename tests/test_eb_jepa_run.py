"""Training goes on from a checkpoint of the original as the original would, and back; anything else is refused."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjepa
from fastjepa.eb_jepa import EbJepaRun, load_eb_jepa_run, write_eb_jepa_checkpoint
from fastjepa.files.safe_files import CheckpointError
from fastjepa.files.state_dicts import plain_state, strip_compile_prefix
from fastjepa.model.networks import DetHead, ImageDecoder
from fastjepa.model.probes import build_probes
from fastjepa.model.step import TrainStep, build_optimizer
from fastjepa.storage.checkpoint import snapshot
from original import original_jepa, unrolled_loss

STEPS = 2  # of the unroll


class Original:
    """A training run as the original's script makes it, with its step written out: three encodings, one Adam."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(seed)
        self.jepa = original_jepa().to(dtype)
        dstc = self.jepa.predictor.predictor.head.out_channels
        self.decoder, self.head = (module.to(dtype) for module in build_probes(dobs=1, dstc=dstc, hdet=2))
        self.optimizer = torch.optim.Adam(
            [
                {"params": self.jepa.parameters(), "lr": 1e-3},
                {"params": self.decoder.parameters(), "lr": 1e-4},
                {"params": self.head.parameters(), "lr": 1e-3},
            ]
        )

    def step(self, video: Tensor, digit_location: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = unrolled_loss(self.jepa, video, STEPS)
        for head, error, target in (
            (self.decoder, F.mse_loss, video),
            (self.head, F.binary_cross_entropy, digit_location),
        ):
            with torch.no_grad():
                state = self.jepa.encoder(video)
            loss = loss + error(head(state), target)
        loss.backward()
        self.optimizer.step()

    def train(self, *numbers: int) -> Original:
        for number in numbers:
            self.step(*batch(number, next(self.jepa.parameters()).dtype))
        return self

    def save(self, path: Path, heads: bool = True, **others: Any) -> Path:
        """As the original's save_checkpoint writes it."""
        own = {"pixel_decoder": self.decoder.state_dict(), "detection_head": self.head.state_dict()} if heads else {}
        content = {
            "epoch": 3, "step": 2, "model_state_dict": self.jepa.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
        }  # fmt: skip
        torch.save({**content, **own, **others}, path)
        return path

    def load(self, path: Path) -> dict[str, Any]:
        """As the original's load_checkpoint reads it."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        self.jepa.load_state_dict({k.replace("_orig_mod.", ""): v for k, v in content["model_state_dict"].items()})
        self.optimizer.load_state_dict(content["optimizer_state_dict"])
        self.decoder.load_state_dict(content["image_decoder_state_dict"])
        self.head.load_state_dict(content["detection_head_state_dict"])
        return content

    def everything(self) -> dict[str, Tensor]:
        return everything(self.jepa, self.decoder, self.head, self.optimizer)


def names_of(module: nn.Module) -> list[str]:
    return [strip_compile_prefix(name) for name, _ in module.named_parameters()]


def everything(jepa: nn.Module, decoder: nn.Module, head: nn.Module, optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    """Weights, buffers, and Adam's state by the names of the parameters."""
    found: dict[str, Tensor] = {}
    for root, module in (("jepa", jepa), ("decoder", decoder), ("head", head)):
        found.update({f"{root}.{key}": value for key, value in plain_state(module).items()})
        for name, parameter in zip(names_of(module), module.parameters(), strict=True):
            found.update({f"{root}.{name}: {key}": value for key, value in optimizer.state[parameter].items()})
    return {key: value.detach().clone() for key, value in found.items()}


def of_run(run: EbJepaRun) -> dict[str, Tensor]:
    return everything(run.jepa, run.image_decoder, run.detection_head, run.optimizer)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


def batch(number: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + number)
    video = torch.rand(2, 1, 5, 16, 16, generator=generator, dtype=dtype)
    return video, (torch.rand(2, 5, 8, 8, generator=generator) > 0.9).to(dtype)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the original writes it, after two steps, with heads."""
    return Original().train(0, 1).save(tmp_path_factory.mktemp("saved") / "latest.pth.tar")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "latest.pth.tar"


# ---- into ours -------------------------------------------------------------------------------------------------------


def test_the_next_steps_are_the_originals(path: Path) -> None:
    original = Original().train(0, 1)
    run = load_eb_jepa_run(original.save(path))
    assert (run.epoch, run.step, run.new_heads, run.unused) == (4, 2, (), ())
    assert_equal(of_run(run), original.everything())
    step = TrainStep(run.jepa, run.image_decoder, run.detection_head, run.optimizer, steps=STEPS)
    before = original.everything()
    original.train(2, 3)
    for number in (2, 3):
        step(*batch(number))
    actual, expected = of_run(run), original.everything()
    assert not torch.equal(before["jepa.encoder.conv1.weight"], expected["jepa.encoder.conv1.weight"])
    for key, value in expected.items():
        # The gradient of a bias before a BatchNorm is 0 but for rounding: its moments have no digits to compare.
        assert (actual[key] - value).double().norm() <= 1e-9 * value.double().norm() + 1e-14, key


def test_an_accelerated_model_goes_on_too(path: Path, needs_triton: None) -> None:
    """Its parameters come in the order of the eager ones, by whose numbers the original keeps Adam's state."""
    original = Original(dtype=torch.float32).train(0, 1)
    run = load_eb_jepa_run(original.save(path))
    other = load_eb_jepa_run(Original(seed=1, dtype=torch.float32).train(0).save(path.with_name("other")))
    fused = fastjepa.accelerate(other.jepa, backend="fused", verbose=False)
    assert names_of(fused) == names_of(run.jepa)
    optimizer = build_optimizer(fused, other.image_decoder, other.detection_head, 0.5)
    memory = {key: value.data_ptr() for key, value in plain_state(fused).items()}
    run.copy_into(other.modules, optimizer)
    assert {key: value.data_ptr() for key, value in plain_state(fused).items()} == memory  # a graph writes there
    assert_equal(everything(fused, other.image_decoder, other.detection_head, optimizer), original.everything())
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-4, 1e-3]
    written = path.with_name("back")
    heads = {"image_decoder": other.image_decoder, "detection_head": other.detection_head}
    fastjepa.save_eb_jepa_checkpoint(written, fused, optimizer, epoch=4, step=2, **heads)
    from_a_run = path.with_name("from a run")  # whose optimizer had that order too
    state = snapshot(other.modules, optimizer, {}, {})
    write_eb_jepa_checkpoint(from_a_run, state["modules"], state["optimizer"], epoch=4, step=2)
    for file in (written, from_a_run):
        again = Original(seed=2, dtype=torch.float32)
        again.load(file)
        assert_equal(again.everything(), original.everything())


def test_heads_that_are_not_there_begin_anew(path: Path) -> None:
    original = Original().train(0, 1)
    draws = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        run = load_eb_jepa_run(original.save(path, heads=False))
        draws.append(run.detection_head.head[0][0].weight)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert run.new_heads == ("image_decoder", "detection_head")
    assert run.sizes["hdet"] == run.sizes["hpre"]  # as the original's script builds it
    assert {id(p) for p in run.optimizer.state} == {id(p) for p in run.jepa.parameters()}
    assert [group["lr"] for group in run.optimizer.param_groups] == [1e-3, 1e-4, 1e-3]
    for head in (run.image_decoder, run.detection_head):
        assert {p.dtype for p in head.parameters()} == {torch.float64}
    TrainStep(run.jepa, run.image_decoder, run.detection_head, run.optimizer, steps=STEPS)(*batch(2))


class Probe(nn.Module):
    def __init__(self, jepa: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.jepa, self.head = jepa, head


@pytest.mark.parametrize(
    ("names", "whole"),
    [
        (("image_decoder", "detection_head"), False),
        (("decoder_state_dict", "dethead"), False),
        (("pixel_decoder", "dethead_state_dict"), True),
    ],
)
def test_heads_are_found(path: Path, names: tuple[str, str], whole: bool) -> None:
    original = Original().train(0, 1)
    states = {
        name: (torch.compile(Probe(original.jepa, head)) if whole else head).state_dict()
        for name, head in zip(names, (original.decoder, original.head), strict=True)
    }
    run = load_eb_jepa_run(original.save(path, heads=False, **states))
    assert run.new_heads == ()
    assert_equal(of_run(run), original.everything())


def older(adam: dict[str, Any]) -> dict[str, Any]:
    """As before torch 2.8, which the original may use: without saying how weights decay."""
    for group in adam["param_groups"]:
        for key in ("decoupled_weight_decay", "fused", "foreach"):
            del group[key]
    return adam


def test_adam_of_older_pytorch(path: Path) -> None:
    original = Original().train(0, 1)
    run = load_eb_jepa_run(original.save(path, optimizer_state_dict=older(original.optimizer.state_dict())))
    assert_equal(of_run(run), original.everything())
    assert all(group["decoupled_weight_decay"] is False for group in run.optimizer.param_groups)


def test_weight_decay_is_that_of_the_file_or_refused(path: Path) -> None:
    original = Original()
    groups = original.optimizer.param_groups
    original.optimizer = torch.optim.AdamW([{"params": g["params"], "lr": g["lr"]} for g in groups], weight_decay=0.1)
    run = load_eb_jepa_run(original.train(0, 1).save(path))
    step = TrainStep(run.jepa, run.image_decoder, run.detection_head, run.optimizer, steps=STEPS)
    step(*batch(2))
    for actual, expected in zip(run.jepa.parameters(), original.train(2).jepa.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
    original.save(path, optimizer_state_dict=older(original.optimizer.state_dict()))
    with pytest.raises(CheckpointError, match="Adam's and AdamW's alike: add decoupled_weight_decay"):
        load_eb_jepa_run(path)


def test_a_run_before_its_first_step_and_entries_of_other_kinds(path: Path) -> None:
    others = {"scheduler_state_dict": {"last_epoch": 1}, "b\n": 2}
    run = load_eb_jepa_run(Original().save(path, epoch=-1, step=0, **others))
    assert (run.epoch, run.step, run.optimizer.state_dict()["state"]) == (0, 0, {})
    assert run.unused == ("b\n", "scheduler_state_dict")


def test_only_the_same_sizes_are_filled(path: Path) -> None:
    run = load_eb_jepa_run(Original(dtype=torch.float32).train(0, 1).save(path))
    other = load_eb_jepa_run(path)
    other.jepa.encoder.conv1 = nn.Conv2d(1, 3, 3)
    before = {key: value.clone() for key, value in other.jepa.state_dict().items()}
    with pytest.raises(CheckpointError, match="jepa has other parameters"):
        run.copy_into(other.modules, other.optimizer)
    assert_equal(dict(other.jepa.state_dict()), before)


# ---- damage ----------------------------------------------------------------------------------------------------------


def _adam(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda content: change(content["optimizer_state_dict"])


def _moment(name: str, value: Any, index: int = 0) -> Callable[[dict[str, Any]], object]:
    return _adam(lambda adam: adam["state"][index].update({name: value}))


def _setting(group: int = 0, **values: Any) -> Callable[[dict[str, Any]], object]:
    return _adam(lambda adam: adam["param_groups"][group].update(values))


def _set(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update(values)


# What Adam's own state must be is tested in test_checkpoint.py.
DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    **{
        f"epoch {value!r}": (_set(epoch=value), "epoch is .*, expected a whole number from -1")
        for value in ("3", 3.0, -2, 2**80, True)
    },
    "a huge string": (_set(epoch="9" * 10_000), r"epoch is '9{39}…, expected"),
    "an lr of 400 digits": (_setting(lr=10**400), r"lr is saved as 10{39}…, expected"),
    "no epoch": (lambda c: c.pop("epoch"), "epoch is missing"),
    "step negative": (_set(step=-1), "step is -1, expected a whole number from 0"),
    "no optimizer": (lambda c: c.pop("optimizer_state_dict"), "no optimizer_state_dict"),
    "not Adam": (_adam(lambda a: a["param_groups"][0].pop("betas")), "same settings: betas"),
    "lr infinite": (_setting(2, lr=math.inf), "optimizer group 2: lr is saved as inf"),
    "betas of 1": (_setting(betas=(0.9, 1.0)), "betas are saved with 1.0"),
    "count NaN": (_moment("step", torch.tensor(math.nan)), "parameter 0: step is nan"),
    "moment NaN": (
        _moment("exp_avg", torch.full((2, 1, 3, 3), math.nan).double()),
        "jepa.encoder.conv1.weight: exp_avg has NaN or infinite",
    ),
    "moment negative": (
        _moment("exp_avg_sq", torch.full((2, 1, 3, 3), -1.0).double()),
        "jepa.encoder.conv1.weight: exp_avg_sq is negative",
    ),
    "state missing": (
        _adam(lambda a: a["state"].pop(3)),
        "no state of jepa.encoder.layer1.conv1.weight, after 2 steps",
    ),
    "state of a head missing": (_adam(lambda a: a["state"].popitem()), "no state of detection_head.head.0.2"),
    "no state at all": (_adam(lambda a: a["state"].clear()), "no state of jepa.encoder.conv1.weight"),
    "head NaN": (
        lambda c: c["pixel_decoder"]["net.0.bias"].fill_(math.inf),
        "pixel_decoder: net.0.bias has NaN or inf",
    ),
    "a head twice": (_set(decoder={}), "has the image_decoder twice, as pixel_decoder and decoder"),
    "head a list": (_set(detection_head=[1]), "detection_head is not a dict of tensors"),
    "head empty": (_set(detection_head={}), "detection_head: .*head.0.0.weight is missing"),
    "head of another encoder": (
        lambda c: c.update(detection_head=DetHead(9, 2, 1).double().state_dict()),
        r"detection_head: .*head.0.0.weight is \(2, 9, 1, 3, 3\)",
    ),
    "decoder of another image": (
        lambda c: c.update(pixel_decoder=ImageDecoder(4, 3).double().state_dict()),
        r"pixel_decoder: .*net.2.weight is \(3, 16, 3, 3\)",
    ),
    "code": (_set(cfg=argparse.Namespace(lr=1.0)), r"other pickled objects \(argparse.Namespace\)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_named(saved: Path, path: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    content = torch.load(saved, weights_only=True)
    spoil(content)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_eb_jepa_run(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_files(saved: Path, path: Path) -> None:
    data = saved.read_bytes()
    for damaged in (b"", b"not a zip", data[: len(data) // 2], data[:3000] + b"\xff" * 9 + data[3009:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=str(path)):
            load_eb_jepa_run(path)
    torch.save(torch.load(saved, weights_only=True), path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="is in torch's legacy format"):
        load_eb_jepa_run(path)
    with pytest.raises(CheckpointError, match="nothere: No such file"):
        load_eb_jepa_run(path.with_name("nothere"))
    with pytest.raises(ValueError, match="device 'moon' cannot be used"):
        load_eb_jepa_run(path, device="moon")


# ---- out of ours -----------------------------------------------------------------------------------------------------


def export(path: Path, run: EbJepaRun, **options: Any) -> Path:
    heads = {"image_decoder": run.image_decoder, "detection_head": run.detection_head}
    options = {"epoch": run.epoch, "step": run.step, **heads, **options}
    fastjepa.save_eb_jepa_checkpoint(path, run.jepa, options.pop("optimizer", run.optimizer), **options)
    return path


@pytest.mark.parametrize("how", ["plain", "channels-last", "compiled", "graphed"])
def test_the_original_goes_on_from_ours(path: Path, how: str) -> None:
    original = Original(dtype=torch.float32).train(0, 1)
    run = load_eb_jepa_run(original.save(path))
    if how == "channels-last":
        run.jepa.to(memory_format=torch.channels_last)
        run.copy_into(run.modules, run.optimizer)
    if how == "compiled":
        run.jepa.predictor.predictor = torch.compile(run.jepa.predictor.predictor)  # type: ignore[assignment]
    if how == "graphed":  # as GraphedTrainStep makes it
        for group in run.optimizer.param_groups:
            group.update(capturable=True, fused=True, foreach=False, lr=torch.tensor(group["lr"]))
    again = Original(seed=1, dtype=torch.float32)
    content = again.load(export(path, run))
    assert (content["epoch"], content["step"]) == (3, 2)
    assert content["model_state_dict"].keys() == original.jepa.state_dict().keys()
    assert all(value.is_contiguous() for value in content["model_state_dict"].values())
    assert_equal(again.everything(), original.everything())
    usual = original.optimizer.state_dict()["param_groups"]
    assert again.optimizer.state_dict()["param_groups"] == usual
    assert_equal(again.train(2).everything(), original.train(2).everything())


def test_without_optimizer_and_heads(path: Path) -> None:
    """The original's own JEPA, too."""
    original = Original().train(0)
    fastjepa.save_eb_jepa_checkpoint(path, original.jepa, epoch=0, step=0)
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"epoch", "step", "model_state_dict"}
    assert content["epoch"] == -1  # the original goes on with the one after it
    assert_equal(content["model_state_dict"], dict(original.jepa.state_dict()))
    fastjepa.save_eb_jepa_checkpoint(path, original.jepa, original.optimizer, epoch=4, step=1)
    assert_equal(dict(load_eb_jepa_run(path).jepa.state_dict()), dict(original.jepa.state_dict()))


def test_what_cannot_be_written(path: Path) -> None:
    original = Original().train(0, 1)
    run = load_eb_jepa_run(original.save(path))
    kept = path.read_bytes()
    for name, value in (("epoch", -1), ("epoch", 1.0), ("step", True)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            export(path, run, **{name: value})
    with pytest.raises(ValueError, match="Adam with three groups"):
        export(path, run, optimizer=torch.optim.Adam(run.jepa.parameters()))
    with pytest.raises(ValueError, match="Adam with three groups"):
        export(path, run, optimizer=torch.optim.SGD([{"params": m.parameters()} for m in run.modules.values()], 1.0))
    with pytest.raises(ValueError, match="group for detection_head has other parameters"):
        export(path, run, detection_head=DetHead(4, 2, 1))
    with pytest.raises(CheckpointError, match="could not write"):
        export(path.parent / "nothere" / "file", run)
    with torch.no_grad():
        run.jepa.encoder.conv1.weight[0] = math.nan
    for optimizer in (None, run.optimizer):
        with pytest.raises(CheckpointError, match=r"encoder.conv1.weight has NaN"):
            export(path, run, optimizer=optimizer)
    assert path.read_bytes() == kept
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# ---- the command lines -----------------------------------------------------------------------------------------------

TINY = (
    "--device cpu --canvas 16 --digit_size 8 --n_train 6 --n_val 3 --n_frames 5 --batch_size 3 --steps 2 "
    "--log_every 4 --checkpoint_every 2"
).split()


def new_run(file: Path, folder: Path, cache: Path, *flags: str) -> Any:
    from fastjepa.training.command_line import parse_config
    from fastjepa.training.trainer import Trainer

    given = ("--from_eb_jepa", str(file), "--out", str(folder), "--cache_dir", str(cache), *flags)
    return Trainer(parse_config([*TINY, *given]))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.packages("tyro", "torchmetrics", "cv2", "sklearn")
def test_a_run_goes_on_and_back(path: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastjepa.export import main as export_main
    from fastjepa.training.command_line import parse_config
    from fastjepa.training.trainer import Trainer

    original = Original(dtype=torch.float32).train(0, 1)
    folder, back = tmp_path / "run", tmp_path / "back.pth.tar"
    trainer = new_run(original.save(path, heads=False), folder, cache, "--epochs", "5")
    assert "begun anew, with fresh Adam state" in capsys.readouterr().out
    config = trainer.config
    sizes = load_eb_jepa_run(path).sizes
    assert {name: getattr(config, name) for name in sizes} == sizes
    assert (config.preset, config.lr, config.std_coeff, config.from_eb_jepa) == ("full", 1e-3, 10.0, path)
    assert (trainer.epoch, trainer.global_step) == (4, 2)
    found = everything(trainer.jepa, trainer.image_decoder, trainer.detection_head, trainer.optimizer)
    expected = original.everything()
    assert all(torch.equal(value, expected[key]) for key, value in found.items() if key.startswith("jepa."))
    assert not any(": " in key for key in found if not key.startswith("jepa."))  # no Adam state of new heads

    # A checkpoint that nothing was trained after, whose heads have no Adam state yet, can be handed back.
    export_main(["--checkpoint", str(folder), "--eb_jepa", str(tmp_path / "at once")])
    at_once = load_eb_jepa_run(tmp_path / "at once")
    assert_equal(of_run(at_once), found)

    trainer.run()
    assert (trainer.epoch, trainer.global_step) == (5, 4)
    path.unlink()  # a resumed run does without it
    capsys.readouterr()
    resumed = Trainer(parse_config(["--resume", str(folder), "--epochs", "6", "--device", "cpu"]))
    assert resumed.config.from_eb_jepa == path
    resumed.run()
    assert [row["epoch"] for row in resumed.rows] == [5, 6]

    export_main(["--checkpoint", str(folder), "--eb_jepa", str(back)])
    said = capsys.readouterr().out
    assert f"wrote {back}, after step 6: eb_jepa goes on with its epoch 6" in said
    assert f"change it to '{sizes['projector']}' and {sizes['hdet']}" in said
    again = Original(seed=1, dtype=torch.float32)
    assert again.load(back)["epoch"] == 5
    now = everything(resumed.jepa, resumed.image_decoder, resumed.detection_head, resumed.optimizer)
    assert_equal(again.everything(), now)
    with pytest.raises(SystemExit):
        export_main(["--checkpoint", str(folder), "--eb_jepa", str(back)])
    assert f"--eb_jepa {back} exists already" in capsys.readouterr().err


@pytest.mark.packages("tyro", "torchmetrics", "cv2", "sklearn")
def test_a_run_with_heads_and_another_rate(
    path: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Original(dtype=torch.float32).train(0, 1)
    for group in original.optimizer.param_groups:
        group["lr"] = 0.0  # as a schedule leaves it
    original.save(path)
    with pytest.raises(SystemExit):
        new_run(path, tmp_path / "run", cache)
    assert "--lr must be a positive number, got 0.0" in capsys.readouterr().err
    trainer = new_run(path, tmp_path / "run", cache, "--lr", "0.01", "--preset", "readme")
    found = everything(trainer.jepa, trainer.image_decoder, trainer.detection_head, trainer.optimizer)
    assert_equal(found, original.everything())
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.01, 0.001, 0.01]
    assert (trainer.config.preset, trainer.config.std_coeff, trainer.config.epochs) == ("readme", 200.0, 100)
    assert trainer.config.hdet == 2


@pytest.mark.packages("tyro", "torchmetrics", "cv2", "sklearn")
def test_requests_that_contradict_the_file(
    saved: Path, path: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastjepa.export import main as export_main

    Original(dtype=torch.float32).train(0, 1).save(path)
    for flags, message in (
        (["--epochs", "4"], "ended after epoch 4 and step 2, and --epochs and --max_steps count those too: give more"),
        (["--max_steps", "2"], "ended after epoch 4 and step 2, and"),
        (["--henc", "9", "--hdet", "8"], r"asked for: --henc 9 \(the file has 2\), --hdet 8 \(the file has 2\)"),
        (["--projector", "4-64-64"], r"asked for: --projector 4-64-64 \(the file has 4-"),
    ):
        with pytest.raises(ValueError, match=message):
            new_run(path, tmp_path / "run", cache, *flags)
    with pytest.raises(ValueError, match=r"has weights in torch\.float64; training takes torch\.float32"):
        new_run(saved, tmp_path / "run", cache)
    with pytest.raises(SystemExit):
        new_run(tmp_path / "nothere", tmp_path / "run", cache)
    nowhere = tmp_path / "nothere"
    assert f"--from_eb_jepa {nowhere}: could not read {nowhere}: No such file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        export_main(["--checkpoint", str(path), "--eb_jepa", str(tmp_path / "back")])
    assert "not a fastjepa checkpoint" in capsys.readouterr().err
