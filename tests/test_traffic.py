"""Bytes and kernels as they are counted on shapes: the counting, our launches against the audit, and the totals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.rows import read_rows
from bench.recipe import TINY, Recipe
from bench.step_memory import fake_tensors
from bench.traffic import command, totals, work
from bench.traffic.counting import Event, TrafficCounter, bytes_of
from bench.traffic.parts import ACCUMULATION, ACTIVATIONS, CONVOLUTIONS, LAYOUT, LOSSES, OPTIMIZER, PROBES
from fastjepa.environment import ROOT
from fastjepa.kernels.convolution.layer import DTYPES, Layer, Precision
from fastjepa.kernels.convolution.recipe import predictor_layers
from fastjepa.kernels.launch import TRITON_TYPE, AuditCase

COMMITTED = ROOT / "bench" / "results" / "counted" / "traffic.jsonl"


def counted(function: Callable[[], object]) -> list[Event]:
    with TrafficCounter(lambda *_: "all") as counter:
        function()
    return counter.events


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x + 1, [("aten.add", 2 * 96)]),
        (lambda x: x + x, [("aten.add", 2 * 96)]),  # one tensor given twice
        (lambda x: x.add_(1), [("aten.add_", 96)]),
        (lambda x: x.view(24).t()[3:].unsqueeze(0).detach(), []),  # views
        (lambda x: torch.empty_like(x), []),
        (lambda x: x.t().contiguous(), [("aten.clone", 2 * 96)]),
        (lambda x: x[:, :3].contiguous(), [("aten.clone", 2 * 48)]),
        (lambda x: x[:1].expand(4, 6) * 2, [("aten.mul", 24 + 96)]),  # what lies in memory, not what it stands for
        (lambda x: torch.cat((x, x[:2])), [("aten.cat", 96 + 48 + 144)]),
        (lambda x: torch.matmul(x, x.t()), [("aten.mm", 96 + 96 + 64)]),  # two views of one tensor are two inputs
        (lambda x: x.to(torch.bfloat16), [("aten._to_copy", 96 + 48)]),
        (lambda x: x.to(torch.float32), []),
    ],
)
def test_what_an_operator_moves(function: Callable[[Tensor], object], expected: list[tuple[str, int]]) -> None:
    x = torch.rand(4, 6)
    events = counted(lambda: function(x))
    assert [(event.name, event.moved) for event in events] == expected
    assert all(event.is_operator and event.is_kernel for event in events)


def test_distinct_tensors() -> None:
    x = torch.rand(4, 6)
    assert bytes_of([x, x, x.detach(), 3, None]) == 96
    assert bytes_of([x, x.t()]) == 192


def test_convolutions_on_shapes_are_laid_out_as_cudnn_does() -> None:
    with fake_tensors():
        x = torch.empty(2, 3, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
        weight = torch.empty(4, 3, 3, 3, requires_grad=True)
        with TrafficCounter(lambda *_: "all"):
            out = F.conv2d(x, weight)
            grads = torch.autograd.grad(out, (x, weight), torch.ones_like(out))
    for tensor in (out, *grads):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def launches(function: Callable[[], object]) -> list[tuple[str, int]]:
    with fake_tensors():
        events = counted(function)
    return [(event.name, event.moved) for event in events if event.is_kernel and event.name.startswith("_")]


def cases(module: Any) -> dict[str, AuditCase]:
    return {case.name: case for case in module.audit_cases()}


def batch_norm_arguments(n_rows: int, C: int, dtype: torch.dtype, form: str) -> tuple[Any, ...]:
    x, residual = (torch.empty(n_rows, C, dtype=dtype) for _ in range(2))
    vectors = [torch.empty(C) for _ in range(4)]
    if form != "normalized_residual":
        return x, None if form == "plain" else residual, *vectors, *[None] * 4, 1e-5, 1e-5, True, False, True
    return x, residual, *vectors, *(torch.empty(C) for _ in range(4)), 1e-5, 1e-5, True, True, True


@pytest.mark.parametrize("form", ["plain", "residual", "normalized_residual"])
def test_launches_of_batch_norm_move_what_the_audit_says(form: str, needs_triton: None) -> None:
    from fastjepa.kernels.batch_norm import backward, forward, merge, reduce, statistics, tiling

    known = cases(statistics) | cases(merge) | cases(forward) | cases(reduce) | cases(backward)
    for n_rows, C, dtype in tiling.recipe_cases():
        shape = f"{TRITON_TYPE[dtype]}/{n_rows}x{C}"

        def bytes_of_case(name: str, shape: str = shape) -> int:
            return known[f"batch_norm_{name}/{shape}"].bytes_moved

        def run(n_rows: int = n_rows, C: int = C, dtype: torch.dtype = dtype) -> None:
            x, *others = batch_norm_arguments(n_rows, C, dtype, form)
            buffers = (torch.empty(C), torch.empty(C), torch.empty((), dtype=torch.int64))
            statistics.batch_norm_statistics(x, *buffers, 0.1)
            forward.batch_norm_forward(x, *others)
            for n_grads in (1, 2, 4):
                backward.batch_norm_backward([torch.empty_like(x) for _ in range(n_grads)], x, *others)

        found = launches(run)
        assert found[0] == ("_batch_norm_statistics_kernel", bytes_of_case("statistics"))
        if dtype == torch.bfloat16:
            assert found[1] == ("_batch_norm_statistics_merge_kernel", bytes_of_case("statistics_merge"))
        assert found[2] == ("_batch_norm_forward_kernel", bytes_of_case(f"forward/{form}"))
        for n_grads, place in ((1, 3), (2, 6), (4, 9)):
            names = [name for name, _ in found[place : place + 3]]
            kernels = ["_batch_norm_reduce_kernel", "_batch_norm_reduce_merge_kernel", "_batch_norm_grad_kernel"]
            assert names == kernels
            several = f" of {n_grads}" if n_grads > 1 else ""
            assert found[place][1] == bytes_of_case(f"reduce/{form}{several}")
            masked = form == "residual" or n_grads > 1
            second = "masked" if form != "normalized_residual" else "normalized_residual masked"
            assert found[place + 2][1] == bytes_of_case(f"grad/{second if masked else form}")
            if form == "plain" and n_grads == 1:
                assert found[place + 1][1] == bytes_of_case("reduce_merge")
        assert len(found) == 12


def test_launches_of_frame_windows_move_what_the_audit_says(needs_triton: None) -> None:
    from fastjepa.kernels.frame_windows import gather

    B, T, P, D, c = 64, 10, 64 * 64, 16, 2
    for dtype in (torch.float32, torch.bfloat16, torch.float16):

        def run(dtype: torch.dtype = dtype) -> None:
            windows, states, head = (
                torch.empty(B, t, P, d, dtype=dtype) for t, d in ((T - c + 1, c * D), (T, D), (c, D))
            )
            gather.gather_frames(windows, states, head, T, c, False)
            gather.gather_frames(windows, states, None, T, c, True)

        shape = f"{TRITON_TYPE[dtype]}/{B}x{T}x{P}x{D}"
        expected = [cases(gather)[f"gather_frames/{form}/{shape}"].bytes_moved for form in ("states", "sequence")]
        assert launches(run) == [("_gather_frames_kernel", moved) for moved in expected]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("clips", [1, 64])
def test_launches_of_convolutions_move_what_the_audit_says(clips: int, precision: Precision, interpreted: None) -> None:
    from bench import convolution
    from fastjepa.kernels.convolution.audit import case_of
    from fastjepa.kernels.convolution.stem import fits as fits_stem
    from fastjepa.kernels.convolution.table import choose

    for name, layer in convolution.layers_of(clips).items():
        layer = replace(layer, precision=precision)

        def run(layer: Layer = layer) -> None:
            inputs = convolution.make_inputs(layer, torch.device("cpu"), DTYPES[layer.precision])
            given = convolution.as_kernels_take(layer, inputs)
            if fits_stem(layer):
                given["x0"] = given["x0"].float()  # a video
            convolution.compute_fused(layer, given)

        case = case_of(layer, choose(layer), name)
        assert launches(run) == [(case.kernel.__name__, case.bytes_moved)], name
        if not fits_stem(layer):
            assert case.bytes_moved == layer.bytes_moved


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, totals.Totals]]:
    """The training step of the recipe at full size, of every variant."""
    pytest.importorskip("triton", reason="needs Triton, which is not installed")
    return {way.name: totals.by_part(work.training_step(Recipe(), way)) for way in work.STEP_WAYS}


def test_a_fused_step_moves_and_launches_no_more_than_it_should(steps: dict[str, dict[str, totals.Totals]]) -> None:
    fused = steps["fused"]
    convolutions = fused[totals.ALL].operator_bytes - fused[totals.REST].operator_bytes
    assert convolutions == pytest.approx(58e9, rel=0.01)
    assert fused[totals.REST].operator_bytes <= 72e9
    assert fused[totals.REST].kernel_bytes <= 90e9
    assert fused[totals.ALL].operators - fused[OPTIMIZER].operators <= 650
    assert fused[totals.ALL].kernels - fused[OPTIMIZER].kernels <= 900


def test_every_part_is_where_it_belongs(steps: dict[str, dict[str, totals.Totals]]) -> None:
    """By figures that can be worked out: U is the activation of 32 channels of the predictor in fp32."""
    U = 576 * 32 * 64 * 64 * 4
    once, original, fused = steps["each thing once"], steps["original"], steps["fused"]
    for parts in (once, original):
        assert parts[CONVOLUTIONS].operators == parts[CONVOLUTIONS].kernels
    # 25 convolutions of each of 4 calls and 9 of the encoder, forward and backward; the original encodes twice more,
    # without gradients. The encoder's first has no gradient for its input, and is one operator all the same.
    assert once[CONVOLUTIONS].operators == 2 * (4 * 25 + 9)
    assert original[CONVOLUTIONS].operators == 2 * (4 * 25 + 9) + 2 * 9
    assert once[PROBES].operators == original[PROBES].operators
    assert original[LOSSES].kernel_bytes > once[LOSSES].kernel_bytes > 20 * fused[LOSSES].kernel_bytes
    # A predictor's forks: 24 U of additions, the encoder's 12 of its own size, and the states'.
    encoders = 640 * 32 * 64 * 64 * 4
    assert once[ACCUMULATION].operator_bytes > 4 * 24 * U + 12 * encoders
    assert fused[ACCUMULATION].kernel_bytes < 0.3 * once[ACCUMULATION].kernel_bytes / 2
    # Forward: concatenations of 7 U a call, in bf16, besides what joins states.
    assert fused[LAYOUT].operator_bytes > 4 * 7 * U / 2
    assert fused[ACTIVATIONS].kernels > fused[ACTIVATIONS].operators


def test_recomputation_launches_more_and_moves_more(steps: dict[str, dict[str, totals.Totals]]) -> None:
    assert steps["fused, recomputed"][totals.ALL].kernels > steps["fused"][totals.ALL].kernels
    assert steps["fused, recomputed"][totals.ALL].kernel_bytes > steps["fused"][totals.ALL].kernel_bytes


def test_the_committed_totals_have_not_grown(steps: dict[str, dict[str, totals.Totals]]) -> None:
    rows = [row for row in read_rows(COMMITTED) if row.case.startswith("training step") and row.phase == totals.ALL]
    assert {row.variant for row in rows} == steps.keys()
    for row in rows:
        before, now = totals.totals_of(row), steps[row.variant][totals.ALL]
        for name in ("operators", "operator_bytes", "kernels", "kernel_bytes"):
            assert getattr(now, name) <= getattr(before, name), (row.variant, name)


@pytest.mark.parametrize("name", [name for name in work.WORKS if name != "training step"])
def test_the_other_work_as_committed(name: str, needs_triton: None) -> None:
    count, ways = work.WORKS[name]
    rows = [row for row in read_rows(COMMITTED) if row.case.startswith(name) and row.phase == totals.ALL]
    for batch in command.BATCHES.get(name, (64,)):
        recipe = replace(Recipe(), batch=batch)
        known = {row.variant: totals.totals_of(row) for row in rows if row.case == f"{name}, {recipe}"}
        assert known.keys() == {way.name for way in ways}
        for way in ways:
            now = totals.by_part(count(recipe, way))[totals.ALL]
            assert now.kernels <= known[way.name].kernels
            assert now.kernel_bytes <= known[way.name].kernel_bytes


@pytest.mark.parametrize(("clips", "most_bytes"), [(1, 15e6), (64, 64 * 15e6)])
def test_a_rollout_step_of_our_convolutions_is_a_launch_for_each(
    clips: int, most_bytes: float, interpreted: None
) -> None:
    recipe = replace(Recipe(), batch=clips)
    parts = totals.by_part(work.rollout_step(recipe, work.OWN))
    assert parts.keys() == {CONVOLUTIONS, totals.REST, totals.ALL}  # nothing is copied, joined or cast
    assert parts[totals.REST] == totals.Totals()
    step = parts[totals.ALL]
    assert step.operators == step.kernels <= 19
    assert step.operator_bytes == step.kernel_bytes <= most_bytes
    assert step.kernel_bytes == sum(layer.bytes_moved for layer in predictor_layers(clips).values())
    eager = totals.by_part(work.rollout_step(recipe, work.FOLDED))[totals.ALL]
    assert 2 * step.kernels < eager.kernels
    assert 1.6 * step.kernel_bytes < eager.kernel_bytes


def test_an_evaluation_with_our_convolutions_copies_little(interpreted: None) -> None:
    own, eager = (totals.by_part(work.evaluation(Recipe(), way)) for way in (work.OWN, work.EAGER_BF16))
    assert ACTIVATIONS not in own
    assert 7 + 7 * 18 == own[CONVOLUTIONS].operators == own[CONVOLUTIONS].kernels  # encode, and seven steps
    assert 10 * own[LAYOUT].kernel_bytes < eager[LAYOUT].kernel_bytes
    assert 1.9 * own[totals.ALL].kernel_bytes < eager[totals.ALL].kernel_bytes


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Any, interpreted: None) -> None:
    assert command.main(["--quick", "--batch", "2", "--only", "rollout", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = read_rows(tmp_path / "traffic.jsonl")
    assert {row.variant for row in rows} == {way.name for way in work.ROLLOUT_WAYS}
    assert {row.status for row in rows} == {"counted"}
    assert str(replace(TINY, batch=2)) in out
    for row in rows:
        assert str(int(row.quality["kernels"])) in out
    with pytest.raises(SystemExit):
        command.main(["--batch", "0"])
    with pytest.raises(SystemExit):
        command.main(["--only", "nothing of that name"])
