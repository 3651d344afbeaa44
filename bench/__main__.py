"""`python -m bench SUBCOMMAND ...`: the subcommands, each in its own module, imported only when it is called."""

from __future__ import annotations

import importlib
import sys

from fastjepa.optional_packages import MissingPackageError

# name: (module with `main(argv) -> exit status`, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "audit": ("bench.audit.command", "compile every kernel without a GPU and judge what the assembler made of it"),
    "projected_losses": ("bench.projected_losses", "time the projected losses, forward and backward"),
    "losses": ("bench.projected_losses", "short for projected_losses"),
    "batch_norm": ("bench.batch_norm", "time BatchNorm blocks, forward and backward"),
    "convolution": (
        "bench.convolution",
        "time inference's convolutions, or estimate those of a rollout, without a GPU",
    ),
    "frame_windows": ("bench.frame_windows", "time gathering the gradient of an unroll's sequences"),
    "moments": ("bench.moments", "time the passes over rows of which the projected losses are made"),
    "networks": ("bench.networks", "time the encoder and the predictor whole, forward and backward"),
    "layers": ("bench.layers", "networks and batch_norm in one run"),
    "saved": ("bench.saved", "count the bytes a training step keeps for its backward pass, without a GPU"),
    "traffic": ("bench.traffic.command", "count the bytes and kernels of a step, an evaluation and a rollout"),
    "scaling": (
        "bench.scaling",
        "estimate a step on several GPUs: count what it exchanges, and add it up",
    ),
    "ceilings": ("bench.ceilings", "time copies, matrix products and cuDNN's convolutions: what the device can do"),
    "checks": ("bench.checks", "check every kernel at small odd sizes, and that a graph equals plain calls"),
    "step": ("bench.step", "time one training step, from the original's to everything at once"),
    "rollout": ("bench.rollout", "time predicting k frames: latency and frames per second"),
    "train": ("bench.train", "train for some time, and write mAP against the wall clock"),
    "tune": ("bench.tune", "time candidate launch configurations of the kernels on a GPU"),
    "report": ("bench.report.page", "draw and tabulate committed rows"),
    "prove": ("bench.prove.command", "everything that can be shown on this machine, in one folder"),
    "self_check": ("bench.self_check", "check fused kernels against eager, as auto does before it uses them"),
    "eval": ("bench.evaluation", "time one evaluation, the original's and the deduplicated one"),
}


def main(argv: list[str]) -> int:
    """Run the subcommand named first in `argv` with the rest; returns its exit status."""
    listing = "\n".join(f"  {name:<16} {what}" for name, (_, what) in COMMANDS.items())
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: python -m bench SUBCOMMAND [--help] ...\n\nsubcommands:\n{listing}")
        return 0
    if not argv or argv[0] not in COMMANDS:
        given = f"unknown subcommand {argv[0]!r}" if argv else "no subcommand given"
        print(f"python -m bench: {given}; the subcommands are:\n{listing}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(COMMANDS[argv[0]][0])
    except ImportError as error:
        if "triton" not in str(error):
            raise
        print(f"python -m bench {argv[0]} needs Triton, which cannot be imported here ({error})", file=sys.stderr)
        return 2
    try:
        return int(module.main(argv[1:]))
    except MissingPackageError as error:
        print(f"python -m bench {argv[0]}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
