"""The card of a proof: what matters of all rows on one page, as text and as a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.ceilings import DETERMINISTIC
from bench.harness.case import BOTH
from bench.harness.rows import Row
from bench.prove.proof import Proof
from bench.recipe import GRAPH
from bench.step import COMPILED, ORIGINAL


@dataclass(frozen=True)
class Line:
    """One figure: what it is, its value, and what stands beside it."""

    what: str
    value: str
    note: str = ""


def card(rows: Sequence[Row], proof: Proof) -> list[Line]:
    """Step time and its ratio to the original and to torch.compile, rollout latency, memory, mAP, kernels, ceilings.

    What was not measured has no line. Nothing is stated as a ratio whose error breaks the policy: it says so instead.
    """
    makers: tuple[Callable[[Sequence[Row]], Iterable[Line]], ...] = (
        _step, _rollouts, _losses, _training, _checks, _ceilings
    )  # fmt: skip
    lines = [line for make in makers for line in make(rows)]
    missing = [f"{name} ({o.note})" for name, o in proof.outcomes.items() if o.status not in ("passed", "failed")]
    return [*lines, *([Line("not measured", str(len(missing)), "; ".join(missing))] if missing else [])]


def render(title: str, lines: Sequence[Line]) -> str:
    """The card as text."""
    first = max((len(line.what) for line in lines), default=0)
    second = max((len(line.value) for line in lines), default=0)
    body = [f"{line.what:<{first}}  {line.value:>{second}}  {line.note}".rstrip() for line in lines]
    return "\n".join([title, *body]) + "\n"


def draw(title: str, lines: Sequence[Line], path: Path) -> None:
    """The card as a picture. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    from bench.report.figures import save

    figure = Figure(figsize=(11, 0.9 + 0.34 * len(lines)))
    figure.text(0.03, 1 - 0.4 / figure.get_figheight(), title, fontsize=14, weight="bold")
    for number, line in enumerate(lines):
        y = 1 - (0.85 + 0.34 * number) / figure.get_figheight()
        figure.text(0.03, y, line.what, fontsize=10)
        figure.text(0.42, y, line.value, fontsize=11, weight="bold", ha="right")
        note = line.note if len(line.note) < 110 else f"{line.note[:107]}..."
        figure.text(0.44, y, note, fontsize=8, color="0.4")
    save(figure, path)


def _timed(rows: Sequence[Row], suite: str, variant: str | None = None) -> list[Row]:
    return [
        row for row in rows
        if row.suite == suite and row.median_ms is not None and variant in (None, row.variant)
    ]  # fmt: skip


def _verdict(row: Row) -> str:
    if row.speedup is not None:
        return f"{row.speedup:.2f}x {row.baseline}"
    return row.reason if row.status != "exact" else f"{row.baseline} did not run beside it"


def _step(rows: Sequence[Row]) -> Iterable[Line]:
    found = _timed(rows, "step")
    if not found:
        return
    for row in found:
        if row.variant == ORIGINAL:
            yield Line("training step, original", f"{row.median_ms:.1f} ms", row.case)
    exact = [row for row in found if row.status == "exact" and row.speedup is not None]
    best = max(exact, key=lambda row: row.speedup or 0.0, default=None)
    graph = next((row for row in found if row.variant == GRAPH), None)
    if graph is not None:
        yield Line(f"training step, {GRAPH}", f"{graph.median_ms:.1f} ms", _verdict(graph))
    if best is not None and best is not graph:
        yield Line(f"training step, fastest exact: {best.variant}", f"{best.median_ms:.1f} ms", _verdict(best))
    peer = next((row for row in found if row.variant == COMPILED), None)
    if peer is not None:
        yield Line("training step, torch.compile", f"{peer.median_ms:.1f} ms", _verdict(peer))
        ours = graph or best
        if ours is not None and ours.speedup is not None and peer.speedup is not None:
            # Each took turns with the original, so the ratio of their ratios is what both say.
            ratio = ours.speedup / peer.speedup
            yield Line(f"{ours.variant} against torch.compile", f"{ratio:.2f}x", f"its peer had {peer.given}")
    # A graph's own memory is set aside before its step, and not in its row.
    plain = [row for row in exact if row.peak_extra_bytes is not None and GRAPH not in row.variant]
    if plain:
        ours = max(plain, key=lambda row: row.speedup or 0.0)
        yield Line("peak memory of a step", f"{(ours.peak_extra_bytes or 0) / 1e9:.1f} GB", ours.variant)


def _rollouts(rows: Sequence[Row]) -> Iterable[Line]:
    found = _timed(rows, "rollout")
    for case in dict.fromkeys(row.case for row in found):
        exact = [row for row in found if row.case == case and row.status == "exact"]
        if exact:
            best = min(exact, key=lambda row: row.median_ms or 0.0)
            yield Line(f"rollout {case}", f"{best.median_ms:.2f} ms", f"{best.variant}; {_verdict(best)}")


def _losses(rows: Sequence[Row]) -> Iterable[Line]:
    found = [row for row in _timed(rows, "projected_losses") if row.phase == BOTH and row.status == "exact"]
    if found:
        best = min(found, key=lambda row: row.median_ms or 0.0)
        yield Line("projected losses, both ways", f"{best.median_ms:.2f} ms", f"{best.variant}; {_verdict(best)}")


def _training(rows: Sequence[Row]) -> Iterable[Line]:
    found = _timed(rows, "train")
    if found:
        last = found[-1]
        seconds, epoch = last.quality.get("seconds", 0.0), last.quality.get("epoch", 0.0)
        note = f"after {seconds:.0f} s, epoch {epoch:.1f}; {last.variant}; {last.median_ms:.1f} ms a step"
        yield Line("mAP", f"{last.quality['mAP']:.3f}", note)


def _checks(rows: Sequence[Row]) -> Iterable[Line]:
    verdicts = {(r.case, r.variant): r.status for r in rows if r.suite == "checks" and r.status != "unavailable"}
    # A variant with several phases is as good as its worst.
    for row in rows:
        if row.suite == "checks" and row.status not in ("exact", "unavailable"):
            verdicts[row.case, row.variant] = row.status
    if verdicts:
        bad = [f"{case}, {variant}: {status}" for (case, variant), status in verdicts.items() if status != "exact"]
        note = "; ".join(bad) or "every kernel that ran is exact, and graphs equal plain calls"
        yield Line("checks passed", f"{len(verdicts) - len(bad)} of {len(verdicts)}", note)


def _ceilings(rows: Sequence[Row]) -> Iterable[Line]:
    found = _timed(rows, "ceilings")
    for row in found:
        if row.phase == "copy":
            yield Line("copy", f"{(row.gigabytes_per_second or 0) / 1e3:.2f} TB/s", row.case)
        elif row.phase == "product" and row.variant == "bf16":
            yield Line("bf16 product", f"{row.teraflops_per_second:.0f} TFLOP/s", row.case)
    rates = [row.teraflops_per_second for row in found if row.variant == DETERMINISTIC and row.teraflops_per_second]
    if rates:
        note = f"{DETERMINISTIC}, {len(rates)} shapes and directions"
        yield Line("cuDNN's 3x3 convolutions", f"{min(rates):.1f}-{max(rates):.1f} TFLOP/s", note)
