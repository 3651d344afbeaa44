"""`fastjepa.verify(jepa, video)`: a user's own model, on a video of theirs, against the plain model in float64.

Everything happens on copies. The policy is that of tests and benchmarks (`fastjepa.policy`): errors by norms, in
fp32 in any case and in the model's own arithmetic if that is another, each beside eager's.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastjepa.execution import ambient_precision, tf32_products
from fastjepa.fused.autocast import InBf16
from fastjepa.fused.swap import NETWORKS, PARTS, accelerate, check_parts, put, restore
from fastjepa.model.networks import DetHead
from fastjepa.model.probes import build_probes
from fastjepa.model.step import TrainStep
from fastjepa.policy import COUNTS, Judgement, is_out_of_memory, judge_draws, relative_error, unroll_results, worst

Tensors = dict[str, Tensor]
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Verification:
    """What `verify` found, as data and, printed, as a table."""

    rows: tuple[Judgement, ...]
    what: str
    """The video, the unroll and the device."""
    swapped: tuple[str, ...]
    """The parts that are not the plain ones, as "encoder: ResNet5 → FusedResNet5"."""

    @property
    def passed(self) -> bool:
        """Whether the policy lets every row pass."""
        return all(row.exact for row in self.rows)

    @property
    def worst(self) -> Judgement:
        """The row closest to, or furthest beyond, its bound."""
        return worst(self.rows)

    def __str__(self) -> str:
        wrong, unsure = sum(not row.exact for row in self.rows), sum(row.bound is None for row in self.rows)
        why = "too far off" if wrong > unsure else "cannot be judged by eager; give more clips, or larger ones"
        verdict = f"NOT PASSED: {wrong} of {len(self.rows)} results {why}" if wrong else "passed"
        parts = self.swapped or ("nothing is swapped: this holds eager against itself",)
        width = max(len(row.result) for row in self.rows)
        lines = [
            f"fastjepa.verify: {verdict}",
            f"  {self.what}",
            *(f"  {part}" for part in parts),
            "  errors, of the norm of what the plain model computes in float64:",
            f"  {'':<4}  {'':<{width}}  {'ours':>8}  {'eager':>8}  {'allowed':>8}",
        ]
        for row in self.rows:
            allowed = "" if row.bound is None else f"{row.bound:.1e}"
            note = "" if row.exact else "  cannot be judged" if row.bound is None else "  TOO FAR OFF"
            errors = f"{row.ours:>8.1e}  {row.eager:>8.1e}  {allowed:>8}"
            lines.append(f"  {row.precision:<4}  {row.result:<{width}}  {errors}{note}".rstrip())
        return "\n".join(lines)


def verify(
    jepa: nn.Module,
    video: Tensor,
    actions: Tensor | None = None,
    *,
    steps: int = 4,
    unroll_mode: str = "parallel",
    ctxt_window_time: int = 1,
    precision: Literal["keep", "bf16"] = "keep",
    backend: Literal["auto", "eager", "fused"] = "auto",
    verbose: bool = True,
) -> Verification:
    """Whether this model, accelerated, computes what it computes without: losses, gradients and buffers of one unroll.

    Truth is the plain model in float64. Held against it are *ours*, the accelerated model as it is, and *eager*, the
    plain one in the same precision, whose own error says what that precision can do. A model that is not accelerated
    is compared with what `fastjepa.accelerate(jepa, backend=backend)` would make of it.

    Each part's gradients (and its buffers) are one row. What does not compute in plain fp32 is checked in fp32 first:
    in bf16, half a gradient could pass. A gradient in which single ReLUs may have switched gets a second and a third
    chance, with the video mirrored. The model stays as it was, to the last bit, and so do random number generators; on
    a GPU, "auto" may run the self-check first, as `accelerate` does. The unroll is the model's own, overridden
    or not; where `TrainStep` takes a model, its loss is held against that of the unroll too.

    Args:
        jepa: a JEPA of fastjepa or eb_jepa, accelerated or not, in the modes (train, frozen parts) to be checked.
        video: (B, C, T, H, W), floating point, on the model's device; a few clips of your own data are best. Float64
            needs memory and, on most GPUs, time.
        actions: as `jepa.unroll` takes them, for a model that reads them.
        steps: prediction steps of the unroll, ≥ 1.
        unroll_mode, ctxt_window_time: as in `jepa.unroll`; a recurrent predictor needs "autoregressive".
        precision: "bf16" checks encoder and predictor in bf16 autocast, with losses outside it; "keep" checks them as
            they are: with an autocast of their own, or in the one in force now.
        backend: of `fastjepa.accelerate`, for a model that is not accelerated yet.
        verbose: print the result.

    Raises:
        TypeError: a video that is not a floating-point tensor.
        ValueError: a video of another rank or on another device; one that the plain model cannot be unrolled on, or
            whose losses are not finite; a model that cannot be copied, or is in float64, or has dropout in train mode,
            whose random numbers differ between precisions; `steps` < 1; an unknown precision; a backend beside an
            accelerated model. Whatever `accelerate` raises.
        RuntimeError: there is no memory for float64. Whatever the accelerated model raises is raised.
    """
    if precision not in ("keep", "bf16"):
        raise ValueError(f"precision must be one of keep, bf16; got {precision!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    accelerated = getattr(jepa, "acceleration", None) is not None
    if accelerated and backend != "auto":
        raise ValueError(f"this JEPA is accelerated already, and is verified as it is; backend={backend!r} has no use")
    weight = _checked_weight(jepa, video)
    if unroll_mode == "parallel" and video.shape[2] <= (context := getattr(jepa.predictor, "context_length", 0)):
        # The original unrolls nothing then, and says nothing.
        raise ValueError(f"parallel unrolling takes at least {context + 1} frames, got T = {video.shape[2]}")

    def run(model: nn.Module, rule: str, draw: int) -> Tensors:
        """Of a copy; draws are the video, and the video mirrored."""
        drawn = video.flip(-draw) if draw else video
        return _unroll(copy.deepcopy(model), drawn, actions, rule, nsteps=steps, **options)

    options = {"unroll_mode": unroll_mode, "ctxt_window_time": ctxt_window_time}
    random_state = torch.random.fork_rng(devices=[weight.device] if weight.device.type == "cuda" else [])
    with random_state, torch.enable_grad():
        try:
            plain, ours = copy.deepcopy(jepa), copy.deepcopy(jepa)
        except Exception as error:  # whatever a user's module holds: results of an earlier call, open files, ...
            raise ValueError(f"this JEPA cannot be copied, and verify works on copies: {_first_line(error)}") from error
        if accelerated:
            restore(plain)
        truth = cache(lambda draw: _checked_truth(lambda: run(plain, "float64", draw), video))
        truth(0)  # first of all: what is wrong with the video is found here, and told as such
        if not accelerated:
            accelerate(ours, backend=backend, precision=precision, verbose=False)
        if in_bf16 := precision == "bf16" or _has_autocast(ours):
            for model in (plain, ours):
                _compute_in_bf16(model)
        rows = []
        for rule in dict.fromkeys(("fp32", _rule(weight, in_bf16))):
            judged = judge_draws(truth, partial(run, plain, rule), partial(run, ours, rule), rule)
            # Call counts are exact in any precision: once is enough.
            rows += [row for row in judged if rule == "fp32" or not row.result.startswith(COUNTS)]
        if unroll_mode == "parallel" and actions is None and jepa.training:
            rows += _of_a_step(ours, video, steps, truth(0)["losses"], rows[0])
    report: Any = ours.acceleration
    found = Verification(
        rows=tuple(rows),
        what=f"video {tuple(video.shape)}, {steps} steps, {unroll_mode}, on {weight.device}"
        + ("" if jepa.training else ", in eval mode"),
        swapped=tuple(f"{swap.part}: {swap.was} → {swap.by}" for swap in report.swaps if swap.by is not None),
    )
    if verbose:
        print(found)
    return found


def _checked_truth(run: Callable[[], Tensors], video: Tensor) -> Tensors:
    shape = tuple(video.shape)
    try:
        found = run()
    except Exception as error:  # whatever code of the user's raises
        if is_out_of_memory(error):
            raise RuntimeError(
                f"there is no memory for a video of shape {shape} in float64; give fewer clips"
            ) from error
        raise ValueError(
            f"the plain model cannot be unrolled on a video of shape {shape}: {_first_line(error)}. (A model that "
            "reads actions needs actions=..., a recurrent one unroll_mode='autoregressive'.)"
        ) from error
    if not bool(torch.isfinite(found["losses"]).all()):
        raise ValueError("the losses of the plain model on this video are not finite in float64")
    return found


def _of_a_step(ours: nn.Module, video: Tensor, steps: int, truth: Tensor, losses: Judgement) -> list[Judgement]:
    """The loss of a TrainStep against the unroll's, by the bound of `losses`; nothing of a model that it does not take.

    A TrainStep composes the networks and losses itself, and must not do so for a model whose own unroll is another.
    """
    video = video.to(next(ours.parameters()).dtype).float()
    model: Any = copy.deepcopy(ours)
    _stop_autocast(model)
    model.float()
    try:
        with _plain_arithmetic(video.device):
            with torch.no_grad():
                channels = copy.deepcopy(model).encoder(video).shape[1]
            decoder, head = build_probes(dobs=video.shape[1], dstc=channels)
            decoder, head = decoder.to(video.device), head.to(video.device)
            no_digits = video.new_zeros(video.shape[0], video.shape[2], DetHead.CELLS, DetHead.CELLS)
            found = TrainStep(model, decoder, head, steps=steps).losses(video, no_digits).jepa
    except Exception:  # whatever a model of another structure, or its TrainStep, raises
        return []
    error = relative_error(found, truth[0], float(torch.linalg.vector_norm(truth)))
    return [replace(losses, result="loss of a TrainStep", ours=error)]


def _unroll(model: Any, video: Tensor, actions: Tensor | None, rule: str, **options: Any) -> Tensors:
    """The results of one unroll, forward and backward, of a model that may be changed."""
    dtype = next(model.parameters()).dtype
    video = video.to(dtype)  # rounded as for the model, for all alike
    if plain := rule in ("fp32", "float64"):
        dtype = torch.float64 if rule == "float64" else torch.float32
        _stop_autocast(model)
        model.to(dtype)
    if actions is not None and actions.is_floating_point():
        actions = actions.to(dtype)
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    with _plain_arithmetic(video.device) if plain else contextlib.nullcontext():
        _, losses = model.unroll(video.to(dtype), actions, compute_loss=True, **options)
    with torch.autocast(video.device.type, enabled=False):
        losses[0].backward()
    return unroll_results(model, losses)


def _rule(weight: Tensor, in_bf16: bool) -> str:
    """The arithmetic in which the model would compute if it were called now."""
    kind = weight.device.type
    if in_bf16:
        return "bf16"
    if torch.is_autocast_enabled(kind):
        return _DTYPES[torch.get_autocast_dtype(kind)]
    return ambient_precision(weight.device) if weight.dtype == torch.float32 else _DTYPES[weight.dtype]


@contextlib.contextmanager
def _plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Without autocast and TF32."""
    with torch.autocast(device.type, enabled=False), tf32_products(device, False):
        yield


def _has_autocast(jepa: nn.Module) -> bool:
    """Whether a network has an autocast of its own, as `accelerate(jepa, precision="bf16")` gives it."""
    return any(isinstance(m, InBf16) or getattr(m, "autocast_dtype", None) is not None for m in jepa.modules())


def _stop_autocast(jepa: nn.Module) -> None:
    """In a copy: networks compute in the precision of their weights."""
    for name, module in list(jepa.named_modules()):
        if isinstance(module, InBf16):
            module._eager[0].training = module.training
            put(jepa, name, module._eager[0])
        elif getattr(module, "autocast_dtype", None) is not None:
            module.autocast_dtype = None


def _compute_in_bf16(jepa: nn.Module) -> None:
    """In a copy: networks compute in bf16 autocast, as `accelerate` does it."""
    for name in NETWORKS:
        network = jepa.get_submodule(name)
        if not _has_autocast(network):
            put(jepa, name, InBf16(network))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _checked_weight(jepa: nn.Module, video: Tensor) -> Tensor:
    """One of the model's weights; raises TypeError or ValueError if model or video cannot be verified."""
    check_parts(jepa, PARTS["train"])
    weight = next(p for p in jepa.parameters() if p.is_floating_point())
    if weight.dtype not in _DTYPES:
        raise ValueError(f"verify takes fp32, bf16 or fp16 models, got {weight.dtype}; truth is computed in float64")
    for name, module in jepa.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(f"{name} is dropout in train mode, which is random; verify with jepa.{name}.eval()")
    if not isinstance(video, Tensor) or not video.is_floating_point():
        found = video.dtype if isinstance(video, Tensor) else type(video).__name__
        raise TypeError(f"video must be a floating-point tensor in [0, 1], got {found}; divide uint8 video by 255")
    if video.dim() != 5:
        raise ValueError(f"video must be (B, C, T, H, W), got shape {tuple(video.shape)}")
    if video.device != weight.device:
        raise ValueError(f"video is on {video.device}, the model on {weight.device}; move it with video.to(...)")
    return weight
