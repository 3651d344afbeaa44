"""What was counted, added up: for every part of a piece of work, and as rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.harness.roofline import H200
from bench.harness.rows import Row, format_table
from bench.traffic.counting import Event
from bench.traffic.parts import OPTIMIZER, PARTS
from fastjepa.environment import Environment

ALL, REST = "all", "all but convolutions and optimizer"


@dataclass(frozen=True)
class Totals:
    """Operators with each one's tensors once, and kernels with each launch's; in bytes."""

    operators: int = 0
    operator_bytes: int = 0
    kernels: int = 0
    kernel_bytes: int = 0

    @property
    def milliseconds(self) -> float:
        """The least time for the kernels' bytes at the memory bandwidth of an H200."""
        return 1e3 * self.kernel_bytes / H200.dram_bytes_per_second


def total(events: Iterable[Event]) -> Totals:
    """The sum."""
    events = list(events)
    operators, kernels = [e for e in events if e.is_operator], [e for e in events if e.is_kernel]
    return Totals(len(operators), sum(e.moved for e in operators), len(kernels), sum(e.moved for e in kernels))


def by_part(events: Sequence[Event]) -> dict[str, Totals]:
    """Each part that there is, then everything, and what is neither convolution nor optimizer."""
    parts = {part: total(e for e in events if e.part == part) for part in PARTS}
    parts = {part: totals for part, totals in parts.items() if totals.kernels}
    parts[REST] = total(e for e in events if e.part != OPTIMIZER and "convolution" not in e.name)
    return parts | {ALL: total(events)}


def to_rows(case: str, variant: str, parts: dict[str, Totals], environment: Environment) -> list[Row]:
    """One row for each part; `phase` is the part."""
    stamp = {**asdict(environment), "device": "any, counted on shapes", "driver": "", "threads": None}
    return [
        Row(
            suite="traffic", case=case, variant=variant, phase=part, status="counted", reason="counted, not timed",
            bytes_moved=t.kernel_bytes,
            quality={
                "operators": float(t.operators), "operator_bytes": float(t.operator_bytes),
                "kernels": float(t.kernels), "ms_at_ceiling": t.milliseconds,
            },
            **stamp,
        )
        for part, t in parts.items()
    ]  # fmt: skip


def render(parts: dict[str, Totals]) -> str:
    """The table of one variant."""
    header = ["part", "operators", "GB", "kernels", "GB of all passes", f"ms at {_RATE} TB/s"]
    body = [
        [
            part, str(t.operators), f"{t.operator_bytes / 1e9:.4g}", str(t.kernels), f"{t.kernel_bytes / 1e9:.4g}",
            f"{t.milliseconds:.4g}",
        ]
        for part, t in parts.items()
    ]  # fmt: skip
    return format_table(header, body)


_RATE = f"{H200.dram_bytes_per_second / 1e12:.1f}"


def totals_of(row: Row) -> Totals:
    """The inverse of `to_rows`."""
    quality: dict[str, Any] = row.quality
    return Totals(
        int(quality["operators"]), int(quality["operator_bytes"]), int(quality["kernels"]), row.bytes_moved or 0
    )
