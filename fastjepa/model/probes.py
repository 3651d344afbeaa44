"""Probes: heads on the frozen states of a JEPA, by which it is judged, and what they are trained with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjepa.model.networks import DetHead, ImageDecoder


class JEPAProbe(nn.Module):
    """A head trained on the frozen states of a JEPA with the loss `hcost`; it never moves the JEPA's parameters."""

    def __init__(self, jepa: nn.Module, head: nn.Module, hcost: nn.Module) -> None:
        super().__init__()
        self.jepa: Any = jepa
        self.head = head
        self.hcost = hcost

    def forward(self, observations: Tensor, targets: Tensor) -> Tensor:
        """Video (B, C, T, H, W) and the head's targets → the probe's loss, a scalar."""
        return self.hcost(self.head(self.jepa.encode(observations)), targets)

    @torch.no_grad()
    def infer(self, observations: Tensor) -> Tensor:
        """Video (B, C, T, H, W) → the head's output."""
        return self.apply_head(self.jepa.encode(observations))

    @torch.no_grad()
    def apply_head(self, states: Tensor) -> Tensor:
        """States (B, D, T, H, W) → the head's output."""
        return self.head(states)


def is_probe(module: nn.Module) -> bool:
    """Whether a module is a probe, a head around a JEPA, and not a head itself."""
    return all(isinstance(getattr(module, part, None), nn.Module) for part in ("jepa", "head"))


def probe_parameters(probe: nn.Module) -> list[nn.Parameter]:
    """The parameters of a head, or those of a probe that are not its JEPA's."""
    source: Any = probe
    of_jepa = set(source.jepa.parameters()) if is_probe(probe) else set()
    return [parameter for parameter in probe.parameters() if parameter not in of_jepa]


def probe_head(name: str, probe: nn.Module, jepa: nn.Module, loss: type[nn.Module]) -> nn.Module:
    """The head of a probe (`jepa`, `head`, `hcost`), whose loss must be `loss()`; a head itself is returned as it is.

    Raises:
        ValueError: it is a probe of another JEPA, or has another loss.
    """
    source: Any = probe
    if not is_probe(probe):
        return probe
    if source.jepa is not jepa:
        raise ValueError(f"{name} is a probe of another JEPA than the one given; give it one around that, or its head")
    hcost = getattr(probe, "hcost", None)
    plain = type(hcost) is loss and hcost.reduction == "mean" and getattr(hcost, "weight", None) is None
    if not plain:
        raise ValueError(
            f"the loss of {name} is {hcost!r}, and a step computes {loss.__name__}(); give its head alone "
            f"({name}.head) if that is what you mean"
        )
    return source.head


def detection_loss(probabilities: Tensor, digit_location: Tensor) -> Tensor:
    """Binary cross-entropy of (B, T, 8, 8) probabilities against digit maps of the same shape, in fp32 at least.

    Autocast has no say in it: on a GPU, torch refuses this loss where autocast is on, whatever the dtype. A NaN among
    the probabilities gives a NaN loss. (Torch's own function raises then, and on a GPU ends the process.)
    """
    dtype = torch.promote_types(probabilities.dtype, torch.float32)
    probabilities = probabilities.to(dtype)
    with torch.autocast(probabilities.device.type, enabled=False):
        loss = F.binary_cross_entropy(probabilities.nan_to_num(nan=0.5), digit_location.to(dtype))
    return loss + 0 * probabilities.detach().sum()


def build_probes(*, dobs: int, dstc: int, hdet: int = 32) -> tuple[ImageDecoder, DetHead]:
    """The two probe heads: `ImageDecoder(dstc, dobs)` and `DetHead(dstc, hdet, 1)`."""
    return ImageDecoder(dstc, dobs), DetHead(dstc, hdet, 1)
