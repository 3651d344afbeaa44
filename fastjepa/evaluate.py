"""Evaluate a trained run: `python -m fastjepa.evaluate --checkpoint RUN`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from fastjepa.entry import run_command

    sys.exit(run_command("fastjepa.evaluate", None, "python -m fastjepa.evaluate"))

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastjepa.calibration.choice import EAGER, Choice
from fastjepa.calibration.setting import setting_of_rollout
from fastjepa.calibration.verdict import Verdict, resolve
from fastjepa.config import Config, resolve_device, resolve_precision
from fastjepa.files.safe_files import CheckpointError, write_text_atomic
from fastjepa.fused.swap import accelerate, restore
from fastjepa.graphs import CudaGraphChoice, GraphedRollout, use_cuda_graph
from fastjepa.kernels.checks import unavailable_reason
from fastjepa.model.jepa import JEPA, build_jepa
from fastjepa.model.networks import DetHead, ImageDecoder
from fastjepa.model.probes import build_probes
from fastjepa.moving_mnist.official import DownloadError
from fastjepa.optional_packages import require_packages
from fastjepa.refusal import refusals
from fastjepa.storage.checkpoint import load_modules
from fastjepa.storage.run_folder import load_run_checkpoint
from fastjepa.training.command_line import parse_options
from fastjepa.training.evaluation import evaluate
from fastjepa.training.resolution import read_choice
from fastjepa.training.run_clips import load_run_clips
from fastjepa.training.trainer import set_precision

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """Average precision by horizon, and the probes' losses, of a checkpoint on its validation clips."""

    checkpoint: Path
    """The folder of a run, or its checkpoint file."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    batch_size: int | None = None
    """Clips per batch; default: as in training. AP per batch depends on it a little, pooled AP does not."""
    original: bool = False
    """Repeat the work as the original does."""
    cuda_graph: CudaGraphChoice = "auto"
    """Roll a batch out in one launch (a GPU only): on, off, or auto: where `python -m fastjepa.calibrate --inference`
    found it to be faster, or, where that was not measured, where the run was trained with graphs."""
    cache_dir: Path | None = None
    """Folder of the data; default: as in training."""
    json: Path | None = None
    """Also write the metrics to this file."""


def load_run(checkpoint: Path, device: torch.device) -> tuple[Config, JEPA, ImageDecoder, DetHead]:
    """The configuration and the modules of a run, from its folder or checkpoint file.

    The networks compute as the run resolved when it began; where its fused kernels cannot run, a warning says so and
    they are eager, because a run must be usable on any machine.

    Raises:
        CheckpointError: missing, damaged, or not the checkpoint of a run.
    """
    _, config, jepa, decoder, head = load_run_and_choice(checkpoint, device)
    return config, jepa, decoder, head


def load_run_and_choice(checkpoint: Path, device: torch.device) -> tuple[Choice, Config, JEPA, ImageDecoder, DetHead]:
    """`load_run`, and what the run resolved."""
    state, path = load_run_checkpoint(checkpoint)
    try:
        config = Config.from_json(state["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no usable configuration: {error}") from error
    jepa = build_jepa(
        dobs=config.dobs, henc=config.henc, hpre=config.hpre, dstc=config.dstc,
        projector=config.projector,
        std_coeff=config.std_coeff, cov_coeff=config.cov_coeff,
    )  # fmt: skip
    decoder, head = build_probes(dobs=config.dobs, dstc=config.dstc, hdet=config.hdet)
    load_modules(state, {"jepa": jepa, "image_decoder": decoder, "detection_head": head})
    jepa.to(device)
    choice = read_choice(state, path)
    reason = unavailable_reason(device) if choice.batch_norm else None
    if reason is not None:
        logger.warning("the run was trained with fused blocks, which cannot run here (%s): eager networks", reason)
    networks = Choice(
        batch_norm=choice.batch_norm and reason is None,
        channels_last=choice.channels_last and device.type == "cuda",  # on a CPU the evaluation lays its copies out
    )
    if networks != EAGER:
        accelerate(jepa, choice=networks, purpose="inference", verbose=False)
    return choice, config, jepa, decoder.to(device), head.to(device)


def look_up_rollout(config: Config, device: torch.device, batch: int, cache_dir: Path | None) -> Verdict:
    """What a calibration found for rollouts of the run, `batch` clips at a time, in the cache (default: the run's) or
    the package. Nothing is measured.
    """
    setting = setting_of_rollout(config, device, resolve_precision(config.precision, device), batch)
    return resolve(setting, device, cache_dir=cache_dir or config.cache_dir, measuring=False)


def compute_as_measured(jepa: JEPA, verdict: Verdict, device: torch.device) -> Choice | None:
    """Let the networks compute in the way that was measured to be fastest, and exact, in place of that of the run.

    A CUDA graph in the choice that is returned is the caller's to make. None: nothing was measured to be exact, and
    nothing has changed.
    """
    if not any(row.status == "exact" for row in verdict.rows):
        return None
    with_kernels = unavailable_reason(device) is None
    best = verdict.best(lambda choice: with_kernels or not choice.needs_kernels)
    if getattr(jepa, "acceleration", None) is not None:
        restore(jepa)
    if (networks := dataclasses.replace(best, cuda_graph=False)) != EAGER:
        accelerate(jepa, choice=networks, purpose="inference", verbose=False)
    return best


def main(argv: Sequence[str] | None = None, prog: str = "python -m fastjepa.evaluate") -> None:
    """The command line, typed as `prog`."""
    options = parse_options(Options, argv, prog=prog)
    with refusals(DownloadError):
        if options.batch_size is not None and options.batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1, got {options.batch_size}")
        require_packages("evaluation", "torchmetrics")
        device = resolve_device(options.device)
        if options.original and options.cuda_graph == "on":
            raise ValueError("--cuda_graph on cannot be served with --original, which rolls out as the original does")
        use_cuda_graph(options.cuda_graph, device)  # refuses what cannot be served, before anything is read
        choice, config, jepa, decoder, head = load_run_and_choice(options.checkpoint, device)
        set_precision(config.precision)
        batch = options.batch_size or config.batch_size
        if options.cuda_graph == "auto" and device.type == "cuda" and not options.original:
            verdict = look_up_rollout(config, device, batch, options.cache_dir)
            choice = compute_as_measured(jepa, verdict, device) or choice
        graph = use_cuda_graph(options.cuda_graph, device, measured_faster=choice.cuda_graph) and not options.original
        _, clips = load_run_clips(config, options.cache_dir)
        result = evaluate(
            jepa, decoder, head, clips.to(device), batch,
            autocast_dtype=torch.bfloat16 if config.precision == "bf16" else None, original=options.original,
            rollout=GraphedRollout(jepa, fold_batch_norm=True) if graph else None,
        )  # fmt: skip
        if options.json is not None:
            write_text_atomic(options.json, json.dumps(result.as_row(), indent=2) + "\n")
    print(f"{len(clips):,} clips; guessing would give {result.positive_share:.3f}")
    print("horizon  AP      AP pooled")
    for s, (ap, pooled) in enumerate(zip(result.ap, result.pooled_ap, strict=True)):
        print(f"AP_{s}     {ap:.4f}  {pooled:.4f}")
    print(f"mAP      {result.map:.4f}  {result.pooled_map:.4f}")
    print(f"reconstruction loss {result.recon_loss:.5f}, detection loss {result.det_loss:.5f}")
