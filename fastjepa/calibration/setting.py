"""What a choice is measured for: the machine, the code, the sizes and the arithmetic. It is the key of the cache."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from fastjepa.config import Config
from fastjepa.environment import device_name, driver_version
from fastjepa.files.safe_files import CheckpointError
from fastjepa.policy import ambient_tf32
from fastjepa.storage.sizes import encoder_sizes, predictor_sizes, projector_sizes

Purpose = Literal["train", "inference"]
RunPrecision = Literal["fp32", "tf32", "bf16"]  # as the flag of a run says it
AutocastPrecision = Literal["fp32", "bf16"]

ROLLOUT_STEPS = 8  # of inference, whatever the horizon: more steps cost more of the same
CONTEXT = 2  # frames that predict the next one, of the published predictor
# A row is made for one key, but a committed one counts on any machine with its GPU: these may differ then.
SOFTWARE = ("driver", "torch", "triton", "cuda", "cudnn", "fastjepa")
_PACKAGE = Path(__file__).resolve().parent.parent
# What is measured is made of these; a change in one of them makes rows of before worthless.
_MEASURED_ROOMS = ("kernels", "fused", "graphs", "model", "moving_mnist", "trials", "calibration")


@dataclass(frozen=True)
class Setting:
    """One question to the calibration. Sizes are those of a video (batch, dobs, frames, height, width).

    `steps` are the prediction steps of training, or of the rollout. `sources` is a hash of the code that is measured.
    `precision` is that of autocast, or fp32; `matmul_tf32` and `cudnn_tf32` say whether fp32 matrix products and
    convolutions are multiplied in TF32, apart, because by default PyTorch does so in convolutions alone.
    `deterministic` and `benchmark` are the settings of cuDNN under which the work will run.
    """

    gpu: str
    driver: str
    torch: str
    triton: str
    cuda: str
    cudnn: str
    fastjepa: str
    sources: str
    dobs: int
    henc: int
    hpre: int
    dstc: int
    projector: str
    batch: int
    frames: int
    height: int
    width: int
    steps: int
    precision: AutocastPrecision
    matmul_tf32: bool
    cudnn_tf32: bool
    purpose: Purpose
    deterministic: bool
    benchmark: bool

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind: type = {"int": int, "bool": bool}.get(str(field.type), str)
            if type(value) is not kind:
                raise ValueError(f"{field.name} must be {kind.__name__}, got {value!r}")
            if isinstance(value, int) and kind is int and value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if self.precision not in get_args(AutocastPrecision):
            known = ", ".join(get_args(AutocastPrecision))
            raise ValueError(f"precision must be one of {known}; got {self.precision!r}")
        if self.purpose not in get_args(Purpose):
            raise ValueError(f"purpose must be one of {', '.join(get_args(Purpose))}; got {self.purpose!r}")
        least = CONTEXT + (self.purpose == "train")
        if self.frames < least:
            raise ValueError(f"{self.purpose} takes clips of at least {least} frames, got {self.frames}")

    def __str__(self) -> str:
        widths = f"henc {self.henc}, hpre {self.hpre}, dstc {self.dstc}, projector {self.projector}"
        shape = (self.batch, self.dobs, self.frames, self.height, self.width)
        return f"{self.purpose} in {self._arithmetic} of {shape}, {self.steps} steps, {widths}; {self.gpu}"

    @property
    def rule(self) -> RunPrecision:
        """By which precision results are judged: TF32 in any part of the work is no fp32."""
        return "tf32" if self.precision == "fp32" and (self.matmul_tf32 or self.cudnn_tf32) else self.precision

    @property
    def _arithmetic(self) -> str:
        parts = {"matrix products": self.matmul_tf32, "convolutions": self.cudnn_tf32}
        if self.rule == "tf32" and all(parts.values()):
            return "TF32"
        tf32 = " and ".join(part for part, on in parts.items() if on)
        return f"{self.precision} (TF32 in {tf32})" if tf32 else self.precision

    @property
    def key(self) -> str:
        """32 hexadecimal digits that stand for all fields."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)

    @staticmethod
    def from_json(values: Any) -> Setting:
        """The inverse of `to_json`. Raises ValueError for anything else, field by field."""
        names = [field.name for field in fields(Setting)]
        if not isinstance(values, Mapping) or set(values) != set(names):
            raise ValueError(f"a setting is a table of {', '.join(names)}")
        return Setting(**values)

    def covers(self, other: Setting) -> bool:
        """Whether a row made for this setting answers `other`: the same but for the versions of installed software."""
        mine, its = self.to_json(), other.to_json()
        return all(mine[name] == its[name] for name in mine if name not in SOFTWARE)


def setting_of_config(config: Config, device: torch.device, precision: RunPrecision) -> Setting:
    """The training of a run, at its sizes and under the settings of cuDNN that are in force. Its flag says the rest:
    TF32 is for matrix products and convolutions alike, and nowhere else.
    """
    return Setting(
        **_machine(device),
        dobs=config.dobs, henc=config.henc, hpre=config.hpre, dstc=config.dstc,
        projector=config.projector or f"{config.dstc}-64-64",
        batch=config.batch_size, frames=config.n_frames, height=config.canvas, width=config.canvas,
        steps=config.steps, precision="bf16" if precision == "bf16" else "fp32",
        matmul_tf32=precision == "tf32", cudnn_tf32=precision == "tf32", purpose="train",
    )  # fmt: skip


def setting_of_rollout(config: Config, device: torch.device, precision: RunPrecision, batch: int) -> Setting:
    """Rollouts of a run's model: `batch` clips at a time, from as many frames as predict the next one."""
    training = setting_of_config(config, device, precision)
    return replace(training, purpose="inference", batch=batch, frames=CONTEXT, steps=ROLLOUT_STEPS)


def setting_of_jepa(
    jepa: nn.Module,
    device: torch.device,
    *,
    example: Sequence[int] | None,
    purpose: Purpose,
    precision: AutocastPrecision,
) -> Setting | str:
    """The setting of a JEPA whose sizes are read from its weights; or why it is not of the published form. TF32 is as
    PyTorch is set to use it now.

    `example`: the shape of a video, (B, C, T, H, W); default: that of the recipe. The steps of training are the
    recipe's, because a user's loop does not say its own.

    Raises:
        ValueError: `example` is no such shape, or not of this JEPA's channels; an unknown purpose.
    """
    if purpose not in get_args(Purpose):
        raise ValueError(f"purpose must be one of {', '.join(get_args(Purpose))}; got {purpose!r}")
    shape = None if example is None else _checked_shape(example)
    source: Any = jepa
    if (kinds := {p.dtype for p in jepa.parameters()}) != {torch.float32}:
        return f"its weights are {', '.join(sorted(map(str, kinds)))}, and fp32 weights are what is calibrated"
    try:
        encoder = encoder_sizes(source.encoder.state_dict())
        predictor = predictor_sizes(source.predictor.state_dict())
        projector = projector_sizes(source.predcost.proj.state_dict())
    except (AttributeError, CheckpointError) as error:
        return f"it is not of the published form: {error}"
    if getattr(source.encoder, "avg_pool", False) or any(
        layer.stride != (1, 1) for layer in source.encoder.modules() if isinstance(layer, nn.Conv2d)
    ):
        return "its encoder strides or pools, and what is calibrated keeps the resolution"
    sizes: dict[str, Any] = {**encoder, "hpre": predictor["hpre"], "projector": projector}
    if predictor["context_length"] != CONTEXT or predictor["dstc"] != encoder["dstc"]:
        return f"its predictor reads {predictor['context_length']} states of {predictor['dstc']} channels"
    recipe = Config()
    default = (recipe.batch_size, encoder["dobs"], recipe.n_frames, recipe.canvas, recipe.canvas)
    batch, channels, frames, height, width = default if shape is None else shape
    if channels != encoder["dobs"]:
        raise ValueError(f"example has {channels} channels, and this JEPA encodes videos of {encoder['dobs']}")
    matmul_tf32, cudnn_tf32 = ambient_tf32() if device.type == "cuda" else (False, False)
    return Setting(
        **_machine(device), **sizes, matmul_tf32=matmul_tf32, cudnn_tf32=cudnn_tf32,
        batch=batch, frames=frames, height=height, width=width,
        steps=recipe.steps if purpose == "train" else ROLLOUT_STEPS, precision=precision, purpose=purpose,
    )  # fmt: skip


def ambient_precision(device: torch.device) -> AutocastPrecision:
    """In which precision networks would compute if they were called now: that of autocast."""
    kind = device.type
    in_bf16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return "bf16" if in_bf16 else "fp32"


def _checked_shape(example: Sequence[int]) -> tuple[int, int, int, int, int]:
    shape = tuple(example) if isinstance(example, Sequence) and not isinstance(example, str) else ()
    if len(shape) != 5 or any(type(size) is not int or size < 1 for size in shape):
        raise ValueError(f"example must be the shape (B, C, T, H, W) of a video, five whole numbers; got {example!r}")
    return shape


def _machine(device: torch.device) -> dict[str, Any]:
    return {
        "gpu": device_name(device),
        "driver": driver_version(device),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or ""),
        "fastjepa": _version("fastjepa"),
        "sources": sources_hash(),
        "deterministic": bool(torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()),
        "benchmark": bool(torch.backends.cudnn.benchmark),
    }


@functools.cache
def sources_hash() -> str:
    """12 hexadecimal digits of the code that is measured, the same in a checkout and where it is installed."""
    digest = hashlib.blake2b(digest_size=6)
    for room in _MEASURED_ROOMS:
        folder = _PACKAGE / room
        if not folder.is_dir():  # a checkout without links
            folder = _PACKAGE.parent / room
        for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
            digest.update(f"{room}/{path.relative_to(folder).as_posix()}\n".encode())
            digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
