"""What can be asked without Triton: whether kernels can run here at all, and whether arguments are what an op takes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable_reason(device: torch.device) -> str | None:
    """Why fused kernels cannot run on tensors of `device`, or None if they can. Imports Triton, if it is there."""
    try:
        from fastjepa.kernels.launch import INTERPRET
    except ImportError as error:
        return f"kernels need Triton, which cannot be imported here ({error})"
    if device.type == "cuda":
        if INTERPRET:
            return "TRITON_INTERPRET=1 is set, which runs kernels on the CPU; unset it to use the GPU"
        return None
    if device.type == "cpu":
        return (
            None if INTERPRET else "Triton kernels need a CUDA device (TRITON_INTERPRET=1 runs them on the CPU, slowly)"
        )
    return f"device type {device.type!r} is not supported: kernels run on 'cuda', or on 'cpu' with TRITON_INTERPRET=1"


def require_available(op: str, device: torch.device) -> None:
    """Raise RuntimeError with the reason if fused kernels cannot run on `device`."""
    reason = unavailable_reason(device)
    if reason is not None:
        raise RuntimeError(f"{op}: {reason}")


def check_tensor(
    op: str,
    name: str,
    tensor: Tensor,
    *,
    shape: tuple[int | None, ...] | None = None,
    dtypes: Iterable[torch.dtype] = FLOAT_DTYPES,
    device: torch.device | None = None,
    contiguous: bool = False,
) -> None:
    """Raise a TypeError or ValueError that names the argument if `tensor` is not what `op` accepts.

    `shape` has None where any size is accepted. `device`: the one all arguments must share. `contiguous`: in memory.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    accepted = tuple(dtypes)
    if tensor.dtype not in accepted:
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; accepted: {', '.join(map(str, accepted))}")
    if shape is not None and (
        tensor.dim() != len(shape)
        or any(want not in (None, got) for want, got in zip(shape, tensor.shape, strict=True))
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; accepted: ({wanted})")
    if device is not None and tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, but the other arguments are on {device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} has strides {tensor.stride()}; accepted: contiguous")
