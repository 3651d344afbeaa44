"""Variance–covariance loss of rows that are already projected, fused: (std_loss, cov_loss) from one pass over f.

    f (N, D) rows, D ≤ 512;  cov = f_cᵀ f_c / (N − 1)

Backward is one linear map of the centred rows: df = (f − mean)·2G/(N − 1), with G the gradient with respect to cov.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastjepa.kernels.launch import check_tensor, kernel_op, require_available
from fastjepa.kernels.moments.fused import MAX_D, linear_operands, moments, subtract_centred_linear
from fastjepa.kernels.projected_losses import algebra

_OP = "vc_loss"
_DTYPES = (torch.float32, torch.bfloat16)


def _forward_fake(f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d = f.shape[1]
    return (
        f.new_empty((), dtype=torch.float32),
        f.new_empty((), dtype=torch.float32),
        f.new_empty((d,), dtype=torch.float64),
        f.new_empty((d, d), dtype=torch.float64),
    )


@kernel_op("fastjepa::vc_loss", _forward_fake)
def _forward(f: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """std_loss and cov_loss, and what backward needs: mean (D,) and covariance (D, D) of f in float64."""
    mean, scatter = moments([f])
    cov = scatter[0] / (f.shape[0] - 1)
    std_loss, cov_loss = algebra.vc_from_covariance(cov)
    return std_loss.float(), cov_loss.float(), mean[0].clone(), cov.contiguous()


def _backward_fake(grad_std: Tensor, grad_cov: Tensor, f: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    return torch.empty_like(f)


@kernel_op("fastjepa::vc_loss_backward", _backward_fake)
def _backward(grad_std: Tensor, grad_cov: Tensor, f: Tensor, mean: Tensor, cov: Tensor) -> Tensor:
    gradient = algebra.vc_covariance_gradient(cov, grad_std.double(), grad_cov.double())
    linear = (gradient * (-2.0 / (f.shape[0] - 1))).unsqueeze(0)
    operands = linear_operands(mean.unsqueeze(0), None, linear, f.dtype)
    return subtract_centred_linear(f, operands, 0, None, torch.empty_like(f))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], *output[2:])


def _autograd_backward(ctx: Any, grad_std: Tensor, grad_cov: Tensor, *unused: Any) -> Tensor:
    return _backward(grad_std, grad_cov, *ctx.saved_tensors)


def _no_double_backward(ctx: Any, grad: Tensor) -> Any:
    raise RuntimeError(f"{_OP} (fused) has first derivatives only; kernels.projected_losses.reference.vc_loss has all")


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
_backward.register_autograd(_no_double_backward)


def vc_loss(f: Tensor) -> tuple[Tensor, Tensor]:
    """(std_loss, cov_loss) of rows f (N, D): mean_j relu(1 − sqrt(var_j + 1e-4)), and the mean off-diagonal cov².

    Args:
        f: (N, D), fp32 or bf16, N ≥ 2, 2 ≤ D ≤ 512; copied once if it is not contiguous.

    Returns:
        Two fp32 scalars, differentiable once.

    Raises:
        RuntimeError: kernels cannot run on f's device, or a second derivative is asked for.
        TypeError, ValueError: f does not fit.
    """
    check_tensor(_OP, "f", f, shape=(None, None), dtypes=_DTYPES)
    require_available(_OP, f.device)
    if f.shape[0] < 2 or not 2 <= f.shape[1] <= MAX_D:
        raise ValueError(f"{_OP}: f has shape {tuple(f.shape)}; accepted: (N ≥ 2, 2 ≤ D ≤ {MAX_D})")
    std_loss, cov_loss, _mean, _cov = _forward(f.contiguous())
    return std_loss, cov_loss
