"""The small vectors, one value for each channel, that every BatchNorm kernel reads."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ChannelVectors(NamedTuple):
    """Statistics and parameters, each (n_channels,), in the order in which ops and kernels take them.

    Those of x, then those of a residual that has a BatchNorm of its own. The variances are the biased ones. Without
    `residual_mean` and `residual_var` the residual is added as it is. Weight and bias come in pairs, or not at all.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual_mean: Tensor | None = None
    residual_var: Tensor | None = None
    residual_weight: Tensor | None = None
    residual_bias: Tensor | None = None

    def pointers(self) -> dict[str, Tensor | None]:
        """The vectors by the names that they have in the kernels: "mean_ptr", ..."""
        return {f"{name}_ptr": vector for name, vector in self._asdict().items()}


RESIDUAL_POINTERS = tuple(f"{name}_ptr" for name in ChannelVectors._fields if name.startswith("residual_"))


def vector_bytes(form: str, n_channels: int) -> int:
    """Bytes of the vectors that a launch of this form (`tiling.form`) reads, all in fp32, for the static audit."""
    return 4 * n_channels * (8 if form == "normalized_residual" else 4)
