"""What `auto` takes, as a rule, and the work of the self-check behind it.

1. CPU: eager, channels-last in training; losses in closed form where that covers the projector.
2. CUDA from sm_80 with Triton, exact by the self-check: fused networks and losses, channels-last, CUDA graphs.
3. Otherwise: eager, with the reason.
4. Recomputation only where asked for. What a flag asks for is done, or raises an error with the reason.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastjepa import autotune
from fastjepa.environment import device_name, machine_key
from fastjepa.execution import ExecutionConfig, RunPrecision, tf32_products
from fastjepa.files.safe_files import CheckpointError
from fastjepa.kernels.checks import unavailable_reason
from fastjepa.model.jepa import JEPA, build_jepa, eval_mode
from fastjepa.policy import judge_draws, unroll_results, worst
from fastjepa.storage.sizes import encoder_sizes, predictor_sizes, projector_sizes

Backend = Literal["auto", "eager", "fused"]
Switch = Literal["auto", "on", "off"]

LEAST_CAPABILITY = (8, 0)  # of a GPU: the oldest for which kernels are compiled and audited
BATCH, FRAMES, SIDE, STEPS = 4, 5, 32, 2  # of the self-check
SEED = 2025


class Widths(NamedTuple):
    """The sizes of a Video JEPA, as `build_jepa` takes them."""

    dobs: int
    henc: int
    hpre: int
    dstc: int
    projector: str


def widths_of(jepa: nn.Module) -> Widths | None:
    """Those of a JEPA, read from its weights; None if it is not of the published form."""
    source: Any = jepa
    try:
        encoder = encoder_sizes(source.encoder.state_dict())
        hpre = predictor_sizes(source.predictor.state_dict())["hpre"]
        has_losses = hasattr(jepa, "predcost")  # a model for inference needs none
        projector = projector_sizes(source.predcost.proj.state_dict()) if has_losses else f"{encoder['dstc']}-64-64"
    except (AttributeError, CheckpointError):
        return None
    return Widths(**encoder, hpre=hpre, projector=projector)


def resolve_execution(
    device: torch.device,
    precision: RunPrecision,
    widths: Widths | None,
    *,
    backend: Backend = "auto",
    cuda_graph: Switch = "auto",
    recompute: bool = False,
    no_graph: str = "",
    cache_dir: Path | None = None,
) -> tuple[ExecutionConfig, str]:
    """How a training run is computed by the flags `backend`, `cuda_graph` and `recompute`, and why not otherwise, in at
    most a few lines. `widths` and `cache_dir` as in `auto_problem`; `no_graph`: why the run cannot be captured as CUDA
    graphs. Raises ValueError, naming the flag, where one asks for what is not supported here.
    """
    reason = "--backend eager" if backend == "eager" else None
    if backend == "fused" and (unavailable := unavailable_reason(device)) is not None:
        raise ValueError(f"--backend fused is not supported here: {unavailable}; use auto or eager")
    if backend == "auto":
        reason = auto_problem(device, precision, widths, cache_dir=cache_dir)
    if recompute and reason is not None:
        raise ValueError(f"--recompute on needs fused networks, which this run does not have: {reason}")
    if device.type != "cuda" and not no_graph:
        no_graph = f"graphs need a CUDA device, this is {device}"
    if cuda_graph == "on" and no_graph:
        raise ValueError(f"--cuda_graph on is not supported here: {no_graph}; use auto or off")
    fused = reason is None
    lines = [f"no fused kernels: {reason}"] if backend == "auto" and reason and device.type != "cpu" else []
    if cuda_graph == "auto" and fused and device.type == "cuda" and no_graph:
        lines.append(f"no CUDA graphs: {no_graph}")
    return ExecutionConfig(
        precision,
        fused=fused,
        cuda_graph=cuda_graph == "on" or (cuda_graph == "auto" and fused and not no_graph),
        recompute=recompute,
        channels_last=fused or device.type == "cpu" or precision != "fp32",
    ), "\n".join(lines)


def auto_problem(
    device: torch.device, precision: RunPrecision, widths: Widths | None, *, cache_dir: Path | None = None
) -> str | None:
    """Why `auto` uses no fused kernels on this device; None if it does. Runs the self-check, if it has not run yet.

    `widths`: None if the model is not of the published form; `cache_dir`: of the self-check's file, by default the
    user's.
    """
    if device.type != "cuda":
        return f"auto uses them on CUDA devices, this is {device}"
    if (unavailable := unavailable_reason(device)) is not None:
        return unavailable
    if (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        return f"they are made for sm_80 and later, this GPU is sm_{capability[0]}{capability[1]}"
    if widths is None:
        return "the model is not of the published form"
    return autotune.self_check(
        machine_key(device, *widths, precision),
        lambda: fused_problem(device, precision, widths),
        what=f"a small JEPA of these widths in {precision} on {device_name(device)}",
        cache_dir=cache_dir,
    )


def fused_problem(device: torch.device, precision: RunPrecision, widths: Widths) -> str | None:
    """Why fused kernels are not exact here, in one line; None if they are.

    A training step (losses, gradients, buffers) and a rollout, against float64 by the policy beside eager's errors; in
    fp32 in any case, where a wrong formula shows, and in the run's precision.
    """
    for arithmetic in dict.fromkeys(("fp32", precision)):
        truth, eager, ours = (
            partial(_results, widths, device, rule, fused)
            for rule, fused in (("float64", False), (arithmetic, False), (arithmetic, True))
        )
        found = worst(judge_draws(truth, eager, ours, arithmetic))
        if not found.exact:
            allowed = "eager is no measure of it" if found.bound is None else f"allowed are {found.bound:.1e}"
            return f"{found.result} is off by {found.ours:.1e} of its norm in {arithmetic}; {allowed}"
    return None


def _results(widths: Widths, device: torch.device, arithmetic: str, fused: bool, draw: int) -> dict[str, Tensor]:
    """What a training step leaves, and the states of a rollout: "fused" by fused and by inference networks."""
    from fastjepa.fused.swap import accelerate  # which asks this module what auto takes

    dtype = torch.float64 if arithmetic == "float64" else torch.float32
    trained, video = _model_and_video(widths, draw)
    trained, video = trained.to(device, dtype), video.to(device, dtype)
    rolled = copy.deepcopy(trained)
    if fused:
        accelerate(trained, backend="fused", strict=False, verbose=False)
        accelerate(rolled, backend="fused", purpose="inference", strict=False, verbose=False)
    with tf32_products(device, arithmetic == "tf32"), torch.enable_grad():
        with torch.autocast(device.type, torch.bfloat16, enabled=arithmetic == "bf16"):
            _, losses = trained.unroll(video, None, nsteps=STEPS)
            with eval_mode(rolled):
                states = rolled.rollout(video[:, :, :2], steps=STEPS).to(dtype)
        assert losses is not None
        losses[0].backward()
    states_by_kind = {"encoded states": states[:, :, :2], "predicted states": states[:, :, 2:]}
    return unroll_results(trained, losses) | states_by_kind


def _model_and_video(widths: Widths, draw: int) -> tuple[JEPA, Tensor]:
    """On the CPU, so that every dtype gets the same numbers; BatchNorm's statistics are drawn for the rollout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + draw)
        jepa = build_jepa(**widths._asdict(), std_coeff=10.0, cov_coeff=100.0)
        for layer in jepa.modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
                layer.running_mean.normal_(std=0.1)
                layer.running_var.uniform_(0.5, 1.5)
        return jepa, torch.rand(BATCH, widths.dobs, FRAMES, SIDE, SIDE)
