"""What the static audit compiles: every layer of the recipe as the table launches it, at one frame and at many."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

from fastjepa.kernels.convolution import gemm, split_k, stem, strip, transposed
from fastjepa.kernels.convolution.layer import DTYPES, Layer, Precision
from fastjepa.kernels.convolution.recipe import encoder_layers, predictor_layers
from fastjepa.kernels.convolution.table import Launch, choose
from fastjepa.kernels.launch import AuditCase, audit_signature

_MODULES = {"gemm": gemm, "split_k": split_k, "strip": strip, "stem": stem, "transposed": transposed}
_FP32 = ("bias_ptr", "head_bias_ptr")


def case_of(layer: Layer, launch: Launch, name: str) -> AuditCase:
    """The audit case of a layer with bias and ReLU (of a transposed convolution with a bias), launched like that."""
    module: Any = _MODULES[launch.form]
    kernel = module.KERNEL
    absent = {
        "x2_ptr": len(layer.sources) < 2,
        "shortcut_ptr": len(layer.shortcut) < 1,
        "shortcut2_ptr": len(layer.shortcut) < 2,
        "residual_ptr": not layer.residual,
        "head_weight_ptr": not layer.head,
        "head_bias_ptr": not layer.head,
    }
    absent_names = tuple(argument for argument, missing in absent.items() if missing and argument in kernel.arg_names)
    if launch.form == "transposed":
        flags = transposed.constexprs(layer, launch.launch_early)
    else:
        flags = module.constexprs(layer, True, launch.launch_early)
    in_dtype = [argument for argument in kernel.arg_names if argument.endswith("_ptr") and argument not in _FP32]
    signature = audit_signature(kernel, DTYPES[layer.precision], in_dtype, absent_names)
    sizes = _sizes(layer, launch.form)
    ones = {name: 1 for name, size in sizes.items() if size == 1}  # Triton compiles these as constants
    signature = {name: kind for name, kind in signature.items() if name not in ones}
    bytes_moved = layer.bytes_moved
    if launch.form == "stem":  # of a video, which is fp32 whatever the network computes in
        signature["x_ptr"] = "*fp32"
        pixels = layer.frames * layer.height * layer.width
        bytes_moved += pixels * sum(layer.sources) * (4 - DTYPES[layer.precision].itemsize)
    return AuditCase(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs={**dict.fromkeys(absent_names), **ones, **flags},
        config=launch.config,
        bytes_moved=bytes_moved,
        flops=layer.flops,
        divisible_by_16=tuple(name for name, size in sizes.items() if size % 16 == 0),
        expects_tensor_cores=True,
        programs=math.prod(module.grid(layer, launch.config)),
        loop_trips=_loop_trips(layer, launch),
        instructions=dict(launch.instructions),
    )


def _sizes(layer: Layer, form: str) -> dict[str, int]:
    """The integers of a launch, where a video is contiguous and a shortcut's map is as large as can be."""
    sizes = {"n_frames": layer.frames, "height": layer.height, "width": layer.width}
    if form in ("gemm", "split_k"):
        stride = layer.shortcut_stride if layer.shortcut else 0
        before = (stride * layer.out_height, stride * layer.out_width) if stride else (1, 1)
        sizes |= dict(zip(("shortcut_height", "shortcut_width"), before, strict=True))
    if form in ("gemm", "split_k", "stem"):
        sizes |= {"out_height": layer.out_height, "out_width": layer.out_width}
    if form == "stem":
        area = layer.height * layer.width
        sizes |= {
            "stride_frame": layer.sources[0] * area, "stride_channel": area, "stride_row": layer.width,
            "stride_column": 1,
        }  # fmt: skip
    return sizes


def _loop_trips(layer: Layer, launch: Launch) -> tuple[int, ...]:
    """Steps of the loop over the rows of the weights; a strip has none for the shortcut."""
    if launch.form == "stem":
        return ()
    step = launch.config.blocks["BLOCK_I"]
    sources, shortcut = (sum(-(-c // step) for c in channels) for channels in (layer.sources, layer.shortcut))
    if launch.form == "transposed":
        return (sources,)
    if launch.form == "strip":
        return (3 * sources,)
    steps = layer.kernel_size**2 * sources + shortcut
    return (-(-steps // launch.config.blocks["BLOCK_P"]) if launch.form == "split_k" else steps,)


# Channels of which nothing is a multiple: every load has a mask, and may be one number at a time.
_UNEVEN = {
    "uneven": Layer((20, 12), 100, 64, 64, 64, shortcut=(9, 5)),
    "uneven.head": Layer((40,), 40, 64, 64, 64, shortcut=(40, 40), head=16),
    "uneven.up": Layer((66,), 33, 64, 32, 32, kernel_size=2),
}


def audit_cases() -> list[AuditCase]:
    """Layers of a rollout step and of the encoder, at one clip and at 64, as each architecture launches them; and more.

    In bf16 all that are compiled to different code; in TF32 and fp32 one of each configuration; in fp16, whose
    configurations are those of bf16, one of each kernel.
    """
    cases: dict[tuple[Any, ...], AuditCase] = {}
    precisions: tuple[Precision, ...] = ("bf16", "fp16", "tf32", "fp32")
    for precision, clips, architecture in itertools.product(precisions, (1, 64), (90, 100, 80)):
        networks = {
            "predictor": predictor_layers(clips, precision),
            "encoder": encoder_layers(10 * clips, precision),
            "other": _UNEVEN if (precision, clips) == ("bf16", 64) else {},
        }
        for network, layers in networks.items():
            for name, layer in layers.items():
                launch = choose(layer, architecture)
                case = case_of(layer, launch, f"convolution/{network}.{name}/{precision}/{clips}")
                code = {"bf16": (launch.config, case.constexprs, case.signature), "fp16": ()}
                key = precision, launch.form, repr(code.get(precision, launch.config))
                known = cases.get(key)
                if known is None:
                    only = {architecture: launch.instructions[architecture]}
                    cases[key] = replace(case, instructions=only, name=_distinct(case.name, architecture, cases))
                elif architecture not in known.instructions:
                    both = {**known.instructions, architecture: launch.instructions[architecture]}
                    cases[key] = replace(known, instructions=both)
    return list(cases.values())


def _distinct(name: str, architecture: int, cases: dict[tuple[Any, ...], AuditCase]) -> str:
    """The name, with the architecture where another already launches the layer differently."""
    return f"{name}/sm_{architecture}" if any(case.name == name for case in cases.values()) else name
