from __future__ import annotations

import ast
import importlib
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from bench.audit.command import kernel_modules
from fastjepa.environment import ROOT
from fastjepa.kernels import launch
from fastjepa.kernels.batch_norm.fused import batch_norm_act
from fastjepa.kernels.convolution import op as convolution
from fastjepa.kernels.convolution.fused import transposed_convolution
from fastjepa.kernels.convolution.table import Form, Launch
from fastjepa.kernels.frame_windows.fused import first_windows
from fastjepa.kernels.moments.fused import merged_sums, moments
from fastjepa.kernels.projected_losses.fused import projected_losses
from projector_cases import loss_and_gradients, make_case

# The tiles that a kernel may have, in their order: docs/adding-a-kernel.md has their meanings.
BLOCKS = ("BLOCK_P", "BLOCK_E", "BLOCK_N", "BLOCK_W", "BLOCK_C", "BLOCK_M", "BLOCK_D", "BLOCK_I", "BLOCK_H", "BLOCK_O")


@pytest.mark.parametrize("n_rows", [1, 63, 64, 65, 640, 641, 2_621_440, 1_474_560, 2**31 + 1])
@pytest.mark.parametrize("max_programs", [1, 7, 528])
@pytest.mark.parametrize("prefer_even", [True, False])
def test_row_split_covers_every_row_once(n_rows: int, max_programs: int, prefer_even: bool) -> None:
    split = launch.RowSplit.of(n_rows, 64, max_programs, prefer_even=prefer_even)
    rows_per_program = split.rows_per_program
    assert rows_per_program == split.tiles * 64
    assert 1 <= split.programs <= max_programs
    assert (split.programs - 1) * rows_per_program < n_rows <= split.programs * rows_per_program
    assert split.even == (split.programs * rows_per_program == n_rows)
    # Balance: no more than the fewest tiles a program could have; twice that where they then divide evenly.
    assert split.tiles <= (2 if prefer_even else 1) * -(-n_rows // (64 * max_programs))


@pytest.mark.parametrize("n_rows", [1, 63, 64, 65, 2**31 + 1])
def test_one_tile_each(n_rows: int) -> None:
    split = launch.RowSplit.one_tile_each(n_rows, 64)
    assert (split.programs, split.tiles, split.rows_per_program) == (-(-n_rows // 64), 1, 64)
    assert split.even == (n_rows % 64 == 0)


def test_row_split_of_the_default_recipe_needs_no_mask() -> None:
    for batch in (1, 8, 64):
        assert launch.RowSplit.of(batch * 10 * 64 * 64, 64, 528, prefer_even=True).even


@triton.jit
def _round_kernel(x_ptr, y_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, launch.round_to(tl.load(x_ptr + offs), tl.bfloat16).to(tl.float32))


def test_round_to_rounds_to_nearest_even(device: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, generator=g) * torch.logspace(-30, 30, 256)
    x[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 0.0, -(1 + 2**-8)])  # ties to even, zero, negative tie
    y = torch.empty_like(x, device=device)
    _round_kernel[(1,)](x.to(device), y, N=256)
    assert torch.equal(y.cpu(), x.bfloat16().float())


@triton.jit
def _add_dot_kernel(a_ptr, b_ptr, out_ptr, ORDERED: tl.constexpr):  # type: ignore[no-untyped-def]
    offs = tl.arange(0, 16)
    grid = offs[:, None] * 16 + offs[None, :]
    acc = tl.full([16, 16], 3.0, dtype=tl.float32)
    acc = launch.add_dot(acc, tl.load(a_ptr + grid), tl.load(b_ptr + grid), "ieee", ORDERED)
    tl.store(out_ptr + grid, acc)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ordered", [True, False])
def test_add_dot(ordered: bool, dtype: torch.dtype, device: str) -> None:
    if ordered and dtype == torch.bfloat16:
        pytest.skip("ordered sums are for fp32 operands only")
    # Small integers: every product and sum is exact, so the result must be too.
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (16, 16), generator=g).to(device, dtype) for _ in range(2))
    out = torch.empty(16, 16, device=device)
    _add_dot_kernel[(1,)](a, b, out, ORDERED=ordered)
    assert torch.equal(out.double(), 3.0 + a.double() @ b.double())


def test_dot_precision() -> None:
    assert launch.dot_precision(torch.float32) == "tf32x3"
    assert launch.dot_precision(torch.bfloat16) == "ieee"


def test_every_launch_is_by_keyword_in_the_order_of_the_kernels_signature(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: dict[str, list[str]] = {}
    wrap = launch.wrap

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*positional: Any, **named: Any) -> None:
                assert not positional, self.kernel
                launched[self.kernel.__name__] = [name for name in named if name not in ("num_warps", "num_stages")]
                assert launched[self.kernel.__name__] == list(self.kernel.arg_names), self.kernel
                wrap(self.kernel)[grid](**named)

            return run

    monkeypatch.setattr(launch, "wrap", Recorded)
    case = make_case((70, 6), 3, hidden=8, out=8, dtype=torch.bfloat16, device=device)
    loss_and_gradients(projected_losses, case)
    moments([torch.rand(40, 33, device=device)])
    merged_sums(torch.rand(2, 3, device=device).double())
    norms = [torch.nn.BatchNorm1d(6).to(device) for _ in range(2)]
    for residual_bn in (None, norms[1]):
        x, residual = (torch.rand(40, 6, device=device, requires_grad=True) for _ in range(2))
        batch_norm_act(x, norms[0], residual, residual_bn).sum().backward()
    first_windows(torch.rand(1, 2, 3, 2, 2, device=device, requires_grad=True), 2)[0].sum().backward()
    launch_convolutions(device)
    kernels = {kernel for name in kernel_modules() for kernel in kernels_of(name)}
    assert launched.keys() == kernels  # none is left out


def launch_convolutions(device: str) -> None:
    """In every form."""

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, device=device).contiguous(memory_format=torch.channels_last)

    sizes = {"BLOCK_P": 4, "BLOCK_N": 16, "BLOCK_W": 4, "BLOCK_D": 16, "BLOCK_I": 16, "BLOCK_O": 16}
    own = {"split_k": "BLOCK_P", "strip": "BLOCK_W"}
    forms: tuple[Form, ...] = ("gemm", "split_k", "strip", "stem")
    for form in forms:
        channels = 1 if form == "stem" else 16
        operands = convolution.checked_operands(
            ones(1, 16, 2, 2), ones(1, channels, 2, 2), None, None, None, torch.ones(9 * channels, 16, device=device),
            None, None, None, None, 3, 1, 1, True, False,
        )  # fmt: skip
        others = {"BLOCK_P", "BLOCK_W"} - {own.get(form)}
        blocks = {name: size for name, size in sizes.items() if name not in others}
        convolution.launch(operands, Launch(form, launch.LaunchConfig(blocks=blocks)))
    transposed_convolution(ones(1, 16, 2, 2), torch.ones(16, 16, device=device))


def test_kernels_are_launched_by_launch_kernel_only() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if path.name == "launch.py" or not (isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)):
                continue
            target = ast.unparse(node.func.value)  # kernel[grid](...), wrap(kernel)[grid](...)
            launched = target.startswith("wrap") or target.endswith("_kernel")
            assert not launched, f"{path}, line {node.lineno}"


def test_tiles_have_one_vocabulary_and_come_last() -> None:
    """Of kernels, which all have some, and of device functions."""
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or "triton.jit" not in map(ast.unparse, node.decorator_list):
                continue
            arguments = [argument.arg for argument in node.args.args]
            blocks = [argument for argument in arguments if argument.startswith("BLOCK_")]
            assert blocks == [block for block in BLOCKS if block in blocks], node.name
            assert arguments[len(arguments) - len(blocks) :] == blocks, node.name
            assert blocks or not node.name.endswith("_kernel"), node.name


def kernels_of(module: str) -> list[str]:
    """Names of the kernels (not the device functions) that a module defines."""
    return [name for name in vars(importlib.import_module(module)) if name.startswith("_") and name.endswith("_kernel")]


def test_an_op_takes_what_it_changes_without_a_default() -> None:
    def count(x: torch.Tensor, counter: torch.Tensor | None = None) -> torch.Tensor:
        raise AssertionError

    with pytest.raises(TypeError, match="test_count changes counter in place, which may have no default"):
        launch.kernel_op("fastjepa::test_count", torch.empty_like, mutates_args=("counter",))(count)
    assert "fastjepa::test_count" not in launch.KERNEL_OPS
