"""The speed of light of a device: how fast bytes can move and products can be summed, at best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of device memory, and FLOP per second by arithmetic (a key of `flops_per_second`)."""

    name: str
    dram_bytes_per_second: float
    flops_per_second: Mapping[str, float]

    def seconds(self, bytes_moved: int, flops: int, arithmetic: str) -> float:
        """The shortest time in which `bytes_moved` and `flops` can be done, moved and computed at the same time."""
        return max(bytes_moved / self.dram_bytes_per_second, flops / self._rate(arithmetic))

    def bound(self, bytes_moved: int, flops: int, arithmetic: str) -> str:
        """Which of the two sets that time: "memory" or "arithmetic"."""
        memory = bytes_moved / self.dram_bytes_per_second
        return "memory" if memory >= flops / self._rate(arithmetic) else "arithmetic"

    def _rate(self, arithmetic: str) -> float:
        if arithmetic not in self.flops_per_second:
            accepted = ", ".join(sorted(self.flops_per_second))
            raise ValueError(f"arithmetic is {arithmetic!r}; accepted: {accepted}")
        return self.flops_per_second[arithmetic]


# Measured on an H200: a device-to-device copy of 8.6 GB, bytes read plus written, and an 8192³ bf16 matrix product on
# random data. The rest follows: tf32 runs at half the bf16 rate; tf32x3 and bf16x3 are three products each, bf16x6 six;
# "fma" is what the fp32 units do without tensor cores (132 SMs × 128 lanes × 2 × 1.98 GHz, from the data sheet).
# "fp32" is fp32-accurate work by the fastest of these means, so that no honest fp32 kernel exceeds its own roofline.
_H200_BF16 = 788e12
H200 = Ceilings(
    name="NVIDIA H200",
    dram_bytes_per_second=4.3e12,
    flops_per_second={
        "bf16": _H200_BF16,
        "fp16": _H200_BF16,
        "tf32": _H200_BF16 / 2,
        "tf32x3": _H200_BF16 / 6,
        "bf16x3": _H200_BF16 / 3,
        "bf16x6": _H200_BF16 / 6,
        "fma": 67e12,
        "fp32": _H200_BF16 / 6,
    },
)


def ceilings_of(device_name: str) -> Ceilings | None:
    """The ceilings of the device of that name (as torch reports it), or None where nobody has measured them."""
    return H200 if "H200" in device_name else None
