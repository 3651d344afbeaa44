from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from compare import assert_as_exact_as_eager, assert_close_to_truth
from fastjepa.kernels.projected_losses import closed_form, reference
from fastjepa.kernels.projected_losses.chunks import SMALL, Chunking, chunking_for
from fastjepa.policy import judge, norm_errors
from projector_cases import EPS, Case, loss_and_gradients, make_case, with_offset_and_dead_channels

# Both sides add at most a few thousand float64 terms per result: 1e-12 leaves 4,000 units of rounding.
FLOAT64_LIMIT = 1e-12
CHUNKINGS = {
    "small": chunking_for("cpu", compiling=False),
    "large": chunking_for("cuda", compiling=False),
    "several large": Chunking(2 * SMALL, threads=False),
    "all": chunking_for("cuda", compiling=True),
}
every_chunking = pytest.mark.parametrize("chunking", CHUNKINGS, indirect=True)
BIAS1 = "gradient of bias1"  # exactly 0: BatchNorm undoes a shift; eager returns rounding noise


@pytest.fixture
def chunking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice for another device, on tensors of this one."""
    monkeypatch.setattr(closed_form, "chunking_for", lambda *_, **__: CHUNKINGS[request.param])


def _check_float64(case: Case, limit: float = FLOAT64_LIMIT) -> None:
    case = case.double()
    truth = loss_and_gradients(reference.projected_losses, case)
    closed = loss_and_gradients(closed_form.projected_losses, case)
    assert closed.pop(BIAS1).abs().max() == 0
    for name, value in closed.items():
        assert_close_to_truth(value, truth[name], name, limit=limit)


@pytest.mark.usefixtures("chunking")
@every_chunking
@pytest.mark.parametrize("n_predictions", [0, 1, 3])
@pytest.mark.parametrize(
    ("shape", "hidden", "out"),
    [
        ((2, 16, 3, 9, 7), 64, 64),
        ((2, 5, 7, 11), 7, 128),
        ((101, 1), 64, 7),
        ((2, 3, 2, 64, 33), 8, 9),
    ],
)
def test_closed_form_is_the_definition(shape: tuple[int, ...], hidden: int, out: int, n_predictions: int) -> None:
    _check_float64(make_case(shape, n_predictions, hidden=hidden, out=out))


@pytest.mark.usefixtures("chunking")
@every_chunking
def test_two_rows() -> None:
    # Two normalised rows are ±1 whatever they were: BatchNorm's backward subtracts terms that differ by eps/var ≈ 1e-5
    # of their size, which costs five of float64's sixteen digits.
    _check_float64(make_case((2, 64), 1, hidden=8, out=8), limit=FLOAT64_LIMIT / 1e-5)


@pytest.mark.usefixtures("chunking")
@every_chunking
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "mixed", "sliced"])
def test_every_layout(layout: str) -> None:
    case = make_case((2, 6, 3, 64, 20), 2, hidden=8, out=9)
    last = torch.channels_last_3d
    if layout == "channels last":
        case = Case(
            case.z.to(memory_format=last), [p.to(memory_format=last) for p in case.predictions], case.parameters
        )
    elif layout == "mixed":
        case = case._replace(z=case.z.to(memory_format=last))
    elif layout == "sliced":
        case = Case(case.z[:, ::2, :, :, 1::3], [p[:, ::2, :, :, 1::3] for p in case.predictions], case.parameters)
        case.parameters[0] = case.parameters[0][:, :3].contiguous()
    _check_float64(case)


@pytest.mark.usefixtures("chunking")
@every_chunking
def test_expanded_inputs_and_gradients() -> None:
    case = make_case((3, 4, 5, 6), 1, hidden=8, out=8).double()
    expanded = Case(
        case.z[:1].expand(3, -1, -1, -1), [case.predictions[0][:, :, :1].expand(-1, -1, 5, -1)], case.parameters
    )
    z, p = (x.detach().requires_grad_() for x in (expanded.z, expanded.predictions[0]))
    results = []
    for function in (closed_form.projected_losses, reference.projected_losses):
        losses = function(z, [p], *expanded.parameters, 1e-5)
        grad_out = torch.full((1,), 0.7, dtype=torch.float64).expand(1)
        results.append(torch.autograd.grad(losses.prediction_losses, [z, p], grad_out))
    for closed, truth, name in zip(*results, ("z", "p"), strict=True):
        assert_close_to_truth(closed, truth, name, limit=FLOAT64_LIMIT)


def test_gradcheck() -> None:
    case = make_case((2, 3, 2, 2, 3), 2, hidden=4, out=3, seed=3).double()
    inputs = [x.requires_grad_() for x in (case.z, *case.predictions, *case.parameters)]

    def losses(
        z: torch.Tensor, p0: torch.Tensor, p1: torch.Tensor, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return closed_form.projected_losses(z, [p0, p1], *parameters, 1e-5)[:3]

    assert torch.autograd.gradcheck(losses, inputs)


def test_absent_parameters_are_zeros_and_ones() -> None:
    case = make_case((40, 5), 1, hidden=6, out=4).double()
    w1, _, _, _, w2 = case.parameters
    for function in (closed_form.projected_losses, reference.projected_losses):
        absent = function(case.z, case.predictions, w1, None, None, None, w2, 1e-3)
        zeros, ones = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
        given = function(case.z, case.predictions, w1, zeros, ones, zeros, w2, 1e-3)
        for name in absent._fields:
            assert_close_to_truth(getattr(absent, name), getattr(given, name), name, limit=FLOAT64_LIMIT)


def test_batch_statistics_are_those_of_batch_norm() -> None:
    case = make_case((3, 4, 5, 6), 1, hidden=8, out=8).double()
    w1, b1 = case.parameters[:2]
    losses = closed_form.projected_losses(case.z, case.predictions, *case.parameters, 1e-5)
    for t, x in enumerate((case.z, *case.predictions)):
        bn = torch.nn.BatchNorm1d(8, momentum=1.0).double()
        bn(torch.nn.functional.linear(reference.as_rows(x), w1, b1))
        assert_close_to_truth(losses.batch_means[t], bn.running_mean, "mean", limit=FLOAT64_LIMIT)
        assert_close_to_truth(losses.batch_vars[t], bn.running_var, "variance", limit=FLOAT64_LIMIT)
    assert not losses.batch_means.requires_grad
    assert not losses.batch_vars.requires_grad


@pytest.mark.usefixtures("chunking")
@every_chunking
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_closed_form_is_as_exact_as_eager(dtype: torch.dtype) -> None:
    case = make_case((2, 16, 2, 17, 19), 3, dtype=dtype)
    truth = loss_and_gradients(reference.projected_losses, case.double())
    eager = loss_and_gradients(reference.projected_losses, case)
    closed = loss_and_gradients(closed_form.projected_losses, case)
    assert closed.pop(BIAS1).abs().max() == 0
    for name, value in closed.items():
        assert_as_exact_as_eager(value, eager[name], truth[name], name, precision=dtype)


@pytest.mark.usefixtures("chunking")
@every_chunking
def test_offset_constant_and_dead_channels() -> None:
    case = with_offset_and_dead_channels(make_case((2, 16, 2, 40, 33), 2))
    truth = loss_and_gradients(reference.projected_losses, case.double())
    closed = loss_and_gradients(closed_form.projected_losses, case)
    assert closed.pop(BIAS1).abs().max() == 0
    for name, value in closed.items():
        assert_close_to_truth(value, truth[name], name)


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("chunking", ["small", "large"], indirect=True)
def test_millions_of_rows() -> None:
    case = make_case((2_600_003, 4), 1, hidden=6, out=5)
    truth = loss_and_gradients(closed_form.projected_losses, case.double())
    closed = loss_and_gradients(closed_form.projected_losses, case)
    for name in truth.keys() - {BIAS1, "gradient of z", "gradient of predictions[0]"}:
        assert_close_to_truth(closed[name], truth[name], name)


@every_chunking
@pytest.mark.usefixtures("chunking")
def test_no_copy_from_the_host_is_needed() -> None:
    """Fresh tensors are made where the inputs are: "meta" has no values that could be copied or waited for."""
    case = make_case((2, 3, 2, 64, 33), 2, hidden=8, out=9)
    on_meta = Case(case.z.to("meta"), [p.to("meta") for p in case.predictions], [p.to("meta") for p in case.parameters])
    found = loss_and_gradients(closed_form.projected_losses, on_meta)
    expected = loss_and_gradients(closed_form.projected_losses, case)
    assert {name: (x.device.type, x.shape) for name, x in found.items()} == {
        name: ("meta", x.shape) for name, x in expected.items()
    }


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "mixed"])
@pytest.mark.parametrize("n_predictions", [0, 2])
def test_the_ops_are_as_they_say(layout: str, n_predictions: int) -> None:
    """Their fake versions above all, by which torch.compile plans memory: shapes, dtypes and strides."""
    z, predictions, parameters = make_case((2, 3, 2, 5, 7), n_predictions, hidden=8, out=9)
    if layout != "contiguous":
        z = z.to(memory_format=torch.channels_last_3d)
    if layout == "channels last":
        predictions = [p.to(memory_format=torch.channels_last_3d) for p in predictions]
    inputs = [*parameters, z, *predictions]
    torch.library.opcheck(closed_form._forward_op, (inputs, EPS))
    losses = len(reference.ProjectedLosses._fields)
    saved = closed_form._forward(inputs, EPS)[losses:]
    grads = [torch.ones(()), torch.ones(()), torch.ones(n_predictions)]
    torch.library.opcheck(closed_form._backward_op, (grads, inputs, saved, EPS))
    expected = closed_form._backward(grads, inputs, saved, EPS)
    with FakeTensorMode() as mode:
        fake = closed_form._backward_op(*([mode.from_tensor(x) for x in xs] for xs in (grads, inputs, saved)), EPS)
    assert [(x.shape, x.stride(), x.dtype) for x in fake] == [(x.shape, x.stride(), x.dtype) for x in expected]


def test_std_and_cov_loss_of_uncorrelated_unit_rows() -> None:
    # Columns of a 4×4 Hadamard matrix without the constant one: mean 0, sum of squares 4, orthogonal.
    f = torch.tensor([[1, 1, 1], [-1, 1, -1], [1, -1, -1], [-1, -1, 1]], dtype=torch.float64) * 0.3
    std_loss, cov_loss = reference.std_and_cov_loss(f)
    assert cov_loss == pytest.approx(0.0, abs=1e-15)
    assert std_loss == pytest.approx(1 - (0.09 * 4 / 3 + 1e-4) ** 0.5, rel=1e-12)
    # Twice the same column: their covariance is the variance, in 2 of the 2 off-diagonal entries.
    assert reference.std_and_cov_loss(f[:, [0, 0]])[1] == pytest.approx((0.09 * 4 / 3) ** 2, rel=1e-12)


@pytest.mark.parametrize("function", [closed_form.projected_losses])
def test_bad_shapes_are_named(function: object) -> None:
    case = make_case((4, 5), 1, hidden=6, out=4)
    z, (p,), (w1, b1, g, b, w2) = case
    for bad, message in [
        ((z[:, 0], [], w1, b1, g, b, w2), "z has shape"),
        ((z[:1], [], w1, b1, g, b, w2), "at least 2"),
        ((z, [p, p[:2]], w1, b1, g, b, w2), r"predictions\[1\]"),
        ((z, [p.double()], w1, b1, g, b, w2), r"predictions\[0\]"),
        ((z, [p], w1[:, :2], b1, g, b, w2), "weight1 has shape"),
        ((z, [p], w1, b1, g, b, w2[:, :2]), "weight2 has shape"),
        ((z, [p], w1, b1, g, b, w2[:1]), "out ≥ 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(*bad, 1e-5)  # type: ignore[operator]
    with pytest.raises(ValueError, match="variance of 1 row"):
        reference.std_and_cov_loss(z[:1])


@pytest.mark.parametrize("distance", [30.0, 100.0, 1e4])
@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("n_predictions", [0, 1])
def test_gradients_of_two_groups_of_clips_far_apart_are_as_exact_as_eager(
    n_predictions: int, alternating: bool, distance: float
) -> None:
    """`distance`: of the groups, in standard deviations within each, in all channels; alternating, chunks mix them."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(32, 16, 2, 8, 16, generator=generator)
    z[slice(None, None, 2) if alternating else slice(16, None)] += distance
    predictions = [z + 0.3 * torch.randn(z.shape, generator=generator) for _ in range(n_predictions)]
    case = make_case((2, 16), 0)._replace(z=z, predictions=predictions)
    truth = loss_and_gradients(reference.projected_losses, case.double())
    eager = loss_and_gradients(reference.projected_losses, case)
    closed = loss_and_gradients(closed_form.projected_losses, case)
    errors, eager_errors = (norm_errors(results, truth) for results in (closed, eager))
    gradients = {name: error for name, error in errors.items() if name.startswith("gradient") and name != BIAS1}
    judgement = judge(gradients, eager_errors, "fp32")
    assert judgement.exact, judgement
