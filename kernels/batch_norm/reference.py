"""BatchNorm (+ residual) (+ ReLU) in plain torch, for any dtype and device, without Triton.

In float64 it is the truth of the tests, at any other precision the eager result that the fused op is compared with.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def batch_norm_act(
    x: Tensor,
    bn: nn.BatchNorm1d | nn.BatchNorm2d,
    residual: Tensor | None = None,
    residual_bn: nn.BatchNorm1d | nn.BatchNorm2d | None = None,
    relu: bool = True,
) -> Tensor:
    """relu?( bn(x) [+ residual] [+ residual_bn(residual)] ), as the modules themselves compute it.

    Arguments, result and effects on the modules' buffers are those of `fused.batch_norm_act`, for any dtype that
    the modules take.
    """
    out: Tensor = bn(x)
    if residual is not None:
        out = out + (residual if residual_bn is None else residual_bn(residual))
    return F.relu(out) if relu else out
