"""What `auto` takes, as a rule, and the work of the self-check behind it.

1. CPU: eager, channels-last in training; losses in closed form where that covers the projector.
2. CUDA from sm_80 with Triton, exact by the self-check: fused networks and losses, channels-last, CUDA graphs.
3. Otherwise: eager, with the reason.
4. Recomputation only where asked for. What a flag asks for is done, or raises an error with the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastjepa import autotune
from fastjepa.environment import device_name, machine_key
from fastjepa.execution import ExecutionConfig, RunPrecision, tf32_products
from fastjepa.files.safe_files import CheckpointError
from fastjepa.kernels.checks import unavailable_reason
from fastjepa.model.jepa import JEPA, build_jepa
from fastjepa.policy import DRAWS, GRADIENT, Error, judge_norms, largest_errors, may_have_jumped, norm_errors
from fastjepa.storage.sizes import encoder_sizes, predictor_sizes, projector_sizes

Backend = Literal["auto", "eager", "fused"]
Switch = Literal["auto", "on", "off"]
Tensors = dict[str, Tensor]

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
    """How a training run is computed, and why not otherwise, in at most a few lines.

    Args:
        device: where it runs.
        precision: resolved already.
        widths: of the model; None: it is not of the published form, and nothing can be checked.
        backend, cuda_graph, recompute: the flags.
        no_graph: why this run cannot be captured as CUDA graphs; "" if it can.
        cache_dir: of the self-check's file; default: the user's.

    Raises:
        ValueError: a flag asks for what is not supported here; the message names it and says why.
    """
    reason = "--backend eager" if backend == "eager" else None
    if backend == "fused" and (unavailable := unavailable_reason(device)) is not None:
        raise ValueError(f"--backend fused is not supported here: {unavailable}; use auto or eager")
    if backend == "auto":
        reason = auto_problem(device, precision, widths, cache_dir=cache_dir)
    if recompute and reason is not None:
        raise ValueError(f"--recompute on needs fused networks, which this run does not have: {reason}")
    no_graph = (
        "" if device.type == "cuda" and not no_graph else no_graph or f"graphs need a CUDA device, this is {device}"
    )
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
    """Why `auto` uses no fused kernels on this device; None if it does. Runs the self-check, if it has not run yet."""
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
        for results in (_step, _rollout):
            if (problem := _problem(results, device, arithmetic, widths)) is not None:
                return problem
    return None


Results = Callable[[Widths, int, torch.device, str, bool], Tensors]


def _problem(results: Results, device: torch.device, arithmetic: str, widths: Widths) -> str | None:
    eager: dict[str, Error] = {}
    for draw in range(DRAWS):
        truth = results(widths, draw, device, "float64", False)
        eager = largest_errors(eager, norm_errors(results(widths, draw, device, arithmetic, False), truth))
        errors = norm_errors(results(widths, draw, device, arithmetic, True), truth)
        found = judge_norms(errors, eager, arithmetic)
        if found.exact:
            return None
        if not may_have_jumped(errors, eager, arithmetic):
            break
    allowed = "eager is no measure of it" if found.bound is None else f"allowed are {found.bound:.1e}"
    return f"{found.name} is off by {found.error:.1e} of its norm in {arithmetic}; {allowed}"


def _step(widths: Widths, draw: int, device: torch.device, arithmetic: str, fused: bool) -> Tensors:
    """Losses, and by part of the model gradients and buffers, of one unroll with losses."""
    jepa, video = _model_and_video(widths, draw, device, arithmetic)
    if fused:
        _swap(jepa, "train")
    with tf32_products(device, arithmetic == "tf32"), torch.enable_grad():
        with _autocast(device, arithmetic):
            _, losses = jepa.unroll(video, None, nsteps=STEPS)
        assert losses is not None
        losses[0].backward()
    total, _, _, parts, prediction = losses
    found = {"losses": torch.stack([total, parts["std_loss"], parts["cov_loss"], prediction]).detach()}
    source: Any = jepa
    modules: dict[str, nn.Module] = {
        "encoder": source.encoder, "predictor": source.predictor, "projector": source.predcost.proj
    }  # fmt: skip
    for name, module in modules.items():
        gradients = [p.grad.flatten() for _, p in sorted(module.named_parameters()) if p.grad is not None]
        found[GRADIENT + name] = torch.cat(gradients)
        buffers = [b.flatten() for _, b in sorted(module.named_buffers()) if b.is_floating_point()]
        if buffers:  # a projector of one layer has none
            found[f"buffers of the {name}"] = torch.cat(buffers)
    return found


@torch.no_grad()
def _rollout(widths: Widths, draw: int, device: torch.device, arithmetic: str, fused: bool) -> Tensors:
    """The states of a video and the predicted ones; of "fused" by inference networks."""
    jepa, video = _model_and_video(widths, draw, device, arithmetic)
    jepa.eval()
    if fused:
        _swap(jepa, "inference")
    with tf32_products(device, arithmetic == "tf32"), _autocast(device, arithmetic):
        states = jepa.rollout(video[:, :, :2], steps=STEPS)
    return {"encoded states": states[:, :, :2].to(video.dtype), "predicted states": states[:, :, 2:].to(video.dtype)}


def _swap(jepa: JEPA, purpose: Literal["train", "inference"]) -> None:
    from fastjepa.fused.swap import accelerate  # which asks this module what auto takes

    accelerate(jepa, backend="fused", purpose=purpose, strict=False, verbose=False)


def _model_and_video(widths: Widths, draw: int, device: torch.device, arithmetic: str) -> tuple[JEPA, Tensor]:
    """The same numbers for every dtype: drawn on the CPU, BatchNorm's buffers too, which folding must not ignore."""
    dtype = torch.float64 if arithmetic == "float64" else torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED + draw)
        jepa = build_jepa(**widths._asdict(), std_coeff=10.0, cov_coeff=100.0)
        for layer in jepa.modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
                layer.running_mean.normal_(std=0.1)
                layer.running_var.uniform_(0.5, 1.5)
        video = torch.rand(BATCH, widths.dobs, FRAMES, SIDE, SIDE)
    return jepa.to(device, dtype), video.to(device, dtype)


def _autocast(device: torch.device, arithmetic: str) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16, enabled=arithmetic == "bf16")
