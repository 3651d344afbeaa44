"""A network's parameters for one call or several: cast once, and the gradients of a call gathered in one tensor.

In bf16 autocast, eager casts every weight by a kernel of its own, casts every gradient back by another, and adds the
gradients of K calls by K − 1 kernels for each parameter. Here a multi-tensor kernel casts all weights, one for each
dtype writes the gradients of a call one after the other into one tensor in fp32, and autograd adds K tensors.

The way there: all parameters become one *token* (`_Gather`), a tensor that only stands for them; every call turns the
token into tensors to compute with (`_Spread`), which share memory with the parameters or with their casts. So the
gradient of a token is that of all parameters, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastjepa.fused.match import hooks_problem

ParameterOf = Callable[[Tensor | None], Tensor | None]

_ALIGNMENT = 64  # elements: every gradient begins at a multiple of 256 bytes, as an allocation of its own would


def own(parameter: Tensor | None) -> Tensor | None:
    """The parameter itself: a network that shares nothing."""
    return parameter


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution that can be called with other tensors in its parameters' places: it is no other
    code's subclass, and no hook waits for a call of the module.
    """
    known = type(module) in (nn.Conv2d, nn.ConvTranspose2d)
    return known and module.padding_mode == "zeros" and hooks_problem(module) is None


def share_parameters(
    network: nn.Module, device_type: str, *, callers_autocast: bool = False
) -> Callable[[], ParameterOf]:
    """The parameters of the convolutions and BatchNorms in `network`, as they are now, for calls that follow at once.

    Convolutions get theirs in the dtype of the autocast that is on for `device_type`, if it is; BatchNorms as they are.
    Nothing is shared, and every module uses its own, under torch.compile, which plans casts and sums itself; and,
    without gradients, in an autocast that the caller has opened, which keeps its casts for calls to come.

    Returns:
        To be called once for each call of the network: it gives what gives the tensor to use for a parameter. Other
        parameters stand for themselves.
    """
    if torch.compiler.is_compiling() or (callers_autocast and not torch.is_grad_enabled()):
        return lambda: own
    convolutions = _parameters(module for module in network.modules() if is_plain_convolution(module))
    norms = _parameters(module for module in network.modules() if type(module) is nn.BatchNorm2d)
    parameters = [*convolutions, *norms]
    tensors = [*_cast(convolutions, device_type), *(p.detach() for p in norms)]
    layout = token = None
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        layout = _Layout(parameters)
        token = _Gather.apply(layout, *(p for p in parameters if p.requires_grad))

    def of_call() -> ParameterOf:
        spread = tensors if token is None else _Spread.apply(token, layout, tensors)
        found = {id(parameter): tensor for parameter, tensor in zip(parameters, spread, strict=True)}
        return lambda parameter: found.get(id(parameter), parameter)

    return of_call


def _parameters(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Each once, whatever holds it."""
    return list({id(p): p for module in modules for p in module.parameters(recurse=False)}.values())


@torch.no_grad()
def _cast(parameters: list[Tensor], device_type: str) -> list[Tensor]:
    """Detached, and in autocast's dtype what autocast would cast: everything but float64."""
    if not torch.is_autocast_enabled(device_type):
        return [p.detach() for p in parameters]
    dtype = torch.get_autocast_dtype(device_type)
    casts = [p.detach() if p.dtype in (dtype, torch.float64) else torch.empty_like(p, dtype=dtype) for p in parameters]
    _copy_all((cast, p) for cast, p in zip(casts, parameters, strict=True) if cast.dtype != p.dtype)
    return casts


def _copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy into the first of each pair the second; by one kernel for each dtype of these, where both of a pair lie in
    memory alike. (A multi-tensor copy of tensors of which one does not fit the others is one kernel for each.)
    """
    alike: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        strides = zip(target.shape, target.stride(), source.stride(), strict=True)
        if all(size == 1 or s == t for size, s, t in strides):
            targets, sources = alike.setdefault(source.dtype, ([], []))
            targets.append(target)
            sources.append(source.as_strided(target.shape, target.stride()))
        else:
            target.copy_(source)
    for targets, sources in alike.values():
        torch._foreach_copy_(targets, sources)


class _Layout:
    """Where the gradients of those parameters that are trained lie in one tensor: each with its parameter's strides."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.trained = [p.requires_grad for p in parameters]
        self._places = []
        self.size = 0
        for p in (p for p in parameters if p.requires_grad):
            dense = p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))
            stride = p.stride() if dense else torch.empty(p.shape, device="meta").stride()
            self._places.append((p.shape, stride, self.size))
            self.size += -(-p.numel() // _ALIGNMENT) * _ALIGNMENT
        self.dtypes = [p.dtype for p in parameters if p.requires_grad]
        self.dtype = torch.float64 if torch.float64 in self.dtypes else torch.float32

    def views(self, flat: Tensor) -> list[Tensor]:
        return [flat.as_strided(*place) for place in self._places]


class _Gather(torch.autograd.Function):
    """Parameters → the token."""

    @staticmethod
    def forward(ctx: Any, layout: _Layout, *parameters: Tensor) -> Tensor:
        ctx.layout = layout
        return torch.empty((), dtype=layout.dtype, device=parameters[0].device).expand(layout.size)

    @staticmethod
    def backward(ctx: Any, flat: Tensor) -> tuple[Tensor | None, ...]:
        layout: _Layout = ctx.layout
        return (None, *(view.to(dtype) for view, dtype in zip(layout.views(flat), layout.dtypes, strict=True)))


class _Spread(torch.autograd.Function):
    """The token → tensors for one call."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, layout: _Layout, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        ctx.layout, ctx.device = layout, token.device
        ctx.set_materialize_grads(False)
        outs = tuple(tensor.detach() for tensor in tensors)
        ctx.mark_non_differentiable(*(out for out, train in zip(outs, layout.trained, strict=True) if not train))
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        layout: _Layout = ctx.layout
        wanted = [grad for grad, train in zip(grads, layout.trained, strict=True) if train]
        empty = torch.zeros if any(grad is None for grad in wanted) else torch.empty
        flat = empty(layout.size, dtype=layout.dtype, device=ctx.device)
        _copy_all((view, grad) for view, grad in zip(layout.views(flat), wanted, strict=True) if grad is not None)
        return flat, None, None
