"""The function to call: the projected losses as fused Triton kernels. The package has the maths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastjepa.kernels.checks import check_tensor, require_available
from fastjepa.kernels.launch import kernel_op
from fastjepa.kernels.projected_losses.activations import MAX_D, MAX_HIDDEN, block_sizes
from fastjepa.kernels.projected_losses.algebra import ProjectorParameters
from fastjepa.kernels.projected_losses.reference import ProjectedLosses, as_rows, check_shapes
from fastjepa.kernels.projected_losses.stages import Kept, backward_stages, forward_stages
from fastjepa.kernels.shares import Shares, refuse_compiled

_OP = "projected_losses"
_DTYPES = (torch.float32, torch.bfloat16)


def _forward_fake(
    z: Tensor,
    predictions: list[Tensor],
    weight1: Tensor,
    bias1: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    weight2: Tensor,
    eps: float,
) -> list[Tensor]:
    (hidden, channels), n_out, n_tensors = weight1.shape, weight2.shape[0], 1 + len(predictions)
    block_d, size_h = block_sizes(channels, hidden)
    narrow, wide = torch.float32, torch.float64
    results = ProjectedLosses(
        *(z.new_empty(shape, dtype=narrow) for shape in ((), (), (n_tensors - 1,), *[(n_tensors, hidden)] * 2))
    )
    kept = Kept(
        mean=z.new_empty((n_tensors, channels), dtype=wide),
        inv_std=z.new_empty((n_tensors, hidden), dtype=wide),
        weight1_scatter=z.new_empty((n_tensors, hidden, channels), dtype=wide),
        wide_weight2=z.new_empty((n_out, hidden), dtype=wide),
        centre=z.new_empty((n_tensors, 2, block_d), dtype=narrow),
        slope=z.new_empty((n_tensors, 2, block_d, size_h)),
        offset=z.new_empty((n_tensors, size_h), dtype=narrow),
        mean_r=z.new_empty((size_h,), dtype=narrow),
        covariance=z.new_empty((n_out, n_out), dtype=wide),
        projected=z.new_empty((n_tensors, n_out, hidden), dtype=wide),
    )
    return [*results, *kept]


@kernel_op("fastjepa::projected_losses", _forward_fake)
def _forward(
    z: Tensor,
    predictions: list[Tensor],
    weight1: Tensor,
    bias1: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    weight2: Tensor,
    eps: float,
) -> list[Tensor]:
    """Rows (N, D) in; the fields of `ProjectedLosses`, then those of `Kept`, which the backward op needs."""
    params = ProjectorParameters(weight1, bias1, bn_weight, bn_bias, weight2)
    results, kept = forward_stages([z, *predictions], params, eps)
    return [*results, *kept]


def _backward_fake(
    grad_std: Tensor | None,
    grad_cov: Tensor | None,
    grad_prediction: Tensor | None,
    z: Tensor,
    predictions: list[Tensor],
    *params_kept: Any,
) -> list[Tensor]:
    params = params_kept[: len(ProjectorParameters._fields)]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*params, z, *predictions)]


@kernel_op("fastjepa::projected_losses_backward", _backward_fake)
def _backward(
    grad_std: Tensor | None,
    grad_cov: Tensor | None,
    grad_prediction: Tensor | None,
    z: Tensor,
    predictions: list[Tensor],
    weight1: Tensor,
    bias1: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    weight2: Tensor,
    kept: list[Tensor],
) -> list[Tensor]:
    """Gradients of `ProjectorParameters`, of z and of each prediction, in their dtypes; `kept` are `Kept`."""
    params = ProjectorParameters(weight1, bias1, bn_weight, bn_bias, weight2)
    grads = (grad_std, grad_cov, grad_prediction)
    grad_params, outs = backward_stages(grads, [z, *predictions], params, Kept(*kept))
    return [*grad_params, *outs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    z, predictions, *params, _eps = inputs
    ctx.n_predictions = len(predictions)
    kept = output[len(ProjectedLosses._fields) :]
    # Nothing flows through the batch statistics, nor through what is kept: no zeros are made for them.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, *predictions, *ProjectorParameters(*params), *Kept(*kept))


def _autograd_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    n_predictions, n_params = ctx.n_predictions, len(ProjectorParameters._fields)
    z, *rest = ctx.saved_tensors
    predictions, rest = rest[:n_predictions], rest[n_predictions:]
    params, kept = ProjectorParameters(*rest[:n_params]), rest[n_params:]
    grad_std, grad_cov, grad_prediction, *_ = grads
    found = _backward(grad_std, grad_cov, grad_prediction, z, predictions, *params, kept)
    grad_params, grad_z, grad_predictions = (
        ProjectorParameters(*found[:n_params]),
        found[n_params],
        found[n_params + 1 :],
    )
    return (grad_z, grad_predictions, *grad_params, None)


def _no_double_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    raise RuntimeError(f"{_OP} (fused) has first derivatives only; kernels.projected_losses.reference has all")


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
_backward.register_autograd(_no_double_backward)


class _OnSeveralRanks(torch.autograd.Function):
    """The same stages, not as ops: ranks talk between them."""

    @staticmethod
    def forward(ctx: Any, shares: Shares, eps: float, *inputs: Tensor) -> tuple[Tensor, ...]:
        n_params = len(ProjectorParameters._fields)
        params, tensors = ProjectorParameters(*inputs[:n_params]), inputs[n_params:]
        results, kept = forward_stages(tensors, params, eps, shares)
        ctx.shares, ctx.n_tensors = shares, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(results.batch_means, results.batch_vars)
        ctx.save_for_backward(*tensors, *params, *kept)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, rest = ctx.saved_tensors[: ctx.n_tensors], ctx.saved_tensors[ctx.n_tensors :]
        n_params = len(ProjectorParameters._fields)
        params, kept = ProjectorParameters(*rest[:n_params]), Kept(*rest[n_params:])
        grad_std, grad_cov, grad_prediction, *_ = grads
        losses = (grad_std, grad_cov, grad_prediction)
        grad_params, grad_tensors = backward_stages(losses, tensors, params, kept, ctx.shares)
        return (None, None, *(ctx.shares.once(grad) for grad in grad_params), *grad_tensors)


def projected_losses(
    z: Tensor,
    predictions: Sequence[Tensor],
    weight1: Tensor,
    bias1: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    weight2: Tensor,
    eps: float,
    shares: Shares | None = None,
) -> ProjectedLosses:
    """std_loss and cov_loss of P(z), and the mean squared difference of P(z) and each P(prediction), fused.

    Same function, arguments and results as `closed_form.projected_losses`; first derivatives only. Rows
    that are contiguous in memory (channels-last tensors, or rows (N, D)) are read in place; any other layout is copied
    to rows once.

    Args:
        z: (B, D, T, H, W), (B, D, H, W) or rows (N, D), fp32 or bf16, D ≤ 64, N ≥ 2 rows in all.
        predictions: K ≥ 0 tensors of z's shape and dtype.
        weight1: (hidden, D), hidden ≤ 128; parameters are fp32, or all may have z's dtype.
        bias1: (hidden,), or None for none.
        bn_weight: (hidden,), or None for ones.
        bn_bias: (hidden,), or None for zeros.
        weight2: (out, hidden), 2 ≤ out ≤ 128.
        eps: BatchNorm's eps.
        shares: as in `closed_form.projected_losses`.

    Returns:
        fp32 losses and batch statistics.

    Raises:
        RuntimeError: kernels cannot run on z's device, a second derivative is asked for, or shares under torch.compile.
        TypeError, ValueError: an argument that does not fit; the message names it.
    """
    check_tensor(_OP, "z", z, dtypes=_DTYPES)
    require_available(_OP, z.device)
    refuse_compiled(shares, _OP)
    for k, p in enumerate(predictions):
        check_tensor(_OP, f"predictions[{k}]", p, dtypes=_DTYPES, device=z.device)
    param_dtypes = tuple(dict.fromkeys((torch.float32, z.dtype)))
    check_tensor(_OP, "weight1", weight1, shape=(None, None), dtypes=param_dtypes, device=z.device)
    hidden = weight1.shape[0]
    check_tensor(_OP, "weight2", weight2, shape=(None, hidden), dtypes=param_dtypes, device=z.device)
    check_shapes(_OP, z, predictions, weight1, weight2, shares)
    for name, size, limit in (
        ("D (channels of z)", z.shape[1], MAX_D),
        ("hidden (rows of weight1)", hidden, MAX_HIDDEN),
        ("out (rows of weight2)", weight2.shape[0], MAX_HIDDEN),
    ):
        if not 1 <= size <= limit:
            raise ValueError(f"{_OP}: {name} is {size}; the fused kernels accept 1 to {limit}")
    parameters = {"weight1": weight1, "weight2": weight2}
    for name, vector, fill in (("bias1", bias1, 0.0), ("bn_weight", bn_weight, 1.0), ("bn_bias", bn_bias, 0.0)):
        if vector is None:
            vector = weight1.new_full((hidden,), fill)
        check_tensor(_OP, name, vector, shape=(hidden,), dtypes=param_dtypes, device=z.device)
        parameters[name] = vector
    # The kernels read parameters as they lie in memory.
    params = ProjectorParameters(**{name: parameter.contiguous() for name, parameter in parameters.items()})
    rows = [as_rows(x).contiguous() for x in (z, *predictions)]
    if shares is not None:
        return ProjectedLosses(*_OnSeveralRanks.apply(shares, float(eps), *params, *rows))
    found = _forward(rows[0], rows[1:], *params, float(eps))
    std_loss, cov_loss, prediction_losses, batch_means, batch_vars = found[: len(ProjectedLosses._fields)]
    # Not `_replace`, which torch.compile of torch 2.11 cannot trace.
    return ProjectedLosses(std_loss, cov_loss, prediction_losses, batch_means.detach(), batch_vars.detach())
