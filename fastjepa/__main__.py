"""The command `fastjepa`, also as `python -m fastjepa`: subcommands, each imported only when it is called."""

from __future__ import annotations

import difflib
import importlib.metadata
import platform
import sys
from collections.abc import Sequence

import fastjepa
from fastjepa.entry import exit_status, run_command

# name: (module with `main(argv, prog)`, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("fastjepa.training.command_line", "train and evaluate; the full recipe on a GPU, a demo on a CPU"),
    "evaluate": ("fastjepa.evaluate", "average precision by horizon of a run, on its validation clips"),
    "rollout": ("fastjepa.rollout", "predict a run's clips to any horizon, as a GIF"),
    "compare-steps": ("fastjepa.compare_steps", "train with several numbers of prediction steps, and plot them"),
    "sweep": ("fastjepa.sweep", "train a grid of options with several seeds; a table and a heat-map"),
    "figures": ("fastjepa.figures.__main__", "draw the pictures of runs again"),
    "export": ("fastjepa.export", "hand a run back to eb_jepa, with its Adam state"),
}


def main(argv: Sequence[str] | None = None, prog: str = "fastjepa") -> int:
    """Run the command named first in `argv` (default: sys.argv) with the rest; returns its exit status.

    `prog` is what the user typed to come here; usage and hints begin with it.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    return exit_status(lambda: _run(words, prog))


def _run(argv: list[str], prog: str) -> int:
    if argv and argv[0] in ("-h", "--help"):
        listing = "\n".join(f"  {name:<14} {what}" for name, (_, what) in COMMANDS.items())
        print(f"usage: {prog} COMMAND [--help] ...\n       {prog} --version\n\ncommands:\n{listing}")
        return 0
    if argv and argv[0] == "--version":
        print(version())
        return 0
    name = argv[0].replace("_", "-") if argv else ""
    if name not in COMMANDS:
        print(f"error: {_unknown(argv, prog)}", file=sys.stderr)
        return 2
    return run_command(COMMANDS[name][0], argv[1:], f"{prog} {name}")


def version() -> str:
    """One line for a bug report; nothing is imported for it."""
    found = [f"fastjepa {fastjepa.__version__}"]
    for package in ("torch", "triton"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def _unknown(argv: Sequence[str], prog: str) -> str:
    """What is wrong with `argv`, which names no command, in one line."""
    given = f"there is no command {argv[0]!r}" if argv else "no command was given"
    near = difflib.get_close_matches(argv[0].lower().replace("_", "-"), COMMANDS, n=1) if argv else []
    meant = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
    return f"{given}; {meant} ({prog} --help)"


if __name__ == "__main__":
    sys.exit(main(prog="python -m fastjepa"))
