"""The functions to call: both passes as fused Triton kernels. The package has the maths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastjepa.kernels.checks import check_tensor, require_available
from fastjepa.kernels.moments.blocks import MAX_D, n_summands, padded_size
from fastjepa.kernels.moments.centred_linear import LinearOperands, launch_centred_linear, round_operands
from fastjepa.kernels.moments.merge import merge_moments, merge_sums
from fastjepa.kernels.moments.scatter import scatter_partials

_DTYPES = (torch.float32, torch.bfloat16)


def moments(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and scatter of T tensors of rows, in one launch for every five of them and one that merges.

    Args:
        tensors: T ≥ 1 tensors (N, D) of one shape and dtype, contiguous, fp32 or bf16; N ≥ 1, D ≤ 512.

    Returns:
        mean (T, D) and scatter Σ(x−μ)(x−μ)ᵀ (T, D, D), float64.

    Raises:
        RuntimeError: kernels cannot run on the tensors' device.
        TypeError, ValueError: a tensor that is not as above; the message names it.
    """
    n_rows, n_channels = _check_rows("moments", {f"tensors[{i}]": x for i, x in enumerate(tensors)})
    partials = scatter_partials(tensors)
    rows = (n_rows, partials.rows_per_program)
    return merge_moments(partials.centre, partials.residual, partials.scatter, rows, n_channels)


def merged_moments(mean: Tensor, scatter: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The moments of all rows from those of P parts of them, each part with its own number of rows: `moments` of each.

    Args:
        mean: (P, T, D) float64, contiguous.
        scatter: (P, T, D, D) float64, contiguous, each about its own mean.
        count: (P,) float64, the rows of each part, 1 or more.

    Returns:
        mean (T, D) and scatter (T, D, D), float64. The order of the parts is the order of the sum.

    Raises:
        RuntimeError: kernels cannot run on the tensors' device.
        TypeError, ValueError: an argument that is not as above; the message names it.
    """
    op, wide = "merged_moments", (torch.float64,)
    check_tensor(op, "mean", mean, shape=(None, None, None), dtypes=wide, contiguous=True)
    n_parts, n_tensors, n_channels = mean.shape
    shape = (n_parts, n_tensors, n_channels, n_channels)
    check_tensor(op, "scatter", scatter, shape=shape, dtypes=wide, device=mean.device, contiguous=True)
    check_tensor(op, "count", count, shape=(n_parts,), dtypes=wide, device=mean.device, contiguous=True)
    require_available(op, mean.device)
    if min(n_parts, n_tensors, n_channels) < 1:
        raise ValueError(f"{op}: mean has shape {tuple(mean.shape)}; accepted: at least one part, tensor and channel")
    return merge_moments(mean.transpose(0, 1), None, scatter.transpose(0, 1), count, n_channels)


def merged_sums(parts: Tensor) -> Tensor:
    """Σ over P parts of anything that is a plain sum over rows, in their order.

    Args:
        parts: (P, ...) float64, contiguous, P ≥ 1, not empty.

    Returns:
        (...) float64.

    Raises:
        RuntimeError: kernels cannot run on the tensor's device.
        TypeError, ValueError: parts that are not as above.
    """
    check_tensor("merged_sums", "parts", parts, dtypes=(torch.float64,), contiguous=True)
    require_available("merged_sums", parts.device)
    if parts.dim() < 1 or parts.numel() == 0:
        raise ValueError(f"merged_sums: parts has shape {tuple(parts.shape)}; accepted: (P, ...), not empty")
    return merge_sums(parts.reshape(1, parts.shape[0], -1)).reshape(parts.shape[1:])


def linear_operands(mean: Tensor, constant: Tensor | None, linear: Tensor, dtype: torch.dtype) -> LinearOperands:
    """Round mean (T, D), constant (T, D; None: zeros) and linear (T, D, D), all float64, for rows of `dtype`.

    Raises TypeError or ValueError for another dtype (of rows: fp32 or bf16), or a shape that does not fit the mean.
    """
    op, wide = "linear_operands", (torch.float64,)
    if dtype not in _DTYPES:
        raise TypeError(f"{op}: dtype is {dtype}; accepted: {', '.join(map(str, _DTYPES))}")
    check_tensor(op, "mean", mean, shape=(None, None), dtypes=wide)
    n_tensors, n_channels = mean.shape
    if constant is not None:
        check_tensor(op, "constant", constant, shape=(n_tensors, n_channels), dtypes=wide, device=mean.device)
    check_tensor(op, "linear", linear, shape=(n_tensors, n_channels, n_channels), dtypes=wide, device=mean.device)
    return round_operands(mean, constant, linear, dtype)


def subtract_centred_linear(x: Tensor, operands: LinearOperands, t: int, base: Tensor | None, out: Tensor) -> Tensor:
    """out ← base − constant − linear·(x − mean) for the rows of tensor t; returns `out`. Launches a kernel.

    Args:
        x: (N, D), contiguous, in the dtype for which the operands were rounded.
        operands: of T tensors of D channels.
        t: which of them x is.
        base: (N, D), contiguous, fp32 or bf16; None: zeros.
        out: (N, D), contiguous, fp32 or bf16; it may be `base`.

    Raises:
        RuntimeError: kernels cannot run on x's device.
        TypeError, ValueError: an argument that is not as above; the message names it.
    """
    op = "subtract_centred_linear"
    n_rows, n_channels = _check_rows(op, {"x": x})
    size, n_tensors = padded_size(n_channels), operands.centre.shape[0]
    for name, shape, dtype in (
        ("centre", (n_tensors, size), torch.float32),
        ("constant", (n_tensors, size), torch.float32),
        ("linear", (n_tensors, n_summands(x.dtype), size, size), x.dtype),
    ):
        operand = getattr(operands, name)
        check_tensor(op, f"operands.{name}", operand, shape=shape, dtypes=(dtype,), device=x.device, contiguous=True)
    if not 0 <= t < n_tensors:
        raise ValueError(f"{op}: t is {t}; accepted: 0 to {n_tensors - 1}, the tensors of the operands")
    for name, tensor in (("base", base), ("out", out)):
        if tensor is not None:
            rows = (n_rows, n_channels)
            check_tensor(op, name, tensor, shape=rows, dtypes=_DTYPES, device=x.device, contiguous=True)
    of_x = LinearOperands(*(operand[t : t + 1] for operand in operands))
    launch_centred_linear([x], of_x, None if base is None else [base], [out])
    return out


def _check_rows(op: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """(n_rows, n_channels) of each of the tensors; an error names one that is not as the first."""
    if not tensors:
        raise ValueError(f"{op}: no tensors were given; accepted: at least one")
    (first_name, first), *others = tensors.items()
    check_tensor(op, first_name, first, shape=(None, None), dtypes=_DTYPES, contiguous=True)
    for name, x in others:
        shape = tuple(first.shape)
        check_tensor(op, name, x, shape=shape, dtypes=(first.dtype,), device=first.device, contiguous=True)
    require_available(op, first.device)
    n_rows, n_channels = first.shape
    if n_rows < 1 or not 1 <= n_channels <= MAX_D:
        raise ValueError(
            f"{op}: rows have shape {(n_rows, n_channels)}; accepted: 1 row or more of 1 to {MAX_D} channels"
        )
    return n_rows, n_channels
