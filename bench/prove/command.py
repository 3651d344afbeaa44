"""`python -m bench prove`: everything that can be shown on this machine, in one command, one folder and a given time.

Each variant of each suite is on disk the moment it is measured, the most valuable first. Whatever crashes, hangs or
runs out of memory costs itself; whatever the time does not reach is measured when the same command is given again. On
a CPU the parts that need a GPU are skipped, with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.harness import suite
from bench.harness.kept import source_digest
from bench.harness.row_file import RowFile
from bench.harness.rows import read_rows_below, write_text
from bench.prove import archive, card
from bench.prove.parts import Part, parts
from bench.prove.proof import PASSED, SKIPPED, Proof, settings_of
from bench.prove.supervise import prove
from fastjepa.environment import ROOT, Environment, collect
from fastjepa.optional_packages import missing_packages


def main(argv: Sequence[str]) -> int:
    """The command line; returns 0 if every part that can run here has passed."""
    parser = argparse.ArgumentParser(prog="python -m bench prove", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results/<device>-<date>")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small and short")
    parser.add_argument("--seconds", type=float, default=530.0, help="in all (default: %(default)s)")
    parser.add_argument("--redo", action="store_true", help="measure again what failed, was inexact or could not run")
    args = parser.parse_args(argv)
    if args.seconds <= 0:
        parser.error(f"--seconds must be more than 0, got {args.seconds}")
    device = suite.device_of(args, parser)
    environment = collect(["python", "-m", "bench", "prove", *argv], device)
    slug = "-".join("".join(c if c.isalnum() else " " for c in environment.device.lower()).split())
    settings = {"device": environment.device, "quick": args.quick, "code": source_digest()[:16]}
    out = args.out.resolve() if args.out else default_folder(ROOT / "bench" / "results", slug, settings)
    try:
        every = parts(out, device, args.quick)
        proof = Proof(out, settings)
        if args.redo:
            forget_failures(proof, every)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    write_text(out / "environment.json", json.dumps(asdict(environment), indent=1) + "\n")
    write_text(out / "kept" / ".gitignore", "*\n")  # truths: large, and made again in no time
    prove(proof, every, args.seconds, say=lambda text: print(text, flush=True))
    print(f"\n{proof.render()}\n\n{sum_up(proof, environment)}\nrows, logs, card and archive: {out}")
    complete = all(proof.outcomes[part.name].status in (PASSED, SKIPPED) for part in every)
    return 0 if complete else 1


def default_folder(results: Path, slug: str, settings: dict[str, Any]) -> Path:
    """The newest folder of this device that was begun with these settings, also by the same code; else a new one."""
    begun = [folder for folder in results.glob(f"{slug}-*") if settings_of(folder) == settings]
    if begun:
        return max(begun, key=lambda folder: (folder / "environment.json").stat().st_mtime)
    today = f"{slug}-{datetime.date.today()}"
    names = (today if number == 1 else f"{today}-{number}" for number in itertools.count(1))
    return next(folder for name in names if not (folder := results / name).exists())


def forget_failures(proof: Proof, every: Sequence[Part]) -> None:
    """Drop the rows of what failed, was inexact or could not run, and that its part has passed, so that it is measured
    again. Ceilings are never exact, and stay.
    """
    for part in every:
        if part.suite is not None:
            file = RowFile(proof.folder, part.suite)
            file.forget(keep=lambda row: row.suite == "ceilings" and row.median_ms is not None)
            proof.forget(part.name)


def sum_up(proof: Proof, environment: Environment) -> str:
    """Write card.txt, card.png and <folder>.tar.gz; returns the card's text, with what could not be made."""
    rows = read_rows_below(proof.folder)
    title = f"fastjepa on {environment.device}, {environment.date[:10]}, commit {environment.commit[:10]}"
    lines = card.card(rows, proof)
    text = card.render(title, lines)
    write_text(proof.folder / "card.txt", text)
    missing = missing_packages("matplotlib")
    if not missing:
        card.draw(title, lines, proof.folder / "card.png")
    else:
        text += f"no picture of this card: {', '.join(missing)} is not installed\n"
    left_out = archive.pack(proof.folder, proof.folder / f"{proof.folder.name}.tar.gz")
    return text + (f"too large for the archive: {', '.join(left_out)}\n" if left_out else "")
