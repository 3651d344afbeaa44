"""How a model is run: precision, fused kernels, CUDA graphs, recomputation and layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch

RunPrecision = Literal["fp32", "tf32", "bf16"]


@dataclass(frozen=True)
class ExecutionConfig:
    """One way to run a model. The default is eager PyTorch in fp32.

    Attributes:
        precision: fp32, tf32 (fp32 weights, products in TF32) or bf16 autocast of the networks; losses are fp32.
        fused: networks and losses by Triton kernels.
        cuda_graph: training steps, or rollouts, as CUDA graphs.
        recompute: fused networks compute activations again in the backward pass instead of keeping them.
        channels_last: weights, and with them activations, are channels-last in memory.

    Raises:
        ValueError: an unknown precision; `recompute` without `fused`.
    """

    precision: RunPrecision = "fp32"
    fused: bool = False
    cuda_graph: bool = False
    recompute: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.precision not in get_args(RunPrecision):
            raise ValueError(f"precision must be one of {', '.join(get_args(RunPrecision))}; got {self.precision!r}")
        if self.recompute and not self.fused:
            raise ValueError("recompute is for fused networks: it needs fused=True")

    def __str__(self) -> str:
        names = {"cuda_graph": "CUDA graphs", "recompute": "recomputation", "channels_last": "channels-last"}
        parts = [
            "fused kernels" if self.fused else "eager",
            *(text for name, text in names.items() if getattr(self, name)),
        ]
        return f"{self.precision}, {', '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)

    @staticmethod
    def from_json(values: Any) -> ExecutionConfig:
        """The inverse of `to_json`. Raises ValueError, naming the field, for anything else."""
        names = [field.name for field in fields(ExecutionConfig)]
        if not isinstance(values, Mapping) or set(values) != set(names):
            raise ValueError(f"an execution config is a table of {', '.join(names)}")
        for name, value in values.items():
            if type(value) is not (str if name == "precision" else bool):
                raise ValueError(
                    f"{name} must be {'text' if name == 'precision' else 'true or false'}, got {value!r:.40}"
                )
        return ExecutionConfig(**values)


def ambient_precision(device: torch.device) -> RunPrecision:
    """In which precision networks would compute on `device` if they were called now."""
    kind = device.type
    if kind not in ("cpu", "cuda"):  # torch has no autocast for some
        return "fp32"
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
        return "bf16"
    return "tf32" if kind == "cuda" and any(ambient_tf32()) else "fp32"


def ambient_tf32() -> tuple[bool, bool]:
    """Whether fp32 matrix products, and convolutions, would be multiplied in TF32 on a GPU now.

    `allow_tf32` says so too, but raises RuntimeError once a script has used `fp32_precision`, which always answers.
    """
    backends: Any = torch.backends
    return backends.cuda.matmul.fp32_precision == "tf32", backends.cudnn.conv.fp32_precision == "tf32"


def set_tf32(matmul: bool, cudnn: bool) -> None:
    """By the older switches, which set the newer ones too, so that reading either works."""
    backends: Any = torch.backends
    backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = matmul, cudnn
    if ambient_tf32()[1] and not cudnn:  # off means "as in general" there, and in general TF32 is on
        backends.cudnn.conv.fp32_precision = backends.cudnn.rnn.fp32_precision = "ieee"


@contextlib.contextmanager
def tf32_products(device: torch.device, on: bool) -> Iterator[None]:
    """Inside, fp32 matrix products and convolutions on a GPU are in TF32, or not; on a CPU nothing changes."""
    if device.type != "cuda":
        yield
        return
    before = ambient_tf32()
    set_tf32(on, on)
    try:
        yield
    finally:
        set_tf32(*before)
