"""Traces every op as torch.compile with dynamic sizes does on a GPU, without one; prints the launches as JSON.

A program of its own (`test_symbolic_sizes` runs it), because kernels must not be interpreted and because two things are
replaced: the check that kernels can run, as fake CPU tensors stand for CUDA ones, and Triton's driver, which is asked
only which architecture to compile for.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import triton
from functorch.compile import aot_function, make_boxed_func
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from triton.backends.compiler import GPUTarget

from fastjepa.kernels import checks
from fastjepa.kernels.batch_norm.forward import batch_norm_forward
from fastjepa.kernels.batch_norm.statistics import batch_norm_statistics
from fastjepa.kernels.convolution.fused import convolution
from fastjepa.kernels.projected_losses.fused import projected_losses

EPS = 1e-5


def launches(function: Callable[..., Any], tensors: list[Tensor]) -> list[dict[str, Any]]:
    """Of the forward and the backward graph: the sizes and constants of each launch, and the arguments it writes.

    Sizes that stay symbols are given as "symbol".
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    inputs = [mode.from_tensor(x) for x in tensors]
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    with mode:
        results = aot_function(function, fw_compiler=compiler, bw_compiler=compiler, dynamic=True)(*inputs)
        results = [r for r in results if r.requires_grad]
        if results:
            torch.autograd.grad(sum(r.sum() for r in results), [x for x in inputs if x.requires_grad])
    found = []
    for node in (node for graph in graphs for node in graph.graph.nodes):
        if "triton_kernel_wrapper" in str(node.target):
            plain = {k: v for k, v in node.kwargs["kwargs"].items() if not k.endswith("_ptr")}
            sizes = {k: v if isinstance(v, (bool, int, float, str)) else "symbol" for k, v in plain.items()}
            found.append({**sizes, "writes": sorted(node.kwargs["tensors_to_clone"])})
    return found


def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def leaf(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return empty(shape, dtype).requires_grad_()


def batch_norm(x: Tensor, residual: Tensor, *vectors: Tensor) -> list[Tensor]:
    statistics, residual_statistics, parameters = vectors[:2], vectors[2:4], vectors[4:]
    arguments = (*statistics, *parameters[:2], *residual_statistics, *parameters[2:])
    return [batch_norm_forward(x, residual, *arguments, EPS, EPS, True, True, True)]


def losses(*tensors: Tensor) -> list[Tensor]:
    z, *predictions = tensors[:-5]
    return list(projected_losses(z, predictions, *tensors[-5:], EPS)[:3])


def convolve(x: Tensor, weight: Tensor, shortcut: Tensor, bias: Tensor) -> list[Tensor]:
    return [convolution([x], weight, bias, shortcut=[shortcut], relu=True)]


def main() -> None:
    warnings.simplefilter("ignore")
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    triton.runtime.driver.set_active(driver)
    checks.unavailable_reason = lambda device: None
    found = {}
    for n_rows, n_channels in ((301, 6), (4001, 33), (2_000_001, 200)):
        name, rows, vectors = f"{n_rows}x{n_channels}", (n_rows, n_channels), [(n_channels,)] * 4
        found[f"statistics {name}"] = launches(lambda x: list(batch_norm_statistics(x)), [empty(rows)])
        buffers = [empty((n_channels,)), empty((n_channels,)), torch.zeros((), dtype=torch.int64)]
        found[f"moving {name}"] = launches(
            lambda x, *buffers: list(batch_norm_statistics(x, *buffers, 0.1)), [empty(rows), *buffers]
        )
        tensors = [*(leaf(s) for s in (rows, rows)), *map(empty, vectors), *map(leaf, vectors)]
        found[f"batch_norm {name}"] = launches(batch_norm, tensors)
    shapes = ((3, 16, 5, 7), (9 * 16 + 33, 24), (3, 33, 5, 7), (24,))
    found["convolution"] = launches(convolve, [*map(empty, shapes)])
    parameters = [leaf(s) for s in ((64, 16), (64,), (64,), (64,), (64, 64))]
    found["losses"] = launches(losses, [*(leaf((4001, 16), torch.bfloat16) for _ in range(4)), *parameters])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
