"""BatchNorm folded into convolutions, as peers of the inference networks get it."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def folded_batch_norm(network: nn.Module) -> nn.Module:
    """A copy in eval mode with every BatchNorm folded into the convolution before it: w ← w·γ/σ, b = β - μ·γ/σ.

    Knows the pairs `conv1`/`bn1`, `conv2`/`bn2` and (convolution, BatchNorm) in a Sequential. Exact up to the rounding
    of the scaled weights. The copy shares nothing with `network`: make it again when the weights have changed.
    """
    folded = copy.deepcopy(network).eval()
    for module in folded.modules():
        if isinstance(module, nn.Sequential):
            pairs = [(str(i), str(i + 1)) for i in range(len(module) - 1)]
        else:
            pairs = [("conv1", "bn1"), ("conv2", "bn2")]
        for conv_name, norm_name in pairs:
            conv, norm = getattr(module, conv_name, None), getattr(module, norm_name, None)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return folded
