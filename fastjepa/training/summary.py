"""What the command line says of a run: what will be trained when it begins, and what came of it when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastjepa.environment import device_name
from fastjepa.training.trainer import Trainer


def describe(trainer: Trainer) -> str:
    """What will be trained, on what, and where it goes."""
    config, parameters = trainer.config, sum(p.numel() for p in trainer.jepa.parameters())
    small = " (small, for a CPU; --preset full is the published recipe)" if config.preset == "demo" else ""
    how = f"computes with: {trainer.execution} (--precision, --backend, --cuda_graph, --recompute)"
    if trainer.execution_notes:
        how += f"\n{trainer.execution_notes}"
    return (
        f"preset {config.preset}{small}; {device_name(trainer.device)}\n"
        f"{_of_processes(trainer)}"
        f"{how}\n"
        f"{parameters:,} parameters; {len(trainer.train_clips):,} + {len(trainer.val_clips):,} clips of "
        f"{config.n_frames}×{config.canvas}×{config.canvas} ({config.data}); {config.epochs} epochs of batches of "
        f"{config.batch_size}\nfolder: {trainer.folder}"
    )


def _of_processes(trainer: Trainer) -> str:
    ranks = trainer.ranks
    if ranks.alone:
        return ""
    statistics = (
        "BatchNorm and losses take the statistics of the whole batch, as one process would (--no-sync_stats)"
        if trainer.config.sync_stats
        else "BatchNorm and losses take the statistics of each process's own clips (--no-sync_stats), as plain data "
        "parallel training does; these are not the numbers of one process"
    )
    return f"{ranks.size} processes over {ranks.backend}, each with its part of every batch; {statistics}\n"


def summary(trainer: Trainer, seconds: float, files: Sequence[Path], *, trained: bool) -> str:
    """What came of a run that has ended: how far it is, how good, how it could go on, and what it wrote.

    `trained` says whether anything was left to do when it began.
    """
    last = trainer.last_row
    assert last is not None, "a run that has ended was evaluated"
    done = "done" if trained else "nothing was left to do"
    return "\n".join(
        (
            f"\n{done}, in {seconds:.0f} s: {_position(trainer)}",
            f"mAP {last['map']:.3f} (pooled {last['pooled_map']:.3f}), AP_0 {last['ap_0']:.3f}; guessing would give "
            f"{last['positive_share']:.3f}",
            "wrote:" if trained else "it holds:",
            *(f"  {path}" for path in files),
        )
    )


def _position(trainer: Trainer) -> str:
    """How far the run is, and which flag makes it go on."""
    config = trainer.config
    position = f"{trainer.epoch} of {config.epochs} epochs"
    if trainer.batch:
        position += f" and {trainer.batch} step{'s' if trainer.batch > 1 else ''} of the next"
    position += f", {trainer.global_step} step{'s' if trainer.global_step > 1 else ''} in all"
    further = "more --epochs" if trainer.epoch >= config.epochs else f"more than --max_steps {config.max_steps}"
    return f"{position}; --resume {trainer.folder} with {further} goes on"
