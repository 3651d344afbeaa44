"""`python -m bench report`: a Markdown page and figures from committed rows, and from nothing else.

Reads every .jsonl below a folder (default: bench/results) and writes report.md and its pictures there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.harness.rows import Row, read_rows_below, write_text
from fastjepa.environment import ROOT
from fastjepa.optional_packages import missing_packages

_INTRODUCTION = """# Measurements

Made by `python -m bench report` from the rows in this folder. A speed-up is stated where the error keeps its bound;
errors are against float64, by the largest entry or by norms. Memory is what a call needs above its inputs; a CUDA
graph's own memory is set aside before and not in it. `bench/README.md` says how to read the rest."""


def render(rows: Sequence[Row], folder: Path) -> str:
    """The page, for rows of any suites and devices; draws its pictures into `folder`, if matplotlib is installed."""
    parts = [_INTRODUCTION]
    for device in dict.fromkeys(row.device for row in rows):
        here = [row for row in rows if row.device == device]
        parts.append(f"## {device}\n\n{_sources(here)}")
        parts += _pictures(here, folder / _slug(device))
        parts += _tables(here)
    return "\n\n".join(parts) + "\n"


def _pictures(rows: Sequence[Row], prefix: Path) -> Iterable[str]:
    """Draws the rows of one device into files whose names begin with `prefix`; links to them."""
    if _missing():
        return
    from bench.report import figures

    for name, picture in figures.draw_all(rows):
        path = prefix.with_name(f"{prefix.name}-{_slug(name)}.png")
        figures.save(picture, path)
        yield f"![{name}]({path.name})"


def _missing() -> list[str]:
    """The packages that pictures need and that are not installed."""
    return missing_packages("matplotlib", "PIL")


def _sources(rows: Sequence[Row]) -> str:
    """Where the rows come from: commits, versions, dates."""
    dirty = " with changes" if any(row.dirty for row in rows) else ""
    commits = ", ".join(f"`{commit[:10]}`" for commit in dict.fromkeys(row.commit for row in rows))
    versions = ", ".join(f"{name} {version}" for name, version in rows[-1].versions.items())
    dates = sorted({row.date[:10] for row in rows})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    used = sorted({row.threads for row in rows if row.threads is not None})
    threads = f", {' or '.join(map(str, used))} CPU threads" if used and rows[-1].sm_clock_mhz is None else ""
    driver = f", driver {rows[-1].driver}" if rows[-1].driver else ""
    return f"{span}; commit {commits}{dirty}; {versions}{driver}{threads}."


def _tables(rows: Sequence[Row]) -> Iterable[str]:
    for suite in dict.fromkeys(row.suite for row in rows):
        yield f"### {suite}"
        in_suite = [row for row in rows if row.suite == suite]
        if suite == "train":
            yield _training_table(in_suite)
            continue
        if suite == "traffic":
            yield _traffic_table(in_suite)
            continue
        if suite == "scaling":
            yield _scaling_table(in_suite)
            continue
        if estimates := [row for row in in_suite if "estimate_us" in row.quality]:
            yield _estimate_table(estimates)
            in_suite = [row for row in in_suite if row not in estimates]
        for case in dict.fromkeys(row.case for row in in_suite):
            yield f"**{case}**\n\n{_table([row for row in in_suite if row.case == case])}"


def _table(rows: Sequence[Row]) -> str:
    header = ["variant", "phase", "ms", "spread", "% of roofline", "peak MB", "error", "bound", "speed-up", "rates"]
    body = []
    for row in rows:
        if row.status == "unavailable":
            continue  # the page says what was measured; the rows say what was not, and why
        if row.median_ms is None:
            body.append([row.variant, row.phase, row.status, row.reason])
            continue
        speedup = f"{row.speedup:.2f}×" if row.speedup is not None else row.status
        rates = ", ".join(f"{value:.4g} {name.replace('_', ' ')}" for name, value in row.quality.items())
        body.append(
            [
                row.variant, row.phase, f"{row.median_ms:.4g}", f"{row.low_ms:.4g} – {row.high_ms:.4g}",
                "" if row.percent_of_roofline is None else f"{row.percent_of_roofline:.0f}",
                "" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / 1e6:.0f}",
                "" if row.error is None else f"{row.error:.1e}",
                "" if row.error_bound is None else f"{row.error_bound:.1e}", speedup, rates,
            ]
        )  # fmt: skip
    return _markdown(header, body)


def _training_table(rows: Sequence[Row]) -> str:
    header = ["case", "variant", "seconds", "epoch", "ms per step", "mAP", "AP_0", "chance"]
    body = [
        [
            row.case, row.variant, f"{row.quality['seconds']:.0f}", f"{row.quality['epoch']:.2f}",
            f"{row.median_ms:.1f}", *(f"{row.quality[name]:.3f}" for name in ("mAP", "AP_0", "chance")),
        ]
        for row in rows
    ]  # fmt: skip
    return _markdown(header, body)


def _traffic_table(rows: Sequence[Row]) -> str:
    header = ["work", "variant", "part", "operators", "GB", "kernels", "GB of all passes", "ms at the H200's ceiling"]
    body = [
        [
            row.case, row.variant, row.phase, f"{row.quality['operators']:.0f}",
            f"{row.quality['operator_bytes'] / 1e9:.4g}", f"{row.quality['kernels']:.0f}",
            f"{(row.bytes_moved or 0) / 1e9:.4g}", f"{row.quality['ms_at_ceiling']:.4g}",
        ]
        for row in rows
    ]  # fmt: skip
    return _markdown(header, body)


def _scaling_table(rows: Sequence[Row]) -> str:
    """Of steps on several GPUs, none of which was timed."""
    header = ["estimate, not measured", "way", "GPUs", "clips of a GPU", "step ms", "statistics ms", "gradients ms",
              "efficiency", "collectives", "MB sent by a GPU"]  # fmt: skip
    body = [
        [
            row.case, row.variant, *(f"{row.quality[name]:g}" for name in ("gpus", "clips")),
            *(f"{row.quality[name]:.2f}" for name in ("step_ms", "statistics_ms", "gradients_ms")),
            f"{100 * row.quality['efficiency']:.1f} %", f"{row.quality['collectives']:.0f}",
            f"{(row.bytes_moved or 0) / 1e6:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    return _markdown(header, body)


def _estimate_table(rows: Sequence[Row]) -> str:
    """Of launches, none of which was timed; their sum in the row "all"."""
    header = ["estimate, not measured", "variant", "launch", "programs", "roofline µs", "issue µs", "estimated µs"]
    body = [
        [
            row.case, row.variant, row.phase, f"{row.quality['programs']:.0f}" if "programs" in row.quality else "",
            *(f"{row.quality[name]:.2f}" for name in ("roofline_us", "issue_us", "estimate_us")),
        ]
        for row in rows
    ]  # fmt: skip
    return _markdown(header, body)


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header)]
    lines += [[cell.replace("|", "\\|") for cell in row] + [""] * (len(header) - len(row)) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def main(argv: Sequence[str]) -> int:
    """The command line; returns 2 if there is nothing to report or a row is not valid."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "bench" / "results", help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        rows = read_rows_below(args.folder)
    except ValueError as error:
        parser.error(str(error))
    if not rows:
        parser.error(f"there is no .jsonl file with rows below {args.folder}; a suite's --out DIR writes them")
    write_text(args.folder / "report.md", render(rows, args.folder))
    print(f"wrote {args.folder / 'report.md'}, from {len(rows)} rows")
    if missing := _missing():
        print(f"pictures are left out, because of what is not installed: {', '.join(missing)}", file=sys.stderr)
    return 0
