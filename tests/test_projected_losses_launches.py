"""How many kernels the fused projected losses launch, that nothing else computes around them, and what they move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.step_memory import fake_tensors
from bench.traffic.counting import TrafficCounter, launch_bytes, noted_launches
from fastjepa.kernels.launch import KERNEL_OPS, AuditCase, LaunchConfig
from fastjepa.kernels.moments import centred_linear, merge, narrow
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
from fastjepa.kernels.projected_losses.reference import ProjectedLosses

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
Op = Callable[..., list[Tensor]]


def empty_arguments(n_rows: int, d: int, hidden: int, out: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Those of the forward op but `eps`, for a state and K predictions."""
    z, *predictions = (torch.empty(n_rows, d, dtype=dtype) for _ in range(1 + K))
    sizes = ((hidden, d), (hidden,), (hidden,), (hidden,), (out, hidden))
    return z, predictions, *(torch.empty(size) for size in sizes)


def run_both(forward_op: Op, backward_op: Op, arguments: tuple[Any, ...]) -> None:
    """A training step's two calls, with a gradient of each loss."""
    grads = (torch.empty(()), torch.empty(()), torch.empty(K))
    kept = forward_op(*arguments, 1e-5)[len(ProjectedLosses._fields) :]
    backward_op(*grads, *arguments, kept)


def of_a_step(slopes: int) -> list[str]:
    before, after = AROUND_SLOPES
    return [*FORWARD, *before, *["_slope_gradients_kernel"] * slopes, *after]


@pytest.mark.parametrize(("dtype", "slopes"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_a_state_and_four_predictions_take_few_launches_and_no_operator_of_torch(
    dtype: torch.dtype, slopes: int, needs_triton: None
) -> None:
    """On fake tensors, so that to look at a value, which counts as no operator, is an error."""
    with fake_tensors():
        arguments = empty_arguments(40, 6, 8, 4, dtype)
        with TrafficCounter(lambda *_: "") as counter:
            run_both(fused._forward, fused._backward, arguments)
    assert [event.name for event in counter.events if event.is_kernel] == of_a_step(slopes)


def test_no_zeros_are_made_for_what_has_no_gradient(needs_triton: None) -> None:
    with fake_tensors(), TrafficCounter(lambda *_: "") as counter:
        z, *others = empty_arguments(40, 6, 8, 4, torch.float32)
        losses = fused.projected_losses(z.requires_grad_(), *others, 1e-5)
        counter.events.clear()
        torch.autograd.grad(losses.std_loss, z)
    operators = [event.name for event in counter.events if not event.name.startswith("_")]
    assert operators == ["aten.ones_like", "fastjepa::projected_losses_backward"]


def recipe_launches(dtype: torch.dtype) -> list[Launch]:
    """Every launch of a training step at the default recipe."""
    launched: list[Launch] = []
    forward_op, backward_op = (KERNEL_OPS[f"fastjepa::projected_losses{which}"] for which in ("", "_backward"))
    with fake_tensors(), noted_launches(lambda kernel, arguments: launched.append((kernel, arguments))):
        run_both(forward_op, backward_op, empty_arguments(N_ROWS, D, H, H, dtype))
    return launched


def is_case_of(case: AuditCase, kernel: Any, arguments: dict[str, Any]) -> bool:
    """Whether the audit compiles what this launch runs."""
    constants = {n: v for n, v in arguments.items() if n.isupper()}
    config = LaunchConfig(arguments["num_warps"], arguments["num_stages"], case.config.blocks)
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float64: "*fp64"}
    pointers = {n: types[v.dtype] for n, v in arguments.items() if isinstance(v, Tensor)}
    absent = {n for n, v in arguments.items() if v is None}
    return (
        (case.kernel, case.config) == (kernel, config)
        and {n: v for n, v in case.constexprs.items() if v is not None} | case.config.blocks == constants
        and {n: t for n, t in case.signature.items() if t.startswith("*")} == pointers
        and {n for n, v in case.constexprs.items() if v is None} == absent
    )


@pytest.mark.parametrize(("dtype", "slopes"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_the_audit_declares_the_bytes_of_the_recipes_launches(
    dtype: torch.dtype, slopes: int, needs_triton: None
) -> None:
    """Every tensor that a launch is given is what it reads or writes, once."""
    modules = (
        narrow, merge, hidden_affine, forward, losses, output_gradients, backward, input_gradients, centred_linear,
    )  # fmt: skip
    cases = [case for module in modules for case in module.audit_cases()]
    launched = recipe_launches(dtype)
    for kernel, arguments in launched:
        moved = launch_bytes(arguments)
        declared = {case.name: case.bytes_moved for case in cases if is_case_of(case, kernel, arguments)}
        assert moved in declared.values(), (kernel, moved, declared)
    assert [kernel.__name__ for kernel, _ in launched] == of_a_step(slopes)


def test_moments_of_more_tensors_than_one_launch_takes(device: str) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(40, 6, generator=g).to(device) for _ in range(7)]
    together = moments(tensors)
    for t, x in enumerate(tensors):
        for all_of_them, alone in zip(together, moments([x]), strict=True):
            assert torch.equal(all_of_them[t], alone[0])
