"""Windows of states and the sequences of an unroll against plain torch in float64, gradients above all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compare import assert_as_exact_as_eager
from fastjepa.kernels.frame_windows import fused, reference
from fastjepa.kernels.frame_windows.gather import gather_frames

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Unroll = Callable[[Any, Tensor, list[Tensor], int], Tensor]


def unroll(functions: Any, states: Tensor, weights: list[Tensor], context: int) -> Tensor:
    """A loss in which everything is used as in an unroll of two steps with a predictor that is a product."""
    windows, states, head = functions.first_windows(states, context)
    D, loss = states.shape[1], (states * weights[0]).sum()
    for step in (1, 2):
        predicted = sum(windows[:, i * D : (i + 1) * D] for i in range(context)) * weights[step]
        if step == 1:
            windows, sequence = functions.next_windows(head, predicted)
        elif functions is fused:
            sequence = fused.last_sequence(head, predicted)
        else:
            sequence = reference.sequence(head, predicted)
        loss = loss + (sequence * weights[0]).sum()
    return loss


def only_windows(functions: Any, states: Tensor, weights: list[Tensor], context: int) -> Tensor:
    windows, _, head = functions.first_windows(states, context)
    windows, _ = functions.next_windows(head, weights[1] * windows[:, : states.shape[1]])
    return (windows.square()).sum()


def only_head(functions: Any, states: Tensor, weights: list[Tensor], context: int) -> Tensor:
    return (functions.first_windows(states, context)[2] * weights[0][:, :, :context]).sum()


def drawn(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "context"),
    [((2, 5, 6, 7, 3), 2), ((1, 16, 3, 4, 5), 2), ((2, 3, 5, 5, 2), 1), ((1, 70, 5, 3, 2), 3), ((3, 1, 4, 1, 1), 2)],
)
@pytest.mark.parametrize("loss", [unroll, only_windows, only_head], ids=lambda f: f.__name__)
def test_gradients(loss: Unroll, shape: tuple[int, ...], context: int, dtype: torch.dtype, device: str) -> None:
    B, D, T, H, W = shape
    states = drawn(shape, dtype, device, 0)
    weights = [
        drawn(shape, dtype, device, 1),
        *(drawn((B, D, T - context + 1, H, W), dtype, device, k) for k in (2, 3)),
    ]

    def gradient(functions: Any, dtype: torch.dtype) -> Tensor:
        leaf = states.to(dtype).requires_grad_()
        (found,) = torch.autograd.grad(loss(functions, leaf, [w.to(dtype) for w in weights], context), leaf)
        return found

    found, eager = gradient(fused, dtype), gradient(reference, dtype)
    truth = gradient(reference, torch.float64)
    assert found.dtype == dtype
    assert_as_exact_as_eager(found, eager, truth, "gradient", precision=dtype, relative_limit=1e-5)
    assert torch.equal(found, gradient(fused, dtype))
    if loss is not only_head:
        assert found.is_contiguous(memory_format=torch.channels_last_3d)


def test_results_share_memory_with_the_states(device: str) -> None:
    states = drawn((2, 3, 5, 4, 4), torch.float32, device, 0).requires_grad_()
    windows, same, head = fused.first_windows(states, 2)
    assert torch.equal(windows, torch.cat((states[:, :, :-1], states[:, :, 1:]), dim=1))
    assert same.data_ptr() == head.data_ptr() == states.data_ptr()
    assert torch.equal(same, states)
    assert torch.equal(head, states[:, :, :2])
    predicted = drawn((2, 3, 4, 4, 4), torch.float32, device, 1)
    windows, sequence = fused.next_windows(head, predicted)
    assert torch.equal(sequence, torch.cat((states[:, :, :2], predicted[:, :, :3]), dim=2))
    assert torch.equal(windows, torch.cat((sequence[:, :, :-1], sequence[:, :, 1:]), dim=1))
    assert torch.equal(fused.last_sequence(head, predicted), sequence)


def test_nothing_used_has_no_gradient(device: str) -> None:
    states = drawn((1, 2, 4, 2, 2), torch.float32, device, 0).requires_grad_()
    fused.first_windows(states, 2)
    other = torch.ones((), device=device, requires_grad=True)
    assert torch.autograd.grad(other * 2, [other, states], allow_unused=True)[1] is None


def test_gradients_in_another_layout(device: str) -> None:
    states = drawn((2, 3, 4, 3, 5), torch.float32, device, 0).contiguous().requires_grad_()
    weight = drawn((2, 6, 3, 3, 5), torch.float32, device, 1).contiguous()
    found, expected = (
        torch.autograd.grad((functions.first_windows(states, 2)[0] * weight).sum(), states)[0]
        for functions in (fused, reference)
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("split", [False, True])
def test_opcheck(split: bool, device: str) -> None:
    windows, states, head = (torch.randn(2, t, 6, d, device=device) for t, d in ((3, 10), (4, 5), (2, 5)))
    for arguments in ((windows, states, head), (windows, None, None), (None, states, None)):
        torch.library.opcheck(gather_frames, (*arguments, 4, 2, split))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_is_rounded_once(dtype: torch.dtype, device: str) -> None:
    """Sums of whole numbers are exact before that."""
    g = torch.Generator().manual_seed(0)
    windows, states, head = (
        torch.randint(-200, 201, (2, t, 9, d), generator=g).to(device, dtype) for t, d in ((4, 10), (5, 5), (2, 5))
    )
    _, found = gather_frames(windows, states, head, 5, 2, False)
    total = states.double()
    total[:, :2] += head
    for i in range(2):
        total[:, i : i + 4] += windows[..., 5 * i : 5 * (i + 1)]
    assert torch.equal(found, total.to(dtype))


def test_under_torch_compile(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which adds gradients itself, in kernels that it fuses."""
    states = drawn((1, 3, 5, 2, 2), torch.float32, device, 0).requires_grad_()
    weights = [drawn((1, 3, 5, 2, 2), torch.float32, device, 1)]
    weights += [drawn((1, 3, 4, 2, 2), torch.float32, device, k) for k in (2, 3)]

    def gradient(function: Callable[..., Tensor]) -> Tensor:
        return torch.autograd.grad(function(fused, states, weights, 2), states)[0]

    expected = gradient(unroll)
    monkeypatch.setattr(fused, "gather_frames", None)
    compiled = torch.compile(unroll, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(compiled), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.ones(1, 2, 4, 6), None, None, 4, 2),
            ValueError,
            r"windows has shape \(1, 2, 4, 6\); accepted: \(any, 3",
        ),
        ((torch.ones(1, 3, 4, 5), None, None, 4, 2), ValueError, "windows has 5 channels; accepted: a multiple of"),
        ((torch.ones(1, 3, 4, 6).double(), None, None, 4, 2), TypeError, "windows has dtype torch.float64"),
        ((torch.ones(1, 3, 4, 6), torch.ones(1, 3, 4, 3), None, 4, 2), ValueError, r"states has shape"),
        ((torch.ones(1, 3, 4, 6), None, torch.ones(1, 2, 4, 2), 4, 2), ValueError, r"head has shape"),
        ((None, None, None, 4, 2), ValueError, "windows and states are both None"),
    ],
    ids=str,
)
def test_bad_input_is_named(arguments: tuple[Any, ...], error: type[Exception], message: str, device: str) -> None:
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    with pytest.raises(error, match=message):
        gather_frames(*moved, False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_recipe_shape_on_the_gpu(dtype: torch.dtype) -> None:
    test_gradients(unroll, (64, 16, 10, 64, 64), 2, dtype, "cuda")
