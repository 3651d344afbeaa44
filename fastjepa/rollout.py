"""Roll a trained run out to any horizon: `python -m fastjepa.rollout --checkpoint RUN --horizon 50`."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import sys

    from fastjepa.entry import run_command

    sys.exit(run_command("fastjepa.rollout", None, "python -m fastjepa.rollout"))

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastjepa.config import resolve_device
from fastjepa.environment import device_name
from fastjepa.evaluate import load_run_and_execution
from fastjepa.graphs import CudaGraphChoice, GraphedRollout, use_cuda_graph
from fastjepa.model.context import CONTEXT
from fastjepa.model.jepa import eval_mode
from fastjepa.moving_mnist.official import DownloadError
from fastjepa.refusal import refusals
from fastjepa.training.command_line import parse_options
from fastjepa.training.run_clips import load_run_clips
from fastjepa.training.trainer import set_precision

PICTURED_CLIPS = 3


@dataclass(frozen=True)
class Options:
    """Predict far beyond the clips: an animation beside the ground truth while it lasts, and the speed."""

    checkpoint: Path
    """The folder of a run, or its checkpoint file."""
    horizon: int = 50
    """Frames to predict from the first two of each clip."""
    clips: int = 3
    """Validation clips to predict at once; the animation shows the first three."""
    chunk: int | None = None
    """Predict this many clips at a time, for less memory; default: all at once."""
    out: Path | None = None
    """The GIF; default: figures/rollout-<horizon>.gif in the folder of the run."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""
    cuda_graph: CudaGraphChoice = "auto"
    """Predict in one launch (a GPU only): on, off, or auto: where the run was trained with graphs."""
    cache_dir: Path | None = None
    """Folder of the data; default: as in training."""


@dataclass(frozen=True)
class Result:
    """What came out: the animation, and how fast the frames were predicted (encoding and drawing not counted)."""

    path: Path
    frames: int
    seconds: float
    graph: bool
    device: str

    @property
    def frames_per_second(self) -> float:
        """Predicted frames of all clips a second."""
        return self.frames / self.seconds


def roll_out(options: Options) -> Result:
    """Load, predict twice (the second time is measured), decode, draw.

    Raises:
        ValueError: options out of range, or that this machine cannot serve.
        CheckpointError, OSError: files that cannot be read or written.
        MissingPackageError: the animation or the data needs a package that is not installed.
    """
    from fastjepa.figures.horizon import draw_horizon_gif  # now: without matplotlib the work would be for nothing

    for name in ("horizon", "clips"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.chunk is not None and options.chunk < 1:
        raise ValueError(f"--chunk must be at least 1, got {options.chunk}")
    device = resolve_device(options.device)
    use_cuda_graph(options.cuda_graph, device)  # refuses what cannot be served, before anything is read
    run_folder = options.checkpoint if options.checkpoint.is_dir() else options.checkpoint.parent
    path = options.out or run_folder / "figures" / f"rollout-{options.horizon}.gif"
    if path.suffix.lower() != ".gif":
        raise ValueError(f"--out must end in .gif, got {path}")
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"--out {path} cannot be written: {path.parent} is not a folder")

    execution, config, jepa, decoder, head = load_run_and_execution(options.checkpoint, device)
    set_precision(config.precision)
    _, validation = load_run_clips(config, options.cache_dir)
    if options.clips > len(validation):
        raise ValueError(
            f"--clips must be at most {len(validation)}, the validation clips of the run; got {options.clips}"
        )
    graph = use_cuda_graph(options.cuda_graph, device, auto=execution.cuda_graph)
    video, _ = validation.subset(options.clips).to(device).batch(torch.arange(options.clips, device=device))
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")
    with eval_mode(jepa, decoder, head), autocast:
        context = torch.cat([jepa.encode(part) for part in video[:, :, :CONTEXT].split(options.chunk or options.clips)])
        graphed = GraphedRollout(jepa, options.horizon, fold_batch_norm=True) if graph else None

        def predict() -> Tensor:
            if graphed is None:
                return jepa.rollout(steps=options.horizon, states=context, chunk=options.chunk)
            parts = context.split(options.chunk or options.clips)
            return torch.cat([graphed(part) for part in parts]) if len(parts) > 1 else graphed(parts[0])

        states, seconds = _measured(predict, device)
        pictured = states[:PICTURED_CLIPS, :, CONTEXT:]
        decoded, detected = decoder(pictured).clamp(0, 1)[:, 0], head(pictured)
    draw_horizon_gif(
        video[:PICTURED_CLIPS, 0].cpu().numpy(), decoded.float().cpu().numpy(), detected.float().cpu().numpy(), path,
        context=CONTEXT, max_clips=PICTURED_CLIPS,
    )  # fmt: skip
    return Result(path, options.clips * options.horizon, seconds, graph, device_name(device))


def _measured(predict: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """The result of the second call, and its seconds; the first loads libraries, and records a graph."""
    predict()
    _wait(device)
    started = time.perf_counter()
    result = predict()
    _wait(device)
    return result, time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None, prog: str = "python -m fastjepa.rollout") -> None:
    """The command line, typed as `prog`."""
    options = parse_options(Options, argv, prog=prog)
    with refusals(DownloadError):
        result = roll_out(options)
    how = "as a CUDA graph" if result.graph else "step by step"
    print(
        f"{options.clips} clips, {options.horizon} frames ahead, {how} on {result.device}: "
        f"{result.frames:,} frames in {result.seconds:.3f} s, {result.frames_per_second:,.0f} frames/s"
    )
    print(f"wrote {result.path}")
