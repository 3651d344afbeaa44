"""One typed configuration: the recipe, its presets, and the checks that need no data and no device."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

Preset = Literal["auto", "full", "readme", "demo"]
Precision = Literal["auto", "fp32", "tf32", "bf16"]


@dataclass(frozen=True)
class Config:
    """Options of a training run. The defaults are the best published recipe of Video JEPA."""

    batch_size: int = 64
    """Clips per step."""
    dobs: int = 1
    """Image channels; Moving MNIST has 1."""
    henc: int = 32
    """Width of the encoder."""
    hpre: int = 32
    """Width of the predictor."""
    dstc: int = 16
    """Channels of the state."""
    projector: str | None = None
    """Sizes of the projector; default: the state's channels, 64 and 64. The original takes four times the state's
    channels, which is the same for 16."""
    hdet: int = 32
    """Width of the detection head. The original takes the predictor's, which is 32 too by default."""
    steps: int = 4
    """Prediction steps in training."""
    cov_coeff: float = 100.0
    """Weight of the covariance loss."""
    std_coeff: float = 10.0
    """Weight of the standard deviation loss."""
    epochs: int = 50
    """Passes over the training clips."""
    lr: float = 1e-3
    """Learning rate of Adam; the image decoder trains at a tenth of it."""
    seed: int = 2025
    """Seeds initial weights, generated data and the order of batches."""

    preset: Preset = "auto"
    """Where the other defaults come from. "full" is the published recipe, the original's cfgs/default.yaml; "readme" is
    that of its video example's first README (one prediction step, std 200, cov 10, 100 epochs at 5e-4); "demo" is a
    small one for a CPU. "auto" takes full on a GPU or with --from_eb_jepa, else demo."""
    precision: Precision = "auto"
    """Arithmetic of the networks: fp32, tf32 (CUDA only) or bf16 autocast; "auto" takes bf16 on a GPU with tensor cores
    for it, and fp32 elsewhere. Losses are always fp32."""
    backend: Literal["auto", "eager", "fused"] = "auto"
    """Fused kernels (a GPU only), plain PyTorch, or auto: fused kernels on a GPU from sm_80, after a self-check of
    some seconds (FASTJEPA_SELF_CHECK=0 skips it), and else plain PyTorch."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Whole training steps, up to ten in one launch (a GPU only): on, off, or auto: with fused kernels."""
    recompute: Literal["auto", "on", "off"] = "auto"
    """Fused networks compute activations again in the backward pass, for less memory and more time: on or off; auto is
    off, or as a resumed run has it. The same numbers, bit for bit."""
    device: str = "auto"
    """"auto" (CUDA if there is one), "cpu", "cuda" or "cuda:N"."""

    data: Literal["embedded", "idx", "official", "shards"] = "embedded"
    """Moving MNIST from the embedded digits, from an MNIST idx file (--digits), or the official test sequences; or
    clips in shards on disk, of which no more than batches is in memory (docs/scaling.md)."""
    digits: Path | None = None
    """MNIST image file, train-images-idx3-ubyte, gzipped or not; implies --data idx."""
    data_path: Path | None = None
    """mnist_test_seq.npy for --data official; default: looked for in, or downloaded to, the cache. For --data shards
    the folder in which train and validation are."""
    cache_dir: Path | None = None
    """Folder for generated and downloaded data; default: ~/.cache/fastjepa."""
    n_train: int = 18_000
    """Training clips."""
    n_val: int = 2_000
    """Validation clips."""
    n_frames: int = 10
    """Frames of a clip, at least 3."""
    canvas: int = 64
    """Side of a frame, in pixels."""
    digit_size: int = 28
    """Side of a digit's box, in pixels."""

    out: Path | None = None
    """Folder of the run; default: runs/<date>-<preset>."""
    resume: Path | None = None
    """Folder of a run to continue from its checkpoint; its options are the defaults."""
    from_eb_jepa: Path | None = None
    """Go on from a checkpoint of eb_jepa (latest.pth.tar), in a new run: weights, Adam's state, epoch and step are the
    file's, sizes and --lr too unless given. --epochs and --max_steps count what was done before. The file is read once:
    --resume does without it."""
    max_steps: int | None = None
    """Stop after this many optimiser steps in all."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    checkpoint_every: int = 200
    """Optimiser steps between checkpoints; one is also written after each epoch."""
    checkpoint_minutes: float | None = None
    """Also write a checkpoint when this much time has passed since the last one."""
    log_every: int = 20
    """Optimiser steps between readings of the losses."""
    sync_stats: bool = True
    """Of several processes (torchrun): BatchNorm and losses take the statistics of the whole batch, so that N processes
    compute what one would. Without, each takes those of its own clips, as plain data parallel training does, which
    changes the numbers."""
    timeout_minutes: float = 10.0
    """Of several processes: how long one waits for another before the run ends."""
    profile: bool = False
    """Also write a trace of a few training steps to the run's folder, for chrome://tracing or ui.perfetto.dev."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "dobs", "henc", "hpre", "dstc", "hdet", "steps", "epochs", "n_train", "n_val",
                     "canvas", "digit_size", "eval_every", "checkpoint_every", "log_every"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"--max_steps must be at least 1, got {self.max_steps}")
        if self.n_frames < 3:
            raise ValueError(f"--n_frames must be at least 3 (two frames predict the third), got {self.n_frames}")
        for name in ("lr", "timeout_minutes", "checkpoint_minutes"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"--{name} must be a positive number, got {value}")
        for name in ("cov_coeff", "std_coeff"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"--{name} must be a number ≥ 0, got {value}")
        if self.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {self.seed}")
        if self.seed >= 2**63:  # of PyTorch's generators
            raise ValueError(f"--seed must be less than 2^63 = {2**63}, got {self.seed}")
        if self.dobs != 1:
            raise ValueError(f"--dobs must be 1: Moving MNIST has one image channel, got {self.dobs}")
        if self.projector is not None and not _is_projector(self.projector, self.dstc):
            raise ValueError(
                f"--projector must be sizes that begin with --dstc, like {self.dstc}-64-64; got {self.projector!r}"
            )
        if self.digit_size > self.canvas:
            raise ValueError(f"--digit_size must be at most --canvas = {self.canvas}, got {self.digit_size}")
        if self.digits is not None and self.data == "embedded":
            object.__setattr__(self, "data", "idx")

    def to_json(self) -> dict[str, Any]:
        """Plain values only, paths as strings."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Config:
        """The inverse of `to_json`. Raises ValueError for unknown fields or values of the wrong type."""
        fields = {field.name: field for field in dataclasses.fields(Config)}
        unknown = sorted(values.keys() - fields.keys())
        if unknown:
            raise ValueError(f"unknown options in a saved configuration: {', '.join(unknown)}")
        defaults, typed = Config(), dict(values)
        for name, value in values.items():
            default = getattr(defaults, name)
            if name in _PATHS:
                typed[name] = None if value is None else Path(value)
            elif default is not None and value is not None and not isinstance(value, type(default)):
                raise ValueError(
                    f"option {name} in a saved configuration is {value!r}, expected {type(default).__name__}"
                )
        return Config(**typed)


_PATHS = ("digits", "data_path", "cache_dir", "out", "resume", "from_eb_jepa")


def _is_projector(sizes: Any, dstc: int) -> bool:
    parts = sizes.split("-") if isinstance(sizes, str) else []
    return len(parts) >= 2 and all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts) and parts[0] == str(dstc)


# Options that may change when a run is resumed: they decide where and how long it runs, not what is computed.
MAY_CHANGE_ON_RESUME = (
    "epochs", "max_steps", "device", "data_path", "digits", "cache_dir", "out", "resume", "eval_every",
    "checkpoint_every", "log_every", "preset", "cuda_graph", "recompute", "profile",
    "checkpoint_minutes", "timeout_minutes",
)  # fmt: skip

# "full" is the original's examples/video_jepa/cfgs/default.yaml. "readme" is the command in that example's README until
# February 2026 (commit f16a924 replaced it by the other's); its batch size of 64 and its widths are full's.
# The demo is for two CPU cores and a few minutes; docs/demo.md has what was tried and measured.
PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "readme": {"steps": 1, "cov_coeff": 10.0, "std_coeff": 200.0, "epochs": 100, "lr": 5e-4},
    "demo": {
        "batch_size": 8, "henc": 8, "hpre": 16, "dstc": 16, "steps": 2, "epochs": 3, "lr": 3e-3, "n_train": 640,
        "n_val": 100, "canvas": 32, "digit_size": 14,
    },
}  # fmt: skip


def resolve_device(device: str) -> torch.device:
    """ "auto" → CUDA if there is one, else CPU; anything else as given.

    Raises:
        ValueError: not a device, one that does not exist here, or neither CPU nor CUDA.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N; got {device!r}") from None
    if resolved.type == "cpu":
        return resolved
    if resolved.type != "cuda":
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N; got {device!r}")
    if not torch.cuda.is_available():
        why = "this PyTorch was built without CUDA" if torch.version.cuda is None else "PyTorch finds no CUDA device"
        raise ValueError(f"--device {device} was asked for, but {why}; use --device cpu, or auto")
    if resolved.index is not None and resolved.index >= torch.cuda.device_count():
        raise ValueError(
            f"--device {device} was asked for, but there are only {torch.cuda.device_count()} CUDA devices"
        )
    return resolved


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "tf32", "bf16"]:
    """ "auto" → bf16 on a GPU that has tensor cores for it (compute capability 8.0 or more), else fp32."""
    if precision != "auto":
        return precision
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return "fp32"
    with torch.cuda.device(device):
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"


def resolve_preset(preset: str, device: torch.device) -> str:
    """ "auto" → "full" on CUDA and "demo" on CPU. Raises ValueError for an unknown name."""
    if preset == "auto":
        return "full" if device.type == "cuda" else "demo"
    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of auto, {', '.join(PRESETS)}; got {preset!r}")
    return preset


def preset_config(preset: str) -> Config:
    """The defaults of a resolved preset."""
    return Config(preset=preset, **PRESETS[preset])  # type: ignore[arg-type]
