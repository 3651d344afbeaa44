"""Trained weights for use elsewhere: safetensors files with a JSON of the sizes, and the model that reads them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from fastjepa.files.safe_files import CheckpointError, write_atomic, write_text_atomic
from fastjepa.files.state_dicts import plain_state
from fastjepa.model.jepa import JEPA, autoregressive_rollout
from fastjepa.model.networks import DetHead, ImageDecoder, ResNet5, ResUNet, StateOnlyPredictor
from fastjepa.optional_packages import needed_for
from fastjepa.storage.sizes import (
    build_filled,
    check_compatible,
    checked_device,
    decoder_sizes,
    detection_head_sizes,
    encoder_sizes,
    predictor_sizes,
)

FORMAT = "fastjepa pretrained"
VERSION = 1

# Every part: how its sizes follow from its tensors, and how it is built from them. The file is called like the part.
_PARTS: dict[str, tuple[Callable[[Mapping[str, Any]], dict[str, int]], Callable[[dict[str, int]], nn.Module]]] = {
    "encoder": (encoder_sizes, lambda s: ResNet5(s["dobs"], s["henc"], s["dstc"])),
    "predictor": (
        predictor_sizes,
        lambda s: StateOnlyPredictor(
            ResUNet(s["context_length"] * s["dstc"], s["hpre"], s["dstc"]), s["context_length"]
        ),
    ),
    "decoder": (decoder_sizes, lambda s: ImageDecoder(s["in_d"], s["out_d"], s["hidden"])),
    "detection_head": (detection_head_sizes, lambda s: DetHead(**s)),
}


class PretrainedJEPA(nn.Module):
    """A trained Video JEPA for inference: frozen, without gradients, and always in eval mode, whatever contains it.

    Attributes:
        encoder, predictor: the networks.
        decoder, detection_head: the probe heads on states, or None if they were not exported.
    """

    def __init__(
        self,
        encoder: ResNet5,
        predictor: StateOnlyPredictor,
        decoder: ImageDecoder | None = None,
        detection_head: DetHead | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.decoder = decoder
        self.detection_head = detection_head
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> PretrainedJEPA:
        """Stay in eval mode: BatchNorm must not learn from what the model is used on."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video (B, C, T, H, W), floating point in [0, 1] → states (B, D, T, H, W).

        Raises:
            ValueError: another rank or number of channels.
            TypeError: not floating point.
        """
        _check_channels("video", video, self.encoder.conv1.in_channels)
        return self.encoder(video)

    def rollout(
        self, video: Tensor | None = None, steps: int = 8, *, states: Tensor | None = None, chunk: int | None = None
    ) -> Tensor:
        """Predict `steps` frames beyond the given ones, each from the last two states (predicted ones included).

        Args:
            video: (B, C, T, H, W), T ≥ 2; encoded first.
            steps: how many frames to predict, ≥ 1.
            states: (B, D, T, H, W) instead of a video.
            chunk: encode and predict this many clips at a time, for less memory; default: all at once.

        Returns:
            The T given states followed by the predicted ones: (B, D, T + steps, H, W).

        Raises:
            ValueError: both or none of video and states, a wrong shape, too few frames, `steps` or `chunk` < 1.
        """
        if states is not None:
            _check_channels("states", states, self.encoder.layer3.conv2.out_channels)
        return autoregressive_rollout(self.encode, self.predictor, video, steps, states=states, chunk=chunk)


def export_pretrained(
    jepa: JEPA,
    config: Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    decoder: nn.Module | None = None,
    detection_head: nn.Module | None = None,
) -> None:
    """Write encoder.safetensors, predictor.safetensors, the probe heads given, and config.json; see `load_pretrained`.

    The architecture is read from the weights; `config` is recorded as it is, to tell how they were trained. Each file
    is written atomically, config.json with the checksums last: an interrupted export is detected on loading.

    Raises:
        TypeError: `config` cannot be written as JSON.
        CheckpointError: a part is not of the published form, or the system refused to write.
        MissingPackageError: safetensors is not installed.
    """
    with needed_for("exporting weights"):
        import safetensors.torch
    if (problem := _unrecorded(jepa.encoder)) is not None:
        raise CheckpointError(f"the encoder cannot be exported: {problem}, which the weights do not tell")
    folder = Path(folder)
    parts = {"encoder": jepa.encoder, "predictor": jepa.predictor, "decoder": decoder, "detection_head": detection_head}
    architecture, files, contents = {}, {}, {}
    for name, module in parts.items():
        if module is None:
            continue
        tensors = {key: value.detach().cpu().contiguous() for key, value in plain_state(module).items()}
        sizes_of, build = _PARTS[name]
        sizes = sizes_of(tensors)
        build_filled(f"the {name}", partial(build, sizes), tensors)  # what loading will do
        contents[f"{name}.safetensors"] = data = safetensors.torch.save(tensors)
        architecture[name] = sizes
        files[f"{name}.safetensors"] = hashlib.sha256(data).hexdigest()
    check_compatible(architecture)
    description = {
        "format": FORMAT,
        "version": VERSION,
        "fastjepa": _library_version(),
        "architecture": architecture,
        "sha256": files,
        "config": dict(config),
    }
    try:
        text = json.dumps(description, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise TypeError(f"config cannot be written as JSON: {error}") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"could not make the folder {folder}: {error.strerror or error}") from error
    for name, data in contents.items():
        write_atomic(folder / name, partial(_write_bytes, data))
    write_text_atomic(folder / "config.json", text)


def _unrecorded(encoder: nn.Module) -> str | None:
    """What of an encoder does not follow from its weights, or None."""
    if getattr(encoder, "avg_pool", False):
        return "it has avg_pool"
    strides = {layer.stride for layer in encoder.modules() if isinstance(layer, nn.Conv2d)} - {(1, 1)}
    return f"it has strides of {min(strides)}" if strides else None


def load_pretrained(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> PretrainedJEPA:
    """The model that `export_pretrained` wrote, ready for `encode` and `rollout`.

    Raises:
        CheckpointError: a file is missing or damaged, does not match its checksum, or has other sizes than recorded.
        ValueError: the device is not there.
        MissingPackageError: safetensors is not installed.
    """
    folder = Path(folder)
    device = checked_device(device)
    description = _read_description(folder / "config.json")
    modules: dict[str, Any] = {}
    sizes: dict[str, dict[str, int]] = {}
    for name, (sizes_of, build) in _PARTS.items():
        path = folder / f"{name}.safetensors"
        if path.name not in description["sha256"]:
            if name in ("encoder", "predictor"):
                raise CheckpointError(f"{folder / 'config.json'} does not list {path.name}")
            continue
        tensors = _read_tensors(path, description["sha256"][path.name])
        try:
            sizes[name] = sizes_of(tensors)
            modules[name] = build_filled(name, partial(build, sizes[name]), tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{path} does not hold the {name}: {error}") from error
    if description["architecture"] != sizes:
        raise CheckpointError(
            f"{folder / 'config.json'} gives the sizes {description['architecture']}, the weights have {sizes}"
        )
    check_compatible(sizes)
    return PretrainedJEPA(**modules).to(device)


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe a {FORMAT} model")
    version = description.get("version")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} has no valid version")
    if version > VERSION:
        raise CheckpointError(f"{path} has format version {version}; this fastjepa reads up to {VERSION}: update it")
    for section in ("architecture", "sha256"):
        if not isinstance(description.get(section), dict):
            raise CheckpointError(f"{path} has no section {section!r}")
    return description


def _read_tensors(path: Path, sha256: object) -> dict[str, Tensor]:
    with needed_for("reading exported weights"):
        import safetensors.torch
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{path} is damaged or from another export: its checksum is not the one in config.json")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a valid safetensors file: {error}") from error


def _library_version() -> str:
    try:
        return importlib.metadata.version("fastjepa")
    except importlib.metadata.PackageNotFoundError:
        return "a checkout that is not installed"


def _write_bytes(data: bytes, file: BinaryIO) -> None:
    file.write(data)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error


def _check_channels(name: str, x: Tensor, channels: int) -> None:
    if x.dim() != 5 or x.shape[1] != channels:
        raise ValueError(f"{name} must be (B, {channels}, T, H, W), got shape {tuple(x.shape)}")
