"""The one exactness policy: is a result exact enough for anything else about it to matter?

Truth is the eager definition in float64 on the same inputs. With err(x) = max |x − truth| and scale = max |truth|, a
result passes if

    err(result) ≤ 2 · err(eager at the same precision) + floor · scale        and, at fp32 precision,
    err(result) ≤ 1e-5 · scale.

A NaN or an infinity never passes, unless truth has the same one in the same place. Tensors may be large, so errors are
computed on the device of the result.

What goes through many layers (a whole training step, a network) is judged by norms instead: err(x) = ‖x − truth‖₂ and
scale = ‖truth‖₂. A rounding may move an activation across ReLU's zero, which changes single entries of a gradient by
far more than a rounding; the worst entry then says which activations happened to lie near zero, and two runs of eager
with another order of sums differ in it as much.

Losses and buffers follow their roundings smoothly; a gradient jumps where a rounding takes the input of one ReLU across
zero: in fp32, eager's own is then 1e-3 of its norm from float64, and 1e-6 in another draw of weights and data. So a
gradient out of bounds gets as many draws as `DRAWS`, is exact if all of it is within bounds in one, and wrong at once
if it is off by more than a few ReLUs can explain. In bf16 many ReLUs switch in every draw, and twice eager's error
would let half a gradient pass: what does not compute in plain fp32 must be exact in fp32 first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

FP32_RELATIVE_LIMIT = 1e-5

ErrorMeasure = Literal["largest entry", "norm"]
Draw = Callable[[int], Mapping[str, Tensor]]

# The floor lets a result pass where eager happens to be exact (one rounding error may be 0 by luck). It has two terms.
# (1) Sums: blocked sums of up to 2^22 terms, as both sides make them, go through at most ~32 levels; each level rounds
#     by at most u = eps/2, the roundings are independent, so they add up to about sqrt(32)·u < 6 u; twice that for the
#     two sums (a value and its mean) that every result here contains: 12 u = 6 eps of the precision in which sums are
#     kept, which is fp32 for fp32, bf16 and fp16 alike (float64 for float64).
# (2) Half precision: one rounding to that dtype, u: of the result if it is stored so, and otherwise, where an op on
#     bf16 inputs returns an fp32 scalar, of the operands that the scalar depends on most. Eager's error in such a
#     scalar is one draw from a distribution of that width, and may be far below it.
_SUM_ROUNDINGS = 6.0
_HALF = (torch.bfloat16, torch.float16)


def relative_floor(result_dtype: torch.dtype, precision: torch.dtype | None = None) -> float:
    """The policy's floor, as a fraction of the largest entry, for a result stored as `result_dtype`.

    `precision`: the dtype of the op's main inputs, by default that of the result.
    """
    sums = torch.finfo(torch.float64 if result_dtype == torch.float64 else torch.float32).eps * _SUM_ROUNDINGS
    if result_dtype in _HALF:
        return sums + torch.finfo(result_dtype).eps * 0.5
    return sums + torch.finfo(precision).eps * 0.5 if precision in _HALF else sums


def error_bound(
    eager_error: float,
    scale: float,
    result_dtype: torch.dtype,
    precision: torch.dtype | None = None,
    *,
    limit: float | None = FP32_RELATIVE_LIMIT,
) -> float:
    """The largest error that the policy lets pass, in the unit of `eager_error` and `scale`.

    `precision`: as in `relative_floor`; `limit` applies where precision is fp32, None leaves it out.
    """
    precision = result_dtype if precision is None else precision
    bound = 2.0 * eager_error + relative_floor(result_dtype, precision) * scale
    return min(bound, limit * scale) if limit is not None and precision == torch.float32 else bound


def max_error(result: Tensor, truth: Tensor) -> float:
    """max |result − truth| in float64; infinite if they differ in where they are not finite. 0 for empty tensors."""
    return _size(_difference(result, truth), "largest entry")


def largest_entry(truth: Tensor) -> float:
    """max |truth| over its finite entries, the scale of the policy; 0 if there is none."""
    return _size(_finite(truth), "largest entry")


def relative_error(
    result: Tensor, truth: Tensor, scale: float | None = None, measure: ErrorMeasure = "largest entry"
) -> float:
    """|result − truth| / scale, by default |truth|, both the largest entry or the norm; 0 where they are equal."""
    error = _size(_difference(result, truth), measure)
    scale = _size(_finite(truth), measure) if scale is None else scale
    return 0.0 if error == 0.0 else error / scale if scale else math.inf


def _difference(result: Tensor, truth: Tensor) -> Tensor | None:
    """result − truth in float64 where truth is finite; None if they differ elsewhere."""
    result, truth = result.detach().double(), truth.detach().to(result.device, torch.float64)
    finite = torch.isfinite(truth)
    if finite.all():
        return result - truth
    if not torch.equal(result[~finite].nan_to_num(nan=12345.0), truth[~finite].nan_to_num(nan=12345.0)):
        return None
    return result[finite] - truth[finite]


def _finite(truth: Tensor) -> Tensor:
    truth = truth.detach()
    finite = torch.isfinite(truth)
    return truth if finite.all() else truth[finite]


def _size(x: Tensor | None, measure: ErrorMeasure) -> float:
    """The largest absolute entry, or the norm; infinite for None or NaN, 0 if there is no entry."""
    if x is None:
        return math.inf
    if x.numel() == 0:
        return 0.0
    size = float(x.abs().max() if measure == "largest entry" else torch.linalg.vector_norm(x.double()))
    return math.inf if math.isnan(size) else size


# ---- results of several tensors, judged together ---------------------------------------------------------------------


@dataclass(frozen=True)
class Error:
    """The error of one tensor, relative to its scale, and the dtype in which it was stored."""

    relative: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Judgement:
    """One result in one precision: the relative errors of ours and of eager, and what is allowed."""

    result: str
    precision: str
    """fp32, tf32, bf16 or fp16."""
    ours: float
    eager: float
    """NaN where eager did not run."""
    bound: float | None
    """None where eager is itself so far off, or not finite, that nothing can be judged by it."""

    @property
    def exact(self) -> bool:
        """Whether the policy lets it pass."""
        return self.bound is not None and self.ours <= self.bound


def worst(judgements: Iterable[Judgement]) -> Judgement:
    """The one closest to, or furthest beyond, its bound. What cannot be judged comes after what breaks its bound."""

    def excess(one: Judgement) -> float:
        if one.bound is None:
            return math.nextafter(1.0, 2.0)
        return one.ours / one.bound if one.bound else math.inf if one.ours else 0.0

    return max(judgements, key=excess)


def relative_errors(
    results: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    scale_of: Mapping[str, str],
    truth: Mapping[str, Tensor],
    measure: ErrorMeasure = "largest entry",
) -> dict[str, Error]:
    """The error of every tensor of `expected`, which is float64, by its largest entry or by its norm.

    `scale_of` names, for one whose terms cancel, the tensor of `truth` whose scale to use in place of its own.
    Raises ValueError if a result is missing or has another shape. NaN and infinities are infinite errors, unless
    expected.
    """
    errors = {}
    for name, exact in expected.items():
        if name not in results or results[name].shape != exact.shape:
            got = tuple(results[name].shape) if name in results else "nothing"
            raise ValueError(f"result {name!r}: expected shape {tuple(exact.shape)}, got {got}")
        if exact.numel() == 0:
            continue
        scale = _size(_finite(truth[scale_of.get(name, name)]), measure)
        errors[name] = Error(relative_error(results[name], exact, scale, measure), results[name].dtype)
    return errors


def judge(errors: Mapping[str, Error], eager: Mapping[str, Error] | None, precision: str) -> Judgement:
    """The tensor closest to, or furthest beyond, its bound: one variant's errors beside those of eager at its precision
    ("fp32", "bf16", ...), or None if it did not run.

    Without eager, or where eager gives NaN, fp32 is judged by 1e-5 alone, and other precisions cannot be judged. Where
    eager itself exceeds 1e-5, that limit does not apply: the problem is conditioned worse. Where eager is so far off
    that its bound would let zeros pass, nothing can be judged by it.
    """
    return worst(_judgements(errors, eager, precision, None))


def _judgements(
    errors: Mapping[str, Error], eager: Mapping[str, Error] | None, precision: str, inputs: torch.dtype | None
) -> list[Judgement]:
    """`inputs`: the dtype of the main inputs, by default that of each result."""
    found = []
    for name, error in errors.items():
        beside = math.nan if eager is None else eager[name].relative
        found.append(Judgement(name, precision, error.relative, beside, _bound(beside, error.dtype, precision, inputs)))
    return found


def _bound(eager: float, dtype: torch.dtype, precision: str, inputs: torch.dtype | None) -> float | None:
    if not math.isfinite(eager):
        return FP32_RELATIVE_LIMIT if precision == "fp32" else None
    bound = error_bound(eager, 1.0, dtype, inputs, limit=None)
    if bound >= 1.0:
        return None
    return min(bound, FP32_RELATIVE_LIMIT) if precision == "fp32" and eager <= FP32_RELATIVE_LIMIT else bound


# ---- whole steps and networks, by norms ------------------------------------------------------------------------------

GRADIENT = "gradient of "  # how names of results begin that jump where a ReLU switches
COUNTS = "call counts of "
DRAWS = 3
JUMP = 1e-2
_INPUTS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def norm_errors(results: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, Error]:
    """`relative_errors` by norms: a whole step is judged by these."""
    return relative_errors(results, truth, {}, truth, "norm")


def judge_draws(truth: Draw, eager: Draw, ours: Draw, precision: str) -> list[Judgement]:
    """Judge every result by norms, in the first draw in which all are exact, or else in the last that was needed.

    `truth`, `eager` and `ours` give the results of a draw, which is counted from 0: in float64, and in `precision`.
    A result is held against the largest error that eager has had in it so far.
    """
    largest: dict[str, Error] = {}
    judged: list[Judgement] = []
    for draw in range(DRAWS):
        expected = truth(draw)
        for name, error in norm_errors(eager(draw), expected).items():
            largest[name] = max(largest.get(name, error), error, key=lambda e: e.relative)
        judged = _judgements(norm_errors(ours(draw), expected), largest, precision, _INPUTS.get(precision))
        if all(judgement.exact for judgement in judged) or not all(map(_may_have_jumped, judged)):
            break
    return judged


def _may_have_jumped(judgement: Judgement) -> bool:
    """Whether a result is within its bound, or a gradient beyond it by no more than ReLUs explain."""
    if judgement.bound is None or judgement.exact:
        return judgement.exact
    return judgement.result.startswith(GRADIENT) and judgement.ours <= max(JUMP, 2 * judgement.bound)


def unroll_results(model: nn.Module, losses: tuple[Any, ...]) -> dict[str, Tensor]:
    """What an unroll and its backward pass leave: the losses as one tensor, and by part of the model gradients,
    buffers, and how often BatchNorm was called.

    The losses' errors are then relative to the largest: of a single number, eager's error is one draw that may be 0 by
    luck, and no measure for others.
    """
    total, weighted, unweighted, parts, prediction = losses
    told = [parts[key] for key in sorted(parts)] if isinstance(parts, Mapping) else []
    terms = [torch.as_tensor(term).detach().double().cpu() for term in (total, weighted, unweighted, prediction, *told)]
    buffers = list(model.named_buffers())
    named = {
        GRADIENT: [
            (name, torch.zeros_like(p) if p.grad is None else p.grad)
            for name, p in model.named_parameters()
            if p.requires_grad
        ],
        "buffers of ": [(name, buffer) for name, buffer in buffers if buffer.is_floating_point()],
        COUNTS: [(name, buffer.double()) for name, buffer in buffers if name.endswith("num_batches_tracked")],
    }
    found: dict[str, list[Tensor]] = {"losses": [torch.stack(terms).to(total.device, total.dtype)]}
    for kind, tensors in named.items():
        for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
            part, _, rest = name.partition(".")
            part = "projector" if rest.startswith("proj.") else part.replace("_", " ")
            found.setdefault(kind + part, []).append(tensor.detach().flatten())
    return {result: torch.cat(pieces) for result, pieces in found.items()}


# ---- what a failed allocation says -----------------------------------------------------------------------------------

_WORDS = (
    "out of memory",
    "can't allocate memory",
    "alloc_failed",
    "alloc failed",
    # cuDNN found no memory for the workspace of any algorithm, and torch says only that none worked.
    "unable to find an engine",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU, however the library at fault spells it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
