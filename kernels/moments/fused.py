"""The functions to call: both passes as fused Triton kernels. The package has the maths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastjepa.kernels.checks import check_tensor, require_available
from fastjepa.kernels.moments.blocks import MAX_D, n_summands, padded_size
from fastjepa.kernels.moments.centred_linear import LinearOperands, launch_centred_linear, round_operands
from fastjepa.kernels.moments.scatter import scatter_partials

_DTYPES = (torch.float32, torch.bfloat16)


def moments(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and scatter of T tensors of rows; launches T kernels.

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
    # In float64: the partials are about different centres, which the exact formula combines.
    counts, offset = partials.counts, partials.residual.double() / partials.counts
    program_mean = partials.centre.double() + offset
    mean = (counts * program_mean).sum(1) / n_rows
    apart = program_mean - mean.unsqueeze(1)
    total = partials.scatter.sum(1, dtype=torch.float64)
    total += (counts * apart).transpose(1, 2) @ apart - (counts * offset).transpose(1, 2) @ offset
    return mean[:, :n_channels], total[:, :n_channels, :n_channels]


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
    launch_centred_linear(x, operands, t, base, out)
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
