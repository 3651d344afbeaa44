"""An exported model is the trained one: same weights, same numbers, in a folder that notices any damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from fastjepa.files.safe_files import CheckpointError
from fastjepa.model.jepa import JEPA, build_jepa
from fastjepa.model.networks import DetHead, ImageDecoder, Projector, ResNet5
from fastjepa.model.probes import build_probes
from fastjepa.storage import export
from fastjepa.storage.export import PretrainedJEPA, export_pretrained, load_pretrained

GOLDEN = Path(__file__).parent / "data" / "golden_video_jepa.npz"
CONFIG = {"lr": 1e-3, "steps": 4, "out": None}
DOBS, DSTC = 2, 3


def some_jepa(dstc: int = DSTC) -> JEPA:
    torch.manual_seed(0)
    jepa = build_jepa(dobs=DOBS, henc=2, hpre=4, dstc=dstc, std_coeff=1.0, cov_coeff=1.0, projector=f"{dstc}-4-4")
    jepa.unroll(torch.rand(2, DOBS, 4, 8, 8))  # moves the BatchNorm buffers off their defaults
    return jepa


def some_probes() -> tuple[ImageDecoder, DetHead]:
    return build_probes(dobs=DOBS, dstc=DSTC, hdet=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    decoder, head = some_probes()
    export_pretrained(some_jepa(), CONFIG, tmp_path / "out" / "model", decoder=decoder, detection_head=head)
    return tmp_path / "out" / "model"


def same_state(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weights_come_back_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    jepa, (decoder, head) = some_jepa().to(dtype), some_probes()
    decoder, head = decoder.to(dtype), head.to(dtype)
    jepa.to(memory_format=torch.channels_last)
    export_pretrained(jepa, CONFIG, tmp_path, decoder=decoder, detection_head=head)
    model = load_pretrained(tmp_path)
    assert same_state(model.encoder, jepa.encoder)
    assert same_state(model.predictor, jepa.predictor)
    assert model.decoder is not None
    assert same_state(model.decoder, decoder)
    assert model.detection_head is not None
    assert same_state(model.detection_head, head)


def test_the_folder_holds_what_is_documented(folder: Path) -> None:
    names = ["config.json", *(f"{part}.safetensors" for part in ("decoder", "detection_head", "encoder", "predictor"))]
    assert sorted(path.name for path in folder.iterdir()) == names
    description = json.loads((folder / "config.json").read_text())
    assert description["architecture"] == {
        "encoder": {"dobs": 2, "henc": 2, "dstc": 3},
        "predictor": {"hpre": 4, "dstc": 3, "context_length": 2},
        "decoder": {"in_d": 3, "out_d": 2, "hidden": 16},
        "detection_head": {"in_d": 3, "h_d": 5, "out_d": 1},
    }
    assert description["config"] == CONFIG
    assert isinstance(description["fastjepa"], str)
    for name in names[1:]:
        assert description["sha256"][name] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    # The files can be used without this library.
    tensors = safetensors.torch.load_file(folder / "predictor.safetensors")
    assert tensors.keys() == some_jepa().predictor.state_dict().keys()


def test_heads_are_optional_and_those_of_an_earlier_export_are_not_taken(folder: Path) -> None:
    export_pretrained(some_jepa(), CONFIG, folder)
    model = load_pretrained(folder)
    assert model.decoder is None
    assert model.detection_head is None


def test_a_compiled_jepa_exports_like_a_plain_one(tmp_path: Path) -> None:
    jepa = some_jepa()
    export_pretrained(jepa, CONFIG, tmp_path / "plain")
    jepa.encoder = torch.compile(jepa.encoder)  # wraps; nothing is compiled before a call
    export_pretrained(jepa, CONFIG, tmp_path / "compiled")
    for name in ("encoder.safetensors", "predictor.safetensors", "config.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "compiled" / name).read_bytes()


def test_the_original_s_numbers_come_out_of_an_export(tmp_path: Path) -> None:
    """Recorded from the original in evaluation mode, after one training step moved its buffers."""
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        golden = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}

    def fill(module: nn.Module, prefix: str) -> None:
        keys = module.state_dict().keys()
        module.load_state_dict({key: golden.get(f"after/{prefix}{key}", golden[f"init/{prefix}{key}"]) for key in keys})

    jepa = build_jepa(dobs=1, henc=4, hpre=4, dstc=16, std_coeff=1.0, cov_coeff=1.0).double()
    decoder, head = ImageDecoder(16, 1).double(), DetHead(16, 4, 1).double()
    for prefix, module in {
        "encoder.": jepa.encoder,
        "predictor.": jepa.predictor,
        "decoder.": decoder,
        "dethead.": head,
    }.items():
        fill(module, prefix)
    export_pretrained(jepa, CONFIG, tmp_path, decoder=decoder, detection_head=head)

    model, video = load_pretrained(tmp_path), golden["video"]
    states = model.encode(video)
    assert model.decoder is not None
    assert model.detection_head is not None
    results = {
        "eval/state": states,
        "eval/autoregressive": model.rollout(video[:, :, :2], steps=5),
        "eval/decoded": model.decoder(states),
        "eval/detected": model.detection_head(states),
    }
    for name, result in results.items():
        assert result.shape == golden[name].shape, name
        assert (result - golden[name]).norm() <= 1e-9 * golden[name].norm(), name


def test_rollout_is_the_autoregressive_unroll(folder: Path) -> None:
    jepa, model = some_jepa().eval(), load_pretrained(folder)
    video = torch.rand(2, DOBS, 4, 9, 7)
    expected, _ = jepa.unroll(video, None, 3, "autoregressive", 2, compute_loss=False)
    rolled = model.rollout(video[:, :, :2], 3)
    assert rolled.shape == (2, DSTC, 5, 9, 7)
    assert not rolled.requires_grad
    assert torch.equal(rolled, expected)
    # Every given frame is kept, and the last two are read, whether they come as video or as states.
    longer = model.rollout(video, 3)
    assert torch.equal(longer[:, :, :4], model.encode(video))
    assert torch.equal(longer[:, :, 2:], model.rollout(states=longer[:, :, 2:4], steps=3))


def test_the_model_is_frozen_and_stays_in_eval_mode(folder: Path) -> None:
    model = load_pretrained(folder)
    video = torch.rand(1, DOBS, 3, 8, 8)
    before = model.encode(video)
    container = nn.Sequential(model).train()
    assert not any(module.training for module in model.modules())
    assert container.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.encode(video), before)
    states = before.clone().requires_grad_()
    assert not model.rollout(states=states, steps=1).requires_grad
    assert not model.encode(video.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, v, s: m.encode(v[0]), r"video must be \(B, 2, T, H, W\), got shape \(2, 3, 8, 8\)"),
        (lambda m, v, s: m.encode(v[:, :1]), r"video must be \(B, 2, T, H, W\), got shape \(1, 1, 3, 8, 8\)"),
        (lambda m, v, s: m.rollout(v, 0), "steps must be at least 1, got 0"),
        (lambda m, v, s: m.rollout(v[:, :, :1], 1), "at least 2 frames, got 1"),
        (lambda m, v, s: m.rollout(steps=1), "either a video or states"),
        (lambda m, v, s: m.rollout(v, 1, states=s), "either a video or states"),
        (lambda m, v, s: m.rollout(states=v), r"states must be \(B, 3, T, H, W\), got shape \(1, 2, 3, 8, 8\)"),
        (lambda m, v, s: m.rollout(s), r"video must be \(B, 2, T, H, W\), got shape \(1, 3, 3, 8, 8\)"),
    ],
)
def test_a_wrong_argument_is_named(folder: Path, call: Callable[..., object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(load_pretrained(folder), torch.rand(1, DOBS, 3, 8, 8), torch.rand(1, DSTC, 3, 8, 8))


def test_integer_video_is_refused(folder: Path) -> None:
    with pytest.raises(TypeError, match="uint8"):
        load_pretrained(folder).encode(torch.zeros(1, DOBS, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without CUDA")
def test_a_device_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="device 'cuda' cannot be used here"):
        load_pretrained(folder, device="cuda")


def test_loading_draws_no_random_numbers(folder: Path) -> None:
    before = torch.get_rng_state()
    load_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


# ---- damage ----


def edit_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        description = json.loads((folder / "config.json").read_text())
        change(description)
        (folder / "config.json").write_text(json.dumps(description))

    return apply


def replace_part(name: str, data: bytes) -> Callable[[Path], None]:
    """Replace a file and its checksum, as somebody would who made the folder by hand."""

    def apply(folder: Path) -> None:
        (folder / name).write_bytes(data)
        edit_config(lambda d: d["sha256"].update({name: hashlib.sha256(data).hexdigest()}))(folder)

    return apply


def flip(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)

    return apply


def weights_of(module: nn.Module) -> bytes:
    return safetensors.torch.save({k: v.detach().contiguous() for k, v in module.state_dict().items()})


OTHER = some_jepa(dstc=4)
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"could not read .*config.json: No such file"),
    "no encoder": (lambda f: (f / "encoder.safetensors").unlink(), r"could not read .*encoder.safetensors: No such"),
    "no listed head": (lambda f: (f / "decoder.safetensors").unlink(), r"could not read .*decoder.safetensors"),
    "flipped bit": (flip("predictor.safetensors"), r"predictor.safetensors is damaged or from another export"),
    "flipped bit in a head": (flip("detection_head.safetensors"), "detection_head.safetensors is damaged"),
    "empty file": (lambda f: (f / "encoder.safetensors").write_bytes(b""), "encoder.safetensors is damaged"),
    "interrupted export": (
        lambda f: (f / "encoder.safetensors").write_bytes(weights_of(OTHER.encoder)),
        "is damaged or",
    ),
    "config not JSON": (lambda f: (f / "config.json").write_text("lr = 1"), "config.json is not valid JSON"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is not valid JSON"),
    "config nested too deep": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        "config.json is not valid JSON",
    ),
    "config of something else": (lambda f: (f / "config.json").write_text("{}"), "does not describe a fastjepa"),
    "newer": (edit_config(lambda d: d.update(version=2)), "format version 2; this fastjepa reads up to 1"),
    "no version": (edit_config(lambda d: d.pop("version")), "no valid version"),
    "no checksums": (edit_config(lambda d: d.pop("sha256")), "no section 'sha256'"),
    "no architecture": (edit_config(lambda d: d.update(architecture=3)), "no section 'architecture'"),
    "encoder not listed": (edit_config(lambda d: d["sha256"].pop("encoder.safetensors")), "does not list encoder"),
    "other sizes recorded": (
        edit_config(lambda d: d["architecture"]["encoder"].update(henc=9)),
        r"config.json gives the sizes .*'henc': 9.* the weights have .*'henc': 2",
    ),
    "not safetensors": (replace_part("encoder.safetensors", b"x" * 100), "not a valid safetensors file"),
    "other network": (
        replace_part("encoder.safetensors", weights_of(Projector("3-4-4"))),
        "encoder.safetensors does not hold the encoder: cannot tell the sizes",
    ),
    "part of a network": (
        replace_part(
            "encoder.safetensors",
            safetensors.torch.save(
                {"conv1.weight": torch.ones(2, 2, 3, 3), "layer3.conv2.weight": torch.ones(3, 3, 3, 3)}
            ),
        ),
        "does not fit: bn1.weight is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(folder: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(folder)


def test_parts_of_different_models_are_refused(folder: Path, tmp_path: Path) -> None:
    jepa, (decoder, head) = some_jepa(), some_probes()
    mixed = JEPA(jepa.encoder, jepa.encoder, OTHER.predictor, nn.Identity(), nn.Identity())
    wrong_decoder, wrong_head = ImageDecoder(DSTC, DOBS + 1), DetHead(DSTC + 1, 5)
    with pytest.raises(CheckpointError, match="states of 3 channels, the predictor reads 4"):
        export_pretrained(mixed, CONFIG, tmp_path / "new")
    with pytest.raises(CheckpointError, match="images of 2 channels, the decoder paints 3"):
        export_pretrained(jepa, CONFIG, tmp_path / "new", decoder=wrong_decoder, detection_head=head)
    with pytest.raises(CheckpointError, match="states of 3 channels, the detection_head reads 4"):
        export_pretrained(jepa, CONFIG, tmp_path / "new", decoder=decoder, detection_head=wrong_head)
    assert not (tmp_path / "new").exists()
    replace_part("decoder.safetensors", weights_of(wrong_decoder))(folder)
    edit_config(lambda d: d["architecture"]["decoder"].update(out_d=DOBS + 1))(folder)
    with pytest.raises(CheckpointError, match="the decoder paints 3"):
        load_pretrained(folder)


def test_an_encoder_of_another_kind_is_refused(tmp_path: Path) -> None:
    jepa = some_jepa()
    jepa.encoder.layer1.extra = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match=r"the encoder does not fit: layer1.extra.weight is not expected"):
        export_pretrained(jepa, CONFIG, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options", [{"s2": 2}, {"avg_pool": True}])
def test_what_the_weights_do_not_tell_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    jepa = some_jepa()
    jepa.encoder = ResNet5(DOBS, 2, DSTC, **options)
    with pytest.raises(
        CheckpointError, match=r"the encoder cannot be exported: it has .*, which the weights do not tell"
    ):
        export_pretrained(jepa, CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [{"path": Path("x")}, {"lr": float("nan")}], ids=["object", "nan"])
def test_a_config_that_is_not_json_is_refused_before_writing(folder: Path, config: dict[str, Any]) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        export_pretrained(OTHER, config, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"could not make the folder .*file/model: Not a directory"):
        export_pretrained(OTHER, CONFIG, tmp_path / "file" / "model")


def test_config_is_written_last(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that stops half-way leaves a folder that says so, never one of mixed weights."""

    def refuse(path: Path, text: str) -> None:
        raise CheckpointError("no space")

    monkeypatch.setattr(export, "write_text_atomic", refuse)
    with pytest.raises(CheckpointError, match="no space"):
        export_pretrained(OTHER, CONFIG, folder)
    with pytest.raises(CheckpointError, match="from another export"):
        load_pretrained(folder)


@pytest.mark.gpu
def test_it_runs_on_a_gpu(folder: Path) -> None:
    model: PretrainedJEPA = load_pretrained(folder, device="cuda")
    video = torch.rand(1, DOBS, 3, 8, 8)
    rolled: Tensor = model.rollout(video.cuda(), 2)
    expected = load_pretrained(folder).rollout(video, 2)
    assert rolled.device.type == "cuda"
    # fp32 on both (`exact_arithmetic`), summed in other orders in about 40 layers one after another.
    assert (rolled.cpu() - expected).norm() <= 1e-4 * expected.norm()
