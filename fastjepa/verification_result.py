"""What `fastjepa.verify` found: errors of ours beside eager's, and the policy's bounds, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass

from fastjepa.measuring import policy
from fastjepa.measuring.policy import Judgement


@dataclass(frozen=True)
class Row:
    """One result in one arithmetic: the errors of ours and of eager, ‖x − truth‖ / ‖truth‖, and what is allowed."""

    result: str
    """What it is: losses, gradients, buffers or call counts (of BatchNorm), the latter three by part of the model."""
    precision: str
    """fp32, tf32, bf16 or fp16."""
    ours: float
    eager: float
    bound: float | None
    """None where eager is itself so far off that nothing can be judged by it."""

    @property
    def exact(self) -> bool:
        """Whether the policy lets it pass."""
        return self._judgement.exact

    @property
    def _judgement(self) -> Judgement:
        return Judgement(self.result, self.ours, self.bound)


@dataclass(frozen=True)
class Verification:
    """What `verify` found, as data and, printed, as a table."""

    rows: tuple[Row, ...]
    what: str
    """The video, the unroll and the device."""
    swapped: tuple[str, ...]
    """The parts that are not the plain ones, as "encoder: ResNet5 → FusedResNet5"."""

    @property
    def passed(self) -> bool:
        """Whether the policy lets every row pass."""
        return all(row.exact for row in self.rows)

    @property
    def worst(self) -> Row:
        """The row closest to, or furthest beyond, its bound."""
        found = policy.worst(row._judgement for row in self.rows)
        return next(row for row in self.rows if row._judgement == found)

    def __str__(self) -> str:
        wrong, unsure = sum(not row.exact for row in self.rows), sum(row.bound is None for row in self.rows)
        verdict = "passed" if not wrong else f"NOT PASSED: {wrong} of {len(self.rows)} results"
        if wrong:
            verdict += (
                " too far off" if wrong > unsure else " cannot be judged by eager; give more clips, or larger ones"
            )
        parts = self.swapped or ("nothing is swapped: this holds eager against itself",)
        width = max(len(row.result) for row in self.rows)
        lines = [
            f"fastjepa.verify: {verdict}",
            f"  {self.what}",
            *(f"  {part}" for part in parts),
            "  errors, of the norm of what the plain model computes in float64:",
            f"  {'':<4}  {'':<{width}}  {'ours':>8}  {'eager':>8}  {'allowed':>8}",
        ]
        for row in self.rows:
            allowed = "" if row.bound is None else f"{row.bound:.1e}"
            note = "" if row.exact else "  cannot be judged" if row.bound is None else "  TOO FAR OFF"
            errors = f"{row.ours:>8.1e}  {row.eager:>8.1e}  {allowed:>8}"
            lines.append(f"  {row.precision:<4}  {row.result:<{width}}  {errors}{note}".rstrip())
        return "\n".join(lines)
