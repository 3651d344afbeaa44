"""What can be chosen: which ops are fused, and how the work is run. All choices compute the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from fastjepa.calibration.layers import LAYERS, checked_layers

Losses = Literal["eager", "closed_form", "fused"]


@dataclass(frozen=True)
class Choice:
    """One way to run a model. The default is eager: plain PyTorch, step by step, contiguous.

    batch_norm: everything between the convolutions as fused kernels (`fastjepa.fused.networks`).
    losses: which path computes the projected losses.
    cuda_graph: the whole training step, or the whole rollout with BatchNorm folded, in one launch.
    recompute: fused networks compute activations again in the backward pass instead of keeping them.
    channels_last: weights, and with them activations, lie channels-last in memory.
    convolutions: networks with BatchNorm folded (`fastjepa.fused`'s FoldedEncoder and FoldedPredictor), for inference
        alone, and which of their launches run by our own kernels; torch's convolutions run the others. "" none, and no
        such networks; "all"; or names, as of `calibration.layers`, sorted and joined by commas.

    Raises:
        ValueError: an unknown path for the losses; `recompute` without `batch_norm`, which alone can do it;
            `convolutions` of no such form, or beside `batch_norm`, which they leave nothing to do.
    """

    batch_norm: bool = False
    losses: Losses = "eager"
    cuda_graph: bool = False
    recompute: bool = False
    channels_last: bool = False
    convolutions: str = ""

    def __post_init__(self) -> None:
        if self.losses not in get_args(Losses):
            raise ValueError(f"losses must be one of {', '.join(get_args(Losses))}; got {self.losses!r}")
        if self.recompute and not self.batch_norm:
            raise ValueError("recompute belongs to the fused networks: it needs batch_norm")
        if self.convolutions not in ("", "all"):
            names = checked_layers("convolutions", self.convolutions.split(","))
            if len(names) == len(LAYERS):
                raise ValueError("convolutions names every layer; say 'all'")
        if self.convolutions and self.batch_norm:
            raise ValueError("convolutions are of networks with BatchNorm folded, which batch_norm would compute apart")

    def __str__(self) -> str:
        names = {
            "batch_norm": "fused blocks", "recompute": "recomputation", "channels_last": "channels-last",
            "cuda_graph": "CUDA graph",
        }  # fmt: skip
        losses = {"eager": [], "closed_form": ["closed-form losses"], "fused": ["fused losses"]}[self.losses]
        some = f" ({len(self.own_layers)} of {len(LAYERS)} layers)" if self.convolutions != "all" else ""
        own = [f"own convolutions{some}"] if self.convolutions else []
        parts = [text for name, text in names.items() if getattr(self, name)]
        return " + ".join([*losses, *own, *parts]) or "eager"

    @property
    def own_layers(self) -> tuple[str, ...]:
        """The names of the launches that run by our own convolutions, in the order of the networks."""
        named = self.convolutions.split(",")
        return LAYERS if self.convolutions == "all" else tuple(layer for layer in LAYERS if layer in named)

    @property
    def needs_kernels(self) -> bool:
        """Whether Triton kernels take part."""
        return self.batch_norm or self.losses == "fused" or bool(self.convolutions)

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)

    @staticmethod
    def from_json(values: Any) -> Choice:
        """The inverse of `to_json`. Raises ValueError for anything else, field by field."""
        if not isinstance(values, Mapping):
            raise ValueError(f"a choice is a table of fields, got {type(values).__name__}")
        texts = ("losses", "convolutions")
        kinds = {field.name: str if field.name in texts else bool for field in fields(Choice)}
        if values.keys() != kinds.keys():
            raise ValueError(f"a choice has the fields {', '.join(kinds)}; got {', '.join(map(str, values))}")
        for name, kind in kinds.items():
            if type(values[name]) is not kind:
                raise ValueError(f"{name} must be {kind.__name__}, got {values[name]!r:.40}")
        return Choice(**values)


EAGER = Choice()
