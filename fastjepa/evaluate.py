"""Evaluate a trained run: `python -m fastjepa.evaluate --checkpoint RUN`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from fastjepa.entry import run_command

    sys.exit(run_command("fastjepa.evaluate", None, "python -m fastjepa.evaluate"))

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastjepa.config import Config, resolve_device
from fastjepa.execution import ExecutionConfig
from fastjepa.files.safe_files import CheckpointError, write_text_atomic
from fastjepa.fused.swap import accelerate
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
from fastjepa.training.execution import read_execution
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
    """Roll a batch out in one launch (a GPU only): on, off, or auto: where the run was trained with graphs."""
    cache_dir: Path | None = None
    """Folder of the data; default: as in training."""
    json: Path | None = None
    """Also write the metrics to this file."""


def load_run(checkpoint: Path, device: torch.device) -> tuple[Config, JEPA, ImageDecoder, DetHead]:
    """The configuration and the modules of a run, from its folder or checkpoint file.

    Where the run was trained with fused kernels, inference networks take the networks' place; where those cannot run, a
    warning says so and they are eager, because a run must be usable on any machine.

    Raises:
        CheckpointError: missing, damaged, or not the checkpoint of a run.
    """
    _, config, jepa, decoder, head = load_run_and_execution(checkpoint, device)
    return config, jepa, decoder, head


def load_run_and_execution(
    checkpoint: Path, device: torch.device
) -> tuple[ExecutionConfig, Config, JEPA, ImageDecoder, DetHead]:
    """`load_run`, and how the run was computed."""
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
    execution, _ = read_execution(state, device, path)
    if execution.fused and (reason := unavailable_reason(device)) is not None:
        logger.warning("the run was trained with fused kernels, which cannot run here (%s): eager networks", reason)
    elif execution.fused:
        accelerate(jepa, execution=execution, purpose="inference", strict=False, verbose=False)
    return execution, config, jepa, decoder.to(device), head.to(device)


def main(argv: Sequence[str] | None = None, prog: str = "python -m fastjepa.evaluate") -> None:
    """The command line, typed as `prog`."""
    options = parse_options(Options, argv, prog=prog)
    with refusals(DownloadError):
        if options.batch_size is not None and options.batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1, got {options.batch_size}")
        require_packages("evaluation", "torchmetrics")
        device = resolve_device(options.device)
        if options.original and options.cuda_graph == "on":
            raise ValueError("--cuda_graph on is not supported with --original, which rolls out as the original does")
        use_cuda_graph(options.cuda_graph, device)  # refuses what cannot be served, before anything is read
        execution, config, jepa, decoder, head = load_run_and_execution(options.checkpoint, device)
        set_precision(config.precision)
        batch = options.batch_size or config.batch_size
        graph = use_cuda_graph(options.cuda_graph, device, auto=execution.cuda_graph) and not options.original
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
