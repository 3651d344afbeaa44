"""The definition of the two passes in plain torch. Any dtype and device.

In float64 it is the truth of the tests, at any other precision the eager result that the kernels are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def moments(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (T, D) and scatter Σ(x−μ)(x−μ)ᵀ (T, D, D) of T tensors of rows (N, D), in their dtype, at least fp32."""
    means, scatters = [], []
    for x in tensors:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = x.mean(0)
        centred = x - mean
        means.append(mean)
        scatters.append(centred.T @ centred)
    return torch.stack(means), torch.stack(scatters)


def subtract_centred_linear(
    x: Tensor, mean: Tensor, constant: Tensor | None, linear: Tensor, base: Tensor | None
) -> Tensor:
    """base − constant − linear·(x − mean) for every row of x (N, D), in its dtype.

    mean (D,), constant (D,; None: zeros), linear (D, D), base (N, D; None: zeros).
    """
    mean, linear = mean.to(x.dtype), linear.to(x.dtype)
    out = (mean - x) @ linear.T
    if constant is not None:
        out = out - constant.to(x.dtype)
    return out if base is None else base + out
