"""`fastjepa.verify(jepa, video)`: a user's own model, on a video of theirs, against the plain model in float64.

Everything happens on copies. The policy is that of tests and benchmarks (`fastjepa.policy`): errors by norms, in
fp32 in any case and in the model's own arithmetic if that is another, each beside eager's.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastjepa.execution import ambient_tf32, tf32_products
from fastjepa.fused.autocast import InBf16
from fastjepa.fused.swap import accelerate, restore
from fastjepa.model.networks import DetHead
from fastjepa.model.probes import build_probes
from fastjepa.model.step import TrainStep
from fastjepa.policy import (
    DRAWS,
    GRADIENT,
    Error,
    Judgement,
    is_out_of_memory,
    largest_errors,
    may_have_jumped,
    norm_bound,
    norm_errors,
    relative_error,
    worst,
)

Tensors = dict[str, Tensor]
Inputs = tuple[Tensor, ...]
Run = Callable[[nn.Module, Inputs, str], Tensors]
"""The results of a model (a copy, to be used up) on inputs in one arithmetic: "float64", "fp32" or the model's own."""

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_NETWORKS = ("encoder", "predictor")
_COUNTS = "call counts of "
_STEP = "loss of a TrainStep"


@dataclass(frozen=True)
class Row:
    """One result in one arithmetic: the errors of ours and of eager, ‖x − truth‖ / ‖truth‖, and what is allowed."""

    result: str
    """What it is: losses, gradients, buffers or call counts (of BatchNorm), the latter three by part of the model."""
    precision: str
    """fp32, tf32, bf16 or fp16."""
    ours: float
    eager: float
    bound: float | None
    """None where eager is itself so far off that nothing can be judged by it."""

    @property
    def exact(self) -> bool:
        """Whether the policy lets it pass."""
        return self._judgement.exact

    @property
    def _judgement(self) -> Judgement:
        return Judgement(self.result, self.ours, self.bound)


@dataclass(frozen=True)
class Verification:
    """What `verify` found, as data and, printed, as a table."""

    rows: tuple[Row, ...]
    what: str
    """The video, the unroll and the device."""
    swapped: tuple[str, ...]
    """The parts that are not the plain ones, as "encoder: ResNet5 → FusedResNet5"."""

    @property
    def passed(self) -> bool:
        """Whether the policy lets every row pass."""
        return all(row.exact for row in self.rows)

    @property
    def worst(self) -> Row:
        """The row closest to, or furthest beyond, its bound."""
        found = worst(row._judgement for row in self.rows)
        return next(row for row in self.rows if row._judgement == found)

    def __str__(self) -> str:
        wrong, unsure = sum(not row.exact for row in self.rows), sum(row.bound is None for row in self.rows)
        verdict = "passed" if not wrong else f"NOT PASSED: {wrong} of {len(self.rows)} results"
        if wrong:
            verdict += (
                " too far off" if wrong > unsure else " cannot be judged by eager; give more clips, or larger ones"
            )
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
        TypeError: a video or actions that are no tensor, or a video that is not floating point.
        ValueError: a video of another rank, on another device, empty or not finite; one that the plain model cannot be
            unrolled on, or a model that cannot be copied, with the reason; `steps` < 1; an unknown precision; a float64
            model, which is the truth itself; dropout in train mode, whose random numbers differ between precisions; a
            backend beside an accelerated model. Whatever `accelerate` raises.
        RuntimeError: there is no memory for float64. Whatever the accelerated model raises is raised.
    """
    if precision not in ("keep", "bf16"):
        raise ValueError(f"precision must be one of keep, bf16; got {precision!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    accelerated = getattr(jepa, "acceleration", None) is not None
    if accelerated and backend != "auto":
        raise ValueError(f"this JEPA is accelerated already, and is verified as it is; backend={backend!r} has no use")
    weight = _check_model(jepa)
    _check_video(video, weight)
    if unroll_mode == "parallel" and video.shape[2] <= (context := getattr(jepa.predictor, "context_length", 0)):
        # The original unrolls nothing then, and says nothing.
        raise ValueError(f"parallel unrolling takes at least {context + 1} frames, got T = {video.shape[2]}")
    if actions is not None and not isinstance(actions, Tensor):
        raise TypeError(f"actions must be a tensor or None, got {type(actions).__name__}")
    options = {"nsteps": steps, "unroll_mode": unroll_mode, "ctxt_window_time": ctxt_window_time}
    with _random_numbers_of_its_own(weight.device), torch.enable_grad():
        plain, ours = _copy(jepa), _copy(jepa)
        if accelerated:
            restore(plain)
        inputs = (video,) if actions is None else (video, actions)
        # First of all: what is wrong with the video is found here, and told as such.
        truth = _truth(plain, inputs, lambda model, given, rule: _unroll(model, given, rule, False, options))
        if not accelerated:
            accelerate(ours, backend=backend, precision=precision, verbose=False)
        in_bf16 = precision == "bf16" or _has_autocast(ours)
        rules = list(dict.fromkeys(("fp32", _rule(weight, in_bf16))))

        def run(model: nn.Module, given: Inputs, rule: str) -> Tensors:
            return _unroll(model, given, rule, in_bf16, options)

        truths = [truth]
        rows = [row for rule in rules for row in _rows(plain, ours, inputs, run, rule, truths)]
        if unroll_mode == "parallel" and actions is None and jepa.training:
            rows += _of_a_step(ours, video, steps, truth["losses"], rows[0])
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


def _rows(plain: nn.Module, ours: nn.Module, inputs: Inputs, run: Run, rule: str, truths: list[Tensors]) -> list[Row]:
    """The policy in one arithmetic; draws are the video, and the video mirrored. `truths` are kept between calls."""
    eager: dict[str, Error] = {}
    for draw in range(DRAWS):
        drawn = (inputs[0].flip(-draw) if draw else inputs[0], *inputs[1:])
        if len(truths) == draw:
            truths.append(_truth(plain, drawn, run))
        eager = largest_errors(eager, norm_errors(run(copy.deepcopy(plain), drawn, rule), truths[draw]))
        errors = norm_errors(run(copy.deepcopy(ours), drawn, rule), truths[draw])
        rows = [
            Row(name, rule, error.relative, eager[name].relative, norm_bound(eager[name], error.dtype, rule))
            for name, error in errors.items()
            if rule == "fp32" or not name.startswith(_COUNTS)  # exact in any precision: once is enough
        ]
        if all(row.exact for row in rows) or not may_have_jumped(errors, eager, rule):
            break
    return rows


def _truth(plain: nn.Module, inputs: Inputs, run: Run) -> Tensors:
    try:
        found = run(copy.deepcopy(plain), inputs, "float64")
    except Exception as error:  # whatever code of the user's raises
        shape = tuple(inputs[0].shape)
        if is_out_of_memory(error):
            raise RuntimeError(
                f"there is no memory for a video of shape {shape} in float64; give fewer clips"
            ) from error
        raise ValueError(
            f"the plain model cannot be unrolled on a video of shape {shape}: {_first_line(error)}. (A model that "
            "reads actions needs actions=..., a recurrent one unroll_mode='autoregressive'.)"
        ) from error
    if "losses" in found and not bool(torch.isfinite(found["losses"]).all()):
        raise ValueError(
            "the plain model's own losses are not finite in float64: there is nothing to hold against them"
        )
    return found


def _of_a_step(ours: nn.Module, video: Tensor, steps: int, truth: Tensor, losses: Row) -> list[Row]:
    """The loss of a TrainStep against the unroll's, by the bound of `losses`; nothing of a model that it does not take.

    A TrainStep composes the networks and losses itself, and must not do so for a model whose own unroll is another.
    """
    video = video.to(next(ours.parameters()).dtype).float()
    model: Any = copy.deepcopy(ours).float()
    _stop_autocast(model)
    try:
        with _arithmetic(video.device, "fp32"):
            with torch.no_grad():
                channels = copy.deepcopy(model).encoder(video).shape[1]
            decoder, head = build_probes(dobs=video.shape[1], dstc=channels)
            decoder, head = decoder.to(video.device), head.to(video.device)
            no_digits = video.new_zeros(video.shape[0], video.shape[2], DetHead.CELLS, DetHead.CELLS)
            found = TrainStep(model, decoder, head, steps=steps).losses(video, no_digits).jepa
    except Exception:  # whatever a model of another structure, or its TrainStep, raises
        return []
    error = relative_error(found, truth[0], float(torch.linalg.vector_norm(truth)))
    return [Row(_STEP, "fp32", error, losses.eager, losses.bound)]


def _unroll(jepa: nn.Module, inputs: Inputs, rule: str, in_bf16: bool, options: Mapping[str, Any]) -> Tensors:
    """The results of one unroll of `jepa`, forward and backward."""
    model: Any = jepa
    video, actions = inputs[0], inputs[1] if len(inputs) > 1 else None
    dtype = next(model.parameters()).dtype
    video = video.to(dtype)  # rounded as for the model, for all alike
    if rule in ("fp32", "float64"):
        dtype = torch.float64 if rule == "float64" else torch.float32
        model = model.to(dtype)
        _stop_autocast(model)
    elif in_bf16:
        for name in _NETWORKS:
            _compute_in_bf16(getattr(model, name))
    video = video.to(dtype)
    if actions is not None and actions.is_floating_point():
        actions = actions.to(dtype)
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    with _arithmetic(video.device, rule):
        _, losses = model.unroll(video, actions, compute_loss=True, **options)
    with torch.autocast(video.device.type, enabled=False):
        losses[0].backward()
    return _results(model, losses)


def _results(model: nn.Module, losses: Any) -> Tensors:
    """The losses as one tensor, and by part of the model: gradients, buffers, and how often BatchNorm was called.

    The losses' errors are then relative to the largest: of a single number, eager's error is one draw that may be 0 by
    luck, and no measure for others.
    """
    total, weighted, unweighted, parts, prediction = losses
    told = [parts[key] for key in sorted(parts)] if isinstance(parts, Mapping) else []
    terms = [torch.as_tensor(term).detach().double().cpu() for term in (total, weighted, unweighted, prediction, *told)]
    found = {"losses": torch.stack(terms).to(total.device, total.dtype)}
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    gradients = [(name, torch.zeros_like(p) if p.grad is None else p.grad) for name, p in parameters]
    buffers = list(model.named_buffers())
    found |= _by_part(GRADIENT, gradients)
    found |= _by_part("buffers of ", [(name, buffer) for name, buffer in buffers if buffer.is_floating_point()])
    counts = [(name, buffer.double()) for name, buffer in buffers if name.endswith("num_batches_tracked")]
    return found | _by_part(_COUNTS, counts)


def _by_part(kind: str, named: list[tuple[str, Tensor]]) -> Tensors:
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        part, _, rest = name.partition(".")
        part = "projector" if rest.startswith("proj.") else part.replace("_", " ")
        parts.setdefault(part, []).append(tensor.detach().flatten())
    return {kind + part: torch.cat(tensors) for part, tensors in parts.items()}


def _rule(weight: Tensor, in_bf16: bool) -> str:
    """The arithmetic in which the model would compute if it were called now."""
    kind = weight.device.type
    if in_bf16:
        return "bf16"
    if torch.is_autocast_enabled(kind):
        return _DTYPES[torch.get_autocast_dtype(kind)]
    rule = _DTYPES[weight.dtype]
    return "tf32" if rule == "fp32" and kind == "cuda" and any(ambient_tf32()) else rule


@contextlib.contextmanager
def _arithmetic(device: torch.device, rule: str) -> Iterator[None]:
    """Without autocast and TF32 for "fp32" and "float64"; as it is now for others."""
    if rule not in ("fp32", "float64"):
        yield
        return
    with torch.autocast(device.type, enabled=False), tf32_products(device, False):
        yield


def _has_autocast(jepa: nn.Module) -> bool:
    """Whether a network has an autocast of its own, as `accelerate(jepa, precision="bf16")` gives it."""
    return any(isinstance(m, InBf16) or getattr(m, "autocast_dtype", None) is not None for m in jepa.modules())


def _stop_autocast(jepa: nn.Module) -> None:
    """In a copy: networks compute in the precision of their weights."""
    for module in jepa.modules():
        if isinstance(module, InBf16):
            module.forward = _without_autocast(module)  # type: ignore[method-assign]
        elif getattr(module, "autocast_dtype", None) is not None:
            module.autocast_dtype = None  # type: ignore[assignment]


def _without_autocast(module: InBf16) -> Callable[..., Tensor]:
    network = module._eager[0]
    network.training = module.training
    return network.forward


def _compute_in_bf16(network: nn.Module) -> None:
    """In a copy: bf16 autocast, with results in the dtype of the input, as `accelerate` does it."""
    forward = network.forward

    def in_bf16(x: Tensor, *arguments: Any) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return forward(x, *arguments).to(x.dtype)

    network.forward = in_bf16


@contextlib.contextmanager
def _random_numbers_of_its_own(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _copy(jepa: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(jepa)
    except Exception as error:  # whatever a user's module holds: results of an earlier call, open files, ...
        raise ValueError(f"this JEPA cannot be copied, and verify works on copies: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_model(jepa: nn.Module) -> Tensor:
    """One of the model's weights; raises ValueError if it is not a model that can be verified."""
    for name in (*_NETWORKS, "regularizer", "predcost"):
        if not isinstance(getattr(jepa, name, None), nn.Module):
            raise ValueError(f"jepa has no module {name!r}; verify takes a JEPA of fastjepa or eb_jepa")
    if not callable(getattr(jepa, "unroll", None)):
        raise ValueError(f"{type(jepa).__name__} has no unroll(...); verify takes a JEPA of fastjepa or eb_jepa")
    weight = next((p for p in jepa.parameters() if p.is_floating_point()), None)
    if weight is None or weight.dtype not in _DTYPES:
        found = "no weights" if weight is None else str(weight.dtype)
        raise ValueError(f"verify takes a model in fp32, bf16 or fp16, got {found}; float64 is what it is held against")
    for name, module in jepa.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(f"{name} is dropout in train mode, which is random; verify with jepa.{name}.eval()")
    return weight


def _check_video(video: Tensor, weight: Tensor) -> None:
    if not isinstance(video, Tensor):
        raise TypeError(f"video must be a tensor (B, C, T, H, W), got {type(video).__name__}")
    if not video.is_floating_point():
        raise TypeError(f"video must be floating point in [0, 1], got {video.dtype}; divide uint8 video by 255")
    if video.dim() != 5:
        raise ValueError(f"video must be (B, C, T, H, W), got shape {tuple(video.shape)}")
    if video.numel() == 0:
        raise ValueError(f"video has shape {tuple(video.shape)}: there is nothing in it")
    if video.device != weight.device:
        raise ValueError(f"video is on {video.device}, the model on {weight.device}; move it with video.to(...)")
    if not bool(torch.isfinite(video).all()):
        raise ValueError("video has values that are not finite")
