"""The op `fastjepa::convolution`: checks its operands, chooses a launch from the table, and writes into `out`."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from fastjepa.kernels.checks import FLOAT_DTYPES, check_tensor, require_available
from fastjepa.kernels.convolution import gemm, split_k, stem, strip, transposed
from fastjepa.kernels.convolution.layer import Layer, Precision
from fastjepa.kernels.convolution.operands import Operands
from fastjepa.kernels.convolution.table import ARCHITECTURES, Launch, choose
from fastjepa.kernels.launch import kernel_op

OP = "convolution"
MOST_CHANNELS = 512  # of a source and of a result
MOST_BEFORE_HEAD = 128  # channels: one program has them all
_MOST_PIXELS = 2**31 - 2**10  # an index and a tile beyond it fit 32 bits
_FORMS = {
    "gemm": gemm.launch, "split_k": split_k.launch, "strip": strip.launch, "stem": stem.launch,
    "transposed": transposed.launch,
}  # fmt: skip
_PRECISION: dict[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def launch(operands: Operands, chosen: Launch) -> None:
    """Launch a kernel that was chosen, by the table or by someone who compares."""
    _FORMS[chosen.form](operands, replace(chosen.config, launch_pdl=chosen.launch_early))


@functools.cache
def architecture(device: torch.device) -> int:
    """The compute capability by which the table chooses: the newest that it knows and the device is not older than.

    Raises RuntimeError for a GPU that is older than all of them.
    """
    if device.type != "cuda":
        return 90  # the interpreter runs what an H100 would
    major, minor = torch.cuda.get_device_capability(device)
    known = [number for number in ARCHITECTURES if number <= 10 * major + minor]
    if not known:
        raise RuntimeError(
            f"{OP}: the GPU has compute capability {major}.{minor}; convolutions need at least "
            f"{ARCHITECTURES[0] / 10:.1f}"
        )
    return known[-1]


def _fake(*_: object) -> None:
    """Nothing is returned."""


@kernel_op("fastjepa::convolution", fake=_fake, mutates_args=("out",))
def convolution_out(
    out: Tensor,
    x: Tensor,
    x2: Tensor | None,
    shortcut: Tensor | None,
    shortcut2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    kernel_size: int,
    stride: int,
    shortcut_stride: int,
    relu: bool,
    tf32: bool,
) -> None:
    """`fused.convolution`, or with kernel size 2 `fused.transposed_convolution`, into `out`. Not differentiable.

    Raises:
        RuntimeError: the kernels cannot run on this device.
        TypeError, ValueError: an argument of another dtype, shape, layout or device; the message names it.
    """
    require_available(OP, out.device)
    operands = checked_operands(
        out, x, x2, shortcut, shortcut2, weight, bias, residual, head_weight, head_bias, kernel_size, stride,
        shortcut_stride, relu, tf32,
    )  # fmt: skip
    if out.numel():
        launch(operands, choose(operands.layer, architecture(out.device)))


def checked_operands(
    out: Tensor,
    x: Tensor,
    x2: Tensor | None,
    shortcut: Tensor | None,
    shortcut2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    kernel_size: int,
    stride: int,
    shortcut_stride: int,
    relu: bool,
    tf32: bool,
) -> Operands:
    """The arguments of the op as operands of a launch. Raises as the op does."""
    _check_choice("kernel_size", kernel_size, (1, 2, 3))
    _check_choice("stride", stride, (1, 2))
    _check_choice("shortcut_stride", shortcut_stride, (1, 2))
    if shortcut is None and shortcut2 is not None:
        raise ValueError(f"{OP}: shortcut[1] is given without shortcut[0]")
    device = out.device
    check_tensor(OP, "weight", weight, shape=(None, None), device=device, contiguous=True)
    check_tensor(OP, "sources[0]", x, shape=(None,) * 4, device=device)
    N, C1, H, W = map(int, x.shape)  # numbers, also where torch.compile has symbols: the table chooses by them
    layer = Layer(
        sources=(C1,) if x2 is None else (C1, int(x2.shape[1])),
        out=int(weight.shape[1]) // (4 if kernel_size == 2 else 1),
        frames=N, height=H, width=W, kernel_size=kernel_size, stride=stride,
        shortcut=tuple(int(s.shape[1]) for s in (shortcut, shortcut2) if s is not None),
        shortcut_stride=shortcut_stride,
        residual=residual is not None, head=0 if head_weight is None else int(head_weight.shape[1]),
        precision="tf32" if tf32 and weight.dtype == torch.float32 else _PRECISION[weight.dtype],
    )  # fmt: skip
    sizes = (layer.out_height, layer.out_width)
    taken = (torch.float32, weight.dtype) if stem.fits(layer) else (weight.dtype,)
    maps = {
        "sources[0]": (x, (N, C1, H, W), taken),
        "sources[1]": (x2, (N, None, H, W), (weight.dtype,)),
        "shortcut[0]": (shortcut, _shape_before(shortcut, N, sizes, shortcut_stride), (weight.dtype,)),
        "shortcut[1]": (shortcut2, None if shortcut is None else (N, None, *shortcut.shape[2:]), (weight.dtype,)),
        "residual": (residual, (N, layer.out, *sizes), (weight.dtype,)),
        "out": (out, (N, layer.head or layer.out, *sizes), FLOAT_DTYPES),
    }
    for name, (tensor, shape, dtypes) in maps.items():
        if tensor is None:
            continue
        check_tensor(OP, name, tensor, shape=shape, dtypes=dtypes, device=device)
        strided = name == "sources[0]" and stem.fits(layer)
        if not (strided or tensor.is_contiguous(memory_format=torch.channels_last)):
            raise ValueError(f"{OP}: {name} has strides {tensor.stride()}; accepted: channels-last in memory")
    vectors = {
        "weight": (weight, (layer.rows, layer.columns), weight.dtype),
        "bias": (bias, (layer.out,), torch.float32),
        "head[0]": (head_weight, (layer.out, None), weight.dtype),
        "head[1]": (head_bias, (layer.head,), torch.float32),
    }
    for name, (tensor, shape, dtype) in vectors.items():
        if tensor is not None:
            check_tensor(OP, name, tensor, shape=shape, dtypes=(dtype,), device=device, contiguous=True)
    _check_sizes(layer, relu)
    return Operands(
        x, x2, shortcut, shortcut2, residual, out, weight, bias, head_weight, head_bias, layer, relu
    )  # fmt: skip


def _shape_before(
    shortcut: Tensor | None, frames: int, sizes: tuple[int, int], stride: int
) -> tuple[int | None, ...] | None:
    """The shape of what a shortcut reads, of which it visits every `stride`th pixel; its size has a choice of `stride`.

    A wrong size is told as the nearest right one.
    """
    if shortcut is None or shortcut.dim() != 4:
        return (None,) * 4
    given = tuple(shortcut.shape[2:])
    fits = all(-(-size // stride) == wanted for size, wanted in zip(given, sizes, strict=True))
    return (frames, None, *(given if fits else (stride * size for size in sizes)))


def _check_choice(name: str, value: int, choices: tuple[int, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{OP}: {name} is {value}; accepted: {', '.join(map(str, choices))}")


def _check_sizes(layer: Layer, relu: bool) -> None:
    for name, counts in (("sources", layer.sources), ("shortcut", layer.shortcut), ("weight", (layer.out,))):
        if any(not 1 <= count <= MOST_CHANNELS for count in counts):
            raise ValueError(f"{OP}: {name} has {counts} channels; accepted: 1 to {MOST_CHANNELS}")
    if layer.head and not (layer.out <= MOST_BEFORE_HEAD and layer.head <= MOST_BEFORE_HEAD):
        raise ValueError(
            f"{OP}: a head from {layer.out} to {layer.head} channels; accepted: up to {MOST_BEFORE_HEAD} each"
        )
    if max(layer.pixels, layer.frames * layer.height * layer.width) > _MOST_PIXELS:
        raise ValueError(f"{OP}: {layer.pixels} pixels; accepted: up to {_MOST_PIXELS}")
    if layer.is_transposed and (len(layer.sources) > 1 or layer.shortcut or layer.residual or layer.head or relu):
        raise ValueError(f"{OP}: a transposed convolution takes one source and a bias")
