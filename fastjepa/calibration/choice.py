"""What can be chosen: which ops are fused, and how the work is run. All choices compute the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

Losses = Literal["eager", "closed_form", "fused"]


@dataclass(frozen=True)
class Choice:
    """One way to run a model. The default is eager: plain PyTorch, step by step, contiguous.

    batch_norm: everything between the convolutions as fused kernels (`fastjepa.fused.networks`).
    losses: which path computes the projected losses.
    cuda_graph: the whole training step, or the whole rollout with BatchNorm folded, in one launch.
    recompute: fused networks compute activations again in the backward pass instead of keeping them.
    channels_last: weights, and with them activations, lie channels-last in memory.

    Raises:
        ValueError: an unknown path for the losses, or `recompute` without `batch_norm`, which alone can do it.
    """

    batch_norm: bool = False
    losses: Losses = "eager"
    cuda_graph: bool = False
    recompute: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.losses not in get_args(Losses):
            raise ValueError(f"losses must be one of {', '.join(get_args(Losses))}; got {self.losses!r}")
        if self.recompute and not self.batch_norm:
            raise ValueError("recompute belongs to the fused networks: it needs batch_norm")

    def __str__(self) -> str:
        names = {
            "batch_norm": "fused blocks", "recompute": "recomputation", "channels_last": "channels-last",
            "cuda_graph": "CUDA graph",
        }  # fmt: skip
        losses = {"eager": [], "closed_form": ["closed-form losses"], "fused": ["fused losses"]}[self.losses]
        parts = [text for name, text in names.items() if getattr(self, name)]
        return " + ".join([*losses, *parts]) or "eager"

    @property
    def needs_kernels(self) -> bool:
        """Whether Triton kernels take part."""
        return self.batch_norm or self.losses == "fused"

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return asdict(self)

    @staticmethod
    def from_json(values: Any) -> Choice:
        """The inverse of `to_json`. Raises ValueError for anything else, field by field."""
        if not isinstance(values, Mapping):
            raise ValueError(f"a choice is a table of fields, got {type(values).__name__}")
        kinds = {field.name: str if field.name == "losses" else bool for field in fields(Choice)}
        if values.keys() != kinds.keys():
            raise ValueError(f"a choice has the fields {', '.join(kinds)}; got {', '.join(map(str, values))}")
        for name, kind in kinds.items():
            if type(values[name]) is not kind:
                raise ValueError(f"{name} must be {kind.__name__}, got {values[name]!r}")
        return Choice(**values)


EAGER = Choice()
