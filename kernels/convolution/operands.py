"""The tensors of one launch, in the order in which every kernel here takes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastjepa.kernels.convolution.layer import Layer, Precision


class Operands(NamedTuple):
    """What a kernel is given: feature maps (N, C, H, W), channels-last in memory, and packed weights."""

    x: Tensor
    x2: Tensor | None
    shortcut: Tensor | None
    shortcut2: Tensor | None
    residual: Tensor | None
    out: Tensor
    weight: Tensor
    bias: Tensor | None
    head_weight: Tensor | None
    head_bias: Tensor | None
    layer: Layer
    relu: bool

    def pointers(self) -> dict[str, Tensor | None]:
        """Arguments by name."""
        tensors = self._asdict()
        return {f"{name}_ptr": tensors[name] for name in self._fields[:-2]}

    def sizes(self) -> dict[str, int]:
        """The frames, and the sizes of the maps that they are before, beside and after."""
        layer = self.layer
        shortcut_height, shortcut_width = (1, 1) if self.shortcut is None else self.shortcut.shape[-2:]
        return {
            "n_frames": layer.frames, "height": layer.height, "width": layer.width,
            "shortcut_height": shortcut_height, "shortcut_width": shortcut_width,
            "out_height": layer.out_height, "out_width": layer.out_width,
        }  # fmt: skip


def channels(layer: Layer) -> dict[str, int]:
    """Channels as compile-time constants; 0 for what is not there."""
    C1, C2 = (*layer.sources, 0)[:2]
    S1, S2 = (*layer.shortcut, 0, 0)[:2]
    return {"C1": C1, "C2": C2, "S1": S1, "S2": S2, "C_OUT": layer.out, "HEAD": layer.head}


def dot_input_precision(precision: Precision) -> str:
    """PRECISION of the dots: products of 16-bit numbers are exact in fp32, and fp32 is multiplied in three parts."""
    choices: dict[Precision, str] = {"fp32": "tf32x3", "tf32": "tf32"}
    return choices.get(precision, "ieee")
