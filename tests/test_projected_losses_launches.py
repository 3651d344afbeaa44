"""How many kernels the fused projected losses launch, that nothing else computes around them, and what they move."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastjepa.kernels
from fastjepa.kernels import launch
from fastjepa.kernels.launch import AuditCase
from fastjepa.kernels.moments import centred_linear, merge, narrow, scatter
from fastjepa.kernels.moments.fused import moments
from fastjepa.kernels.projected_losses import (
    backward,
    forward,
    fused,
    hidden_affine,
    input_gradients,
    losses,
    output_gradients,
)
from fastjepa.kernels.projected_losses.algebra import ProjectorParameters
from projector_cases import make_case

N_ROWS, D, H, K = 64 * 10 * 64 * 64, 16, 64, 4  # the default recipe
FORWARD = [
    "_narrow_moments_kernel", "_merge_moments_kernel", "_hidden_affine_kernel", "_activation_moments_kernel",
    "_activation_moments_kernel", "_merge_sums_kernel", "_losses_kernel",
]  # fmt: skip
AROUND_SLOPES = (
    ["_output_gradients_kernel"],
    ["_merge_sums_kernel", "_input_gradients_kernel", "_centred_linear_kernel"],
)
Launch = tuple[Any, dict[str, Any]]  # the kernel and its arguments


def replace_launches(monkeypatch: pytest.MonkeyPatch, replacement: Callable[..., None]) -> None:
    """`launch_kernel`, in every module that has imported it."""
    for found in pkgutil.walk_packages(fastjepa.kernels.__path__, "fastjepa.kernels."):
        module = importlib.import_module(found.name)
        if hasattr(module, "launch_kernel"):
            monkeypatch.setattr(module, "launch_kernel", replacement)


class Operators(TorchDispatchMode):
    """Counts what torch itself computes or copies; not views, allocations, or what happens inside a launch."""

    FREE = frozenset("view select slice unsqueeze transpose permute expand detach alias empty empty_like".split())

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.launching = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not self.launching and name not in self.FREE:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "slopes"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_a_state_and_four_predictions_take_few_launches_and_no_operator_of_torch(
    dtype: torch.dtype, slopes: int, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[str] = []
    operators, launch_kernel = Operators(), launch.launch_kernel

    def recorded(kernel: Any, *arguments: Any, **named: Any) -> None:
        launched.append(kernel.__name__)
        operators.launching = True
        launch_kernel(kernel, *arguments, **named)
        operators.launching = False

    replace_launches(monkeypatch, recorded)
    case = make_case((40, 6), K, hidden=8, out=4, dtype=dtype)
    arguments = (case.z, case.predictions, *case.parameters)
    run_forward, run_backward = fused._forward, fused._backward
    with operators:
        kept = run_forward(*arguments, 1e-5)[5:]
        assert launched == FORWARD
        launched.clear()
        run_backward(torch.tensor(1.0), torch.tensor(2.0), torch.ones(K), *arguments, kept)
        before, after = AROUND_SLOPES
        assert launched == [*before, *["_slope_gradients_kernel"] * slopes, *after]
    operators.count -= Counter({"projected_losses": 1, "projected_losses_backward": 1})
    operators.count -= Counter({"scalar_tensor": 2, "lift_fresh": 2, "ones": 1, "full": 1})  # the test's own gradients
    assert not operators.count


def test_no_zeros_are_made_for_what_has_no_gradient(device: str) -> None:
    case = make_case((40, 6), 1, hidden=8, out=4, device=device)
    z = case.z.requires_grad_()
    losses = fused.projected_losses(z, case.predictions, *case.parameters, 1e-5)
    operators = Operators()
    with operators:
        torch.autograd.grad(losses.std_loss, z)
    assert operators.count.keys() <= {"ones_like", "projected_losses_backward"}


def recipe_launches(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Every launch of a training step at the default recipe, on tensors without memory."""
    launched: list[Launch] = []
    replace_launches(
        monkeypatch,
        lambda kernel, grid, config, **named: launched.append((kernel, named | config.blocks)),
    )

    def rows() -> Tensor:
        return torch.empty(N_ROWS, D, device="meta", dtype=dtype)

    tensors = [rows() for _ in range(1 + K)]
    params = ProjectorParameters(*(torch.empty(s, device="meta") for s in ((H, D), (H,), (H,), (H,), (H, H))))
    partials = scatter.scatter_partials(tensors)
    mean, scattered = merge.merge_moments(
        partials.centre, partials.residual, partials.scatter, (N_ROWS, partials.rows_per_program), D
    )
    affine = hidden_affine.hidden_affine(params, mean, scattered, N_ROWS, 1e-5, dtype)
    sums = forward.activation_moments(tensors, affine.operands, affine.shift)
    found = losses.losses(sums, affine.shift, affine.wide_weight2, N_ROWS)
    scalar = torch.empty((), device="meta")
    out = output_gradients.output_gradients(
        scalar, scalar, torch.empty(K, device="meta"), found.covariance, found.projected, affine.wide_weight2,
        N_ROWS, H, dtype, torch.float32,
    )  # fmt: skip
    slopes, slope_sums = backward.slope_gradients(tensors, affine.operands, found.mean_r, out)
    group = backward.group_size(H, dtype)
    grad = input_gradients.input_gradients(
        params, slope_sums, group, mean, affine.inv_std, affine.weight1_scatter, affine.operands.slope, N_ROWS
    )
    outs = [v if v.dtype == dtype else rows() for v in slopes]
    centred_linear.launch_centred_linear(tensors, grad.correction, slopes, outs)
    return launched


def is_case_of(case: AuditCase, kernel: Any, arguments: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether the audit compiles what this launch runs."""
    constants = {n: v for n, v in arguments.items() if n.isupper()} | case.config.blocks
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64"}
    pointers = {n: types[v.dtype] for n, v in arguments.items() if isinstance(v, Tensor)}
    absent = {n for n, v in arguments.items() if v is None}
    return (
        case.kernel is kernel
        and {n: v for n, v in case.constexprs.items() if v is not None} | case.config.blocks == constants
        and {n: t for n, t in case.signature.items() if t.startswith("*")} == pointers
        and {n for n, v in case.constexprs.items() if v is None} == absent
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_audit_declares_the_bytes_of_the_recipes_launches(
    dtype: torch.dtype, needs_triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor that a launch is given is what it reads or writes, once."""
    modules = (
        narrow, merge, hidden_affine, forward, losses, output_gradients, backward, input_gradients, centred_linear,
    )  # fmt: skip
    cases = [case for module in modules for case in module.audit_cases()]
    launches = recipe_launches(dtype, monkeypatch)
    found = []
    for kernel, arguments in launches:
        moved = sum(x.nbytes for x in arguments.values() if isinstance(x, Tensor))
        declared = {case.name: case.bytes_moved for case in cases if is_case_of(case, kernel, arguments, dtype)}
        found.append(kernel.__name__)
        assert moved in declared.values(), (kernel, moved, declared)
    slopes = 4 if dtype == torch.float32 else 2
    assert sorted(found) == sorted(
        [*FORWARD, *AROUND_SLOPES[0], *["_slope_gradients_kernel"] * slopes, *AROUND_SLOPES[1]]
    )


def test_moments_of_more_tensors_than_one_launch_takes(device: str) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(40, 6, generator=g).to(device) for _ in range(7)]
    together = moments(tensors)
    for t, x in enumerate(tensors):
        for all_of_them, alone in zip(together, moments([x]), strict=True):
            assert torch.equal(all_of_them[t], alone[0])
