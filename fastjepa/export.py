"""Hand a run back to the original: `python -m fastjepa.export --checkpoint RUN --eb_jepa latest.pth.tar`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from fastjepa.entry import run_command

    sys.exit(run_command("fastjepa.export", None, "python -m fastjepa.export"))

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastjepa.config import Config
from fastjepa.eb_jepa import write_eb_jepa_checkpoint
from fastjepa.files.safe_files import CheckpointError
from fastjepa.refusal import refusals
from fastjepa.storage.run_folder import load_run_checkpoint
from fastjepa.training.command_line import parse_options


@dataclass(frozen=True)
class Options:
    """The checkpoint of a run as one that eb_jepa's load_checkpoint reads: model, Adam's state, epoch, step, heads."""

    checkpoint: Path
    """The folder of a run, or its checkpoint file."""
    eb_jepa: Path
    """The file to write, latest.pth.tar for its training script; must not exist yet."""


def export_run(options: Options) -> list[str]:
    """Write the file; what there is to know about it, line by line.

    Raises:
        CheckpointError: the run cannot be read, or the file not be written.
        ValueError: the file exists already.
    """
    state, path = load_run_checkpoint(options.checkpoint)
    if options.eb_jepa.exists():
        raise ValueError(f"--eb_jepa {options.eb_jepa} exists already: choose another name, or move it away")
    try:
        config, progress = Config.from_json(state["config"]), state["progress"]
        epoch, batch, step = (progress[name] for name in ("epoch", "batch", "global_step"))
        modules = {name: state["modules"][name] for name in ("jepa", "image_decoder", "detection_head")}
        optimizer = state["optimizer"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} is not the checkpoint of a run: {error!r}") from error
    try:
        write_eb_jepa_checkpoint(options.eb_jepa, modules, optimizer, epoch=epoch, step=step)
    except CheckpointError as error:
        raise CheckpointError(f"{path} could not be exported: {error}") from error
    lines = [f"wrote {options.eb_jepa}, after step {step}: eb_jepa goes on with its epoch {epoch} (it counts from 0)"]
    if batch:
        lines.append(f"of that epoch, steps done already: {batch}; eb_jepa does not know, and does all of it")
    widths = (config.projector or f"{config.dstc}-64-64", config.hdet)
    usual = (f"{config.dstc}-{4 * config.dstc}-{4 * config.dstc}", config.hpre)
    if widths != usual:
        lines.append(
            f"eb_jepa's script would build Projector('{usual[0]}') and a detection head of width {usual[1]}: change it "
            f"to '{widths[0]}' and {widths[1]}, as the run has them"
        )
    return lines


def main(argv: Sequence[str] | None = None, prog: str = "python -m fastjepa.export") -> None:
    """The command line, typed as `prog`."""
    options = parse_options(Options, argv, prog=prog)
    with refusals():
        lines = export_run(options)
    print("\n".join(lines))
