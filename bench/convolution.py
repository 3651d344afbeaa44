"""`python -m bench convolution`: every convolution of inference, with all that surrounds it, one launch each.

The layers are those of the networks with BatchNorm folded (`fastjepa.kernels.convolution.recipe`): a step of a rollout
of B clips, and the encoder on their frames. Peers are cuDNN's convolutions with folded weights too, the bias inside
them, addition and ReLU in place; what stands side by side in the channels is concatenated for them before, untimed,
while the kernels read it where it lies. Times are those of the device with a cold L2, as in other suites; in a rollout
the maps of one clip are still in it, and launches follow each other in a graph (`python -m bench rollout`).

`--estimate` measures nothing: it adds up what a rollout's launches are expected to take (`convolution_estimate.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import suite
from bench.harness import variants as ways
from bench.harness.case import Case, Work
from bench.harness.variants import COMPILE_MAX, Computation, Tensors, Variant, always, needs_cuda, needs_kernels
from bench.recipe import Recipe
from fastjepa.kernels.convolution import weights
from fastjepa.kernels.convolution.layer import DTYPES, Layer
from fastjepa.kernels.convolution.recipe import PIXELS, encoder_layers, predictor_layers

EAGER, EAGER_BF16 = "eager", "eager bf16"
BATCHES = (1, 8, 64)
# One of each form, for smoke runs: two sources, a strided shortcut, a transposed one, a head, an image.
_FEW = ("predictor.conv1", "predictor.enc2.conv2", "predictor.up1", "predictor.dec1.conv2", "encoder.conv1")
_QUICK_PIXELS = 16


def layers_of(batch: int, pixels: int = PIXELS, frames: int = Recipe().frames) -> dict[str, Layer]:
    """The layers of a rollout step of `batch` clips, and of the encoder on all their frames."""
    predictor, encoder = predictor_layers(batch, pixels=pixels), encoder_layers(batch * frames, pixels=pixels)
    return {f"predictor.{name}": layer for name, layer in predictor.items()} | {
        f"encoder.{name}": layer for name, layer in encoder.items()
    }


def odd_layers() -> dict[str, Layer]:
    """Small layers in which nothing divides anything, one for each thing that a launch can do."""
    plain = Layer((7, 7), 6, 3, 9, 11)
    return {
        "two sources": plain,
        "strided": replace(plain, sources=(6,), out=12, stride=2),
        "shortcut": replace(plain, sources=(12,), out=12, shortcut=(6,), shortcut_stride=2),
        "residual": replace(plain, sources=(5,), out=5, residual=True),
        "head": replace(plain, sources=(6,), shortcut=(6, 6), head=7),
        "1x1": replace(plain, sources=(6,), out=7, kernel_size=1),
        "image": replace(plain, sources=(1,), out=5),
        "transposed": replace(plain, sources=(12,), kernel_size=2),
    }


def make_inputs(layer: Layer, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Maps (N, C, H, W) and kernels as torch takes them; two sources are one map here. Biases are fp32, and exact in
    bf16, so that all dtypes have the same. Drawn on the device: they are large.
    """
    generator = torch.Generator(device).manual_seed(2025)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

    def bias(channels: int) -> Tensor:
        return torch.randn(channels, generator=generator, device=device).bfloat16().float()

    N, C, k = layer.frames, sum(layer.sources), layer.kernel_size
    scale = (layer.rows) ** -0.5
    inputs = {"x": normal(N, C, layer.height, layer.width), "bias": bias(layer.out)}
    if layer.is_transposed:
        return inputs | {"kernel": normal(C, layer.out, 2, 2, scale=scale)}
    inputs["kernel"] = normal(layer.out, C, k, k, scale=scale)
    if layer.shortcut:
        S, stride = sum(layer.shortcut), layer.shortcut_stride
        inputs["shortcut"] = normal(N, S, stride * layer.out_height, stride * layer.out_width)
        inputs["shortcut_kernel"] = normal(layer.out, S, 1, 1, scale=scale)
    if layer.residual:
        inputs["residual"] = normal(N, layer.out, layer.out_height, layer.out_width)
    if layer.head:
        inputs["head_kernel"] = normal(layer.head, layer.out, 1, 1, scale=layer.out**-0.5)
        inputs["head_bias"] = bias(layer.head)
    return inputs


def as_cudnn_takes(inputs: Tensors) -> Tensors:
    """Channels-last, biases in the dtype of the kernels."""
    laid = ways.channels_last(inputs)
    return {name: x.to(laid["kernel"].dtype) if name.endswith("bias") else x for name, x in laid.items()}


def as_kernels_take(layer: Layer, inputs: Tensors) -> Tensors:
    """Channels-last, each source by itself, weights packed."""
    given = {name: x for name, x in inputs.items() if name.endswith("bias") or name == "residual"}
    for name, channels in (("x", layer.sources), ("shortcut", layer.shortcut)):
        if channels:
            given |= {f"{name}{place}": x for place, x in enumerate(inputs[name].split(channels, dim=1))}
    if layer.is_transposed:
        given["weight"] = weights.pack_transposed(inputs["kernel"])
    else:
        given["weight"] = weights.pack(inputs["kernel"], inputs.get("shortcut_kernel"))
    if layer.head:
        given["head_weight"] = weights.pack_head(inputs["head_kernel"])
    return ways.channels_last(given)


def compute_eager(layer: Layer, inputs: Tensors) -> Tensors:
    """{"out"} by torch."""
    x, kernel, bias = inputs["x"], inputs["kernel"], inputs["bias"]
    if layer.is_transposed:
        return {"out": F.conv_transpose2d(x, kernel, bias, stride=2)}
    out = F.conv2d(x, kernel, bias, stride=layer.stride, padding=layer.kernel_size // 2)
    if layer.shortcut:
        out += F.conv2d(inputs["shortcut"], inputs["shortcut_kernel"], stride=layer.shortcut_stride)
    if layer.residual:
        out += inputs["residual"]
    out = F.relu_(out)
    return {"out": F.conv2d(out, inputs["head_kernel"], inputs["head_bias"]) if layer.head else out}


def compute_fused(layer: Layer, inputs: Tensors) -> Tensors:
    """The same by one kernel, from what `as_kernels_take` makes."""
    from fastjepa.kernels.convolution import fused

    weight, bias = inputs["weight"], inputs["bias"]
    if layer.is_transposed:
        return {"out": fused.transposed_convolution(inputs["x0"], weight, bias)}
    out = fused.convolution(
        _maps(inputs, "x"), weight, bias, kernel_size=layer.kernel_size, stride=layer.stride,
        shortcut=_maps(inputs, "shortcut"), shortcut_stride=layer.shortcut_stride, residual=inputs.get("residual"),
        relu=True, head=(inputs["head_weight"], inputs["head_bias"]) if layer.head else None,
    )  # fmt: skip
    return {"out": out}


def _maps(inputs: Tensors, name: str) -> list[Tensor]:
    return [inputs[f"{name}{place}"] for place in range(2) if f"{name}{place}" in inputs]


def bound(function: Computation, device: torch.device) -> Computation:
    """`function` (module-level, so that a variant can be sent to another process)."""
    return function


def build_compiled(layer: Layer, device: torch.device) -> Computation:
    """torch.compile of the eager one."""
    compiled: Computation = torch.compile(
        partial(compute_eager, layer), mode=COMPILE_MAX, fullgraph=True, dynamic=False
    )
    return compiled


def work(layer: Layer, phase: str, dtype: torch.dtype) -> Work:
    """Every tensor once."""
    of_dtype = next(replace(layer, precision=name) for name, found in DTYPES.items() if found == dtype)
    return Work(of_dtype.bytes_moved, of_dtype.flops)


def make_case(name: str, layer: Layer) -> Case:
    """The case of one layer."""
    return Case(
        suite="convolution",
        name=name,
        make_inputs=partial(make_inputs, layer),
        truth=partial(compute_eager, layer),
        work=partial(work, layer),
        baseline=EAGER,
        eager={"fp32": EAGER, "bf16": EAGER_BF16},
    )


def make_variants(layer: Layer) -> list[Variant]:
    """Eager, compiled and fused."""
    bf16 = ("bf16", torch.bfloat16)
    eager, fused = partial(bound, partial(compute_eager, layer)), partial(bound, partial(compute_fused, layer))
    packed = partial(as_kernels_take, layer)
    peer = "BatchNorm folded, channels-last, one source"
    return [
        Variant(EAGER, eager, given="BatchNorm folded, one source"),
        Variant(EAGER_BF16, eager, *bf16, always, as_cudnn_takes, given=peer),
        Variant(
            "torch.compile(max-autotune) bf16", partial(build_compiled, layer), *bf16, needs_cuda, as_cudnn_takes,
            given=f"{peer}, one FX graph",
        ),
        Variant("fused", fused, available=needs_kernels, prepare=packed),
        Variant("fused bf16", fused, *bf16, needs_kernels, packed),
    ]  # fmt: skip


def plans(batches: Sequence[int], quick: bool = False) -> Iterator[tuple[Case, list[Variant]]]:
    """Every layer at every batch size; in a smoke run a few small ones."""
    for batch in batches:
        layers = layers_of(batch, _QUICK_PIXELS, frames=2) if quick else layers_of(batch)
        for name in _FEW if quick else layers:
            yield make_case(f"{name} B={batch}{' (quick)' if quick else ''}", layers[name]), make_variants(layers[name])


def odd_plans() -> Iterator[tuple[Case, list[Variant]]]:
    """Small odd sizes, to be checked and not timed."""
    for name, layer in odd_layers().items():
        yield make_case(name, layer), make_variants(layer)


def main(argv: Sequence[str]) -> int:
    """The command line; not 0 if a variant failed, or, with --estimate, if there is none."""
    parser = suite.make_parser("convolution", __doc__ or "")
    parser.add_argument("--batch", type=int, nargs="+", help="clips; default: 1 8 64 on a GPU, 1 on a CPU")
    parser.add_argument(
        "--estimate", action="store_true", help="what a rollout's launches are expected to take, measuring nothing"
    )
    args = parser.parse_args(argv)
    if args.batch and min(args.batch) < 1:
        parser.error(f"--batch must be at least 1, got {min(args.batch)}")
    if args.estimate:
        from bench import convolution_estimate

        return convolution_estimate.run(argv, args.batch or BATCHES, args.out)
    options = suite.resolve("convolution", parser, args, argv)
    full = options.device.type == "cuda" and not options.quick
    return suite.run(options, parser, plans(args.batch or (BATCHES if full else BATCHES[:1]), options.quick))
