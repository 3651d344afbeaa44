"""Fused BatchNorm (+ residual) (+ ReLU) against plain torch in float64, under the one exactness policy."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from compare import assert_as_exact_as_eager, assert_close_to_truth
from fastjepa.kernels.batch_norm import reference
from fastjepa.kernels.batch_norm import tiling as batch_norm_tiling
from fastjepa.kernels.batch_norm.backward import batch_norm_backward
from fastjepa.kernels.batch_norm.forward import batch_norm_forward
from fastjepa.kernels.batch_norm.fused import batch_norm_act, batch_norm_act_repeatable
from fastjepa.kernels.batch_norm.merge import Partials, RunningStatistics, merge_partials
from fastjepa.kernels.batch_norm.statistics import _statistics, batch_norm_statistics, statistics_partials

FORMS = ("plain", "residual", "normalized_residual")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


class Inputs(NamedTuple):
    x: Tensor
    bn: BatchNorm
    residual: Tensor | None
    residual_bn: BatchNorm | None
    grad_out: Tensor


def random_bn(n_channels: int, dims: int = 4, **options: object) -> BatchNorm:
    bn: BatchNorm = (nn.BatchNorm2d if dims == 4 else nn.BatchNorm1d)(n_channels, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        if bn.weight is not None:
            bn.weight.uniform_(-2.0, 2.0)
            bn.bias.normal_()
        if bn.running_mean is not None and bn.running_var is not None:
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2.0)
    return bn


def random_rows(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    # On the CPU, so that a seed means the same numbers everywhere; but gigabytes are drawn where they are needed.
    drawn_on = device if math.prod(shape) > 2**22 else "cpu"
    tensor = (torch.randn(shape, device=drawn_on) * 1.5 + 0.3).to(device, dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def random_inputs(
    shape: tuple[int, ...], form: str, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: object
) -> Inputs:
    torch.manual_seed(sum(shape))
    bns = [random_bn(shape[1], len(shape), **options).to(device) for _ in range(2)]
    bns[1].eps = 2e-2  # no argument of the one may stand in for that of the other
    x, residual, grad_out = (random_rows(shape, dtype, device) for _ in range(3))
    return Inputs(
        x,
        bns[0],
        None if form == "plain" else residual,
        bns[1] if form == "normalized_residual" else None,
        grad_out,
    )


def run(function: object, inputs: Inputs, relu: bool = True, double: bool = False) -> dict[str, Tensor]:
    """Output, gradients and buffers of one forward and backward pass on copies of `inputs`."""
    inputs = copy.deepcopy(inputs)
    if double:
        inputs = Inputs(*(None if value is None else value.double() for value in inputs))
    for leaf in (inputs.x, inputs.residual):
        if leaf is not None:
            leaf.requires_grad_()
    out = function(inputs.x, inputs.bn, inputs.residual, inputs.residual_bn, relu)  # type: ignore[operator]
    out.backward(inputs.grad_out)
    results = {"out": out.detach(), "grad x": inputs.x.grad}
    if inputs.residual is not None:
        results["grad residual"] = inputs.residual.grad
    for name, bn in (("bn", inputs.bn), ("residual_bn", inputs.residual_bn)):
        if bn is not None:
            results |= {f"grad {name}.{key}": parameter.grad for key, parameter in bn.named_parameters()}
            results |= {f"{name}.{key}": buffer for key, buffer in bn.named_buffers()}
    return results


def without_grad_at_the_kink(inputs: Inputs) -> Inputs:
    """`inputs` with grad_out = 0 where rounding alone decides on which side of the ReLU's kink a value falls.

    One such value would move eager's error, and so the bound, to the size of the gradient itself.
    """
    doubles = Inputs(*(None if value is None else copy.deepcopy(value).double() for value in inputs))
    with torch.no_grad():
        distance = reference.batch_norm_act(*doubles[:4], relu=False).abs()
    # Eager rounds up to four times on the way (each normalised term, their sum, the store).
    near = distance < 4 * torch.finfo(inputs.x.dtype).eps * distance.max()
    return inputs._replace(grad_out=inputs.grad_out.masked_fill(near, 0.0))


def check(inputs: Inputs, relu: bool = True, relative_limit: float | None = 1e-5) -> dict[str, Tensor]:
    """Everything that the fused op computes from `inputs` is as exact as eager's; returns it."""
    if relu:
        inputs = without_grad_at_the_kink(inputs)
    actual = run(batch_norm_act, inputs, relu)
    eager = run(reference.batch_norm_act, inputs, relu)
    truth = run(reference.batch_norm_act, inputs, relu, double=True)
    assert actual.keys() == eager.keys() == truth.keys()
    largest_input = max(float(t.double().abs().max()) for t in (inputs.x, inputs.residual) if t is not None)
    for name, value in actual.items():
        assert value.dtype == eager[name].dtype, name
        if not value.is_floating_point():
            assert torch.equal(value, truth[name]), name
            continue
        assert_as_exact_as_eager(
            value,
            eager[name],
            truth[name],
            name,
            precision=inputs.x.dtype,
            relative_limit=relative_limit,
            # A mean is a sum of values that cancel.
            scale=largest_input if name.endswith("running_mean") else None,
        )
    return actual


def cut_into(monkeypatch: pytest.MonkeyPatch, max_programs: int) -> None:
    """Few programs, so that each walks over several tiles, as in a large launch."""
    tilings = {
        key: dataclasses.replace(tiling, tile_bytes=512, max_programs=max_programs)
        for key, tiling in batch_norm_tiling.TILINGS.items()
    }
    monkeypatch.setattr(batch_norm_tiling, "TILINGS", tilings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_as_exact_as_eager(form: str, relu: bool, dtype: torch.dtype, device: str) -> None:
    check(random_inputs((3, 33, 5, 7), form, dtype, device), relu)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_eval_uses_the_running_buffers(form: str, dtype: torch.dtype, device: str) -> None:
    inputs = random_inputs((3, 6, 5, 7), form, dtype, device)
    for bn in filter(None, (inputs.bn, inputs.residual_bn)):
        bn.eval()
    before = copy.deepcopy(inputs.bn.state_dict())
    actual = check(inputs)
    assert all(torch.equal(actual[f"bn.{name}"], before[name]) for name in ("running_mean", "running_var"))


@pytest.mark.parametrize("form", FORMS)
def test_a_value_of_exactly_zero_passes_no_gradient(form: str, device: str) -> None:
    eps = 2.0**-20  # running_var + eps is exactly 1; newer versions of torch take eps = 0, older ones do not
    inputs = random_inputs((2, 6, 3, 5), form, device=device, affine=False, eps=eps)
    for bn in filter(None, (inputs.bn, inputs.residual_bn)):
        bn.eval()
        bn.eps = eps
        bn.running_mean.zero_()
        bn.running_var.fill_(1.0 - eps)
    for tensor in filter(lambda t: t is not None, (inputs.x, inputs.residual)):
        tensor[:, ::2] = 0.0  # normalised it stays 0, the kink of the ReLU
    actual, expected = run(batch_norm_act, inputs), run(reference.batch_norm_act, inputs)
    assert not actual["out"][:, ::2].any()
    assert not actual["grad x"][:, ::2].any()
    assert actual["grad x"][:, 1::2].any()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("training", [(True, False), (False, True)])
def test_each_batch_norm_has_its_own_mode(training: tuple[bool, bool], device: str) -> None:
    inputs = random_inputs((2, 6, 5, 7), "normalized_residual", device=device)
    inputs.bn.train(training[0])
    inputs.residual_bn.train(training[1])
    check(inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("max_programs", [1, 3])
def test_programs_of_several_tiles(form: str, max_programs: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(monkeypatch, max_programs)
    check(random_inputs((3, 5, 11, 13), form, device=device))


@pytest.mark.parametrize("shape", [(7, 1, 3, 5), (2, 3, 5, 5), (3, 1024, 2, 1), (2, 70, 3, 3), (9, 8, 1, 1), (37, 5)])
def test_any_number_of_channels_and_rows(shape: tuple[int, ...], device: str) -> None:
    check(random_inputs(shape, "normalized_residual", device=device))


@pytest.mark.parametrize("form", FORMS)
def test_mean_far_from_zero(form: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(monkeypatch, 3)
    inputs = random_inputs((3, 5, 11, 13), form, device=device)
    far = (1e3 + 1e-2 * torch.randn(inputs.x.shape)).to(device)
    inputs = inputs._replace(x=far.contiguous(memory_format=torch.channels_last))
    # No 1e-5 limit: fp32 rounds the mean itself by up to 3e-5, which is 3e-3 standard deviations, in eager too.
    check(inputs, relu=False, relative_limit=None)


@pytest.mark.parametrize(("mean", "deviation"), [(1e3, 1e-2), (-3e4, 1.0), (0.0, 1e-6)])
def test_variance_keeps_its_precision(
    mean: float, deviation: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_into(monkeypatch, 3)
    torch.manual_seed(0)
    x = (mean + deviation * torch.randn(500, 5)).to(device)
    running = torch.zeros(2, 5, device=device)
    batch_mean, var = batch_norm_statistics(x, *running, momentum=1.0)
    assert_close_to_truth(batch_mean, x.double().mean(0), "mean", limit=1e-7 if mean else 1e-5)
    # 3·eps: the differences from the first value are exact, so the sums' own few roundings are all there is.
    assert_close_to_truth(var, x.double().var(0, unbiased=False), "var", limit=1e-6)
    assert torch.equal(running[0], batch_mean)
    assert_close_to_truth(running[1], x.double().var(0), "unbiased var", limit=1e-6)


@pytest.mark.parametrize("n_rows", [16, 32, 512, 500])
def test_whole_tiles_need_no_mask(n_rows: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program whose tiles are all whole reads them without masks, and its last tile a second time, which it drops."""
    cut_into(monkeypatch, 3)
    assert batch_norm_tiling.row_launch("statistics", n_rows, 8, torch.float32).even == (n_rows % 16 == 0)
    torch.manual_seed(0)
    x = torch.randn(n_rows, 8).to(device)
    mean, var = batch_norm_statistics(x)
    assert_close_to_truth(mean, x.double().mean(0), "mean")
    assert_close_to_truth(var, x.double().var(0, unbiased=False), "var", limit=1e-6)


def test_an_outlier_in_the_first_row(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row is what everything is measured from, so it is the worst place for a value unlike the others."""
    cut_into(monkeypatch, 3)
    torch.manual_seed(0)
    x = (10.0 + torch.randn(500, 5)).to(device)
    x[0] = -1e3
    _, var = batch_norm_statistics(x)
    assert_close_to_truth(var, x.double().var(0, unbiased=False), "var")


def test_constant_channels(device: str) -> None:
    inputs = random_inputs((3, 6, 5, 7), "normalized_residual", device=device)
    inputs.x[:, 1] = 0.1
    inputs.x[:, 4] = -7.3
    inputs.residual[:, 2] = 1e4
    # No 1e-5 limit: 1/sqrt(eps) = 316 multiplies the rounding of a constant channel's mean, in eager too.
    check(inputs, relative_limit=None)
    mean, var = batch_norm_statistics(inputs.x.permute(0, 2, 3, 1).reshape(-1, 6))
    assert float(var[1]) == 0.0
    assert float(mean[4]) == float(inputs.x[0, 4, 0, 0])


def test_parts_of_several_devices(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each merges its own, one merges those: the statistics of all rows, and nn.BatchNorm's buffers."""
    cut_into(monkeypatch, 3)
    torch.manual_seed(0)
    x = (1e3 + 1e-1 * torch.randn(500, 5)).to(device)
    bn = random_bn(5, dims=2, momentum=0.3).to(device)
    expected = copy.deepcopy(bn).double()
    expected(x.double())
    pivot, parts = x[0], x.split([7, 301, 192])
    own = [merge_partials(statistics_partials(part, pivot), len(part)) for part in parts]
    counts = torch.tensor([float(len(part)) for part in parts], device=device)
    gathered = Partials(
        torch.stack([mean for mean, _ in own]),
        torch.stack([var * n for (_, var), n in zip(own, counts, strict=True)]),
        rows_per_part=0,
    )
    running = RunningStatistics(bn.running_mean, bn.running_var, bn.num_batches_tracked, bn.momentum)
    mean, var = merge_partials(gathered, 500, pivot=pivot, counts=counts, running=running)
    assert_close_to_truth(mean, x.double().mean(0), "mean", limit=1e-7)
    assert_close_to_truth(var, x.double().var(0, unbiased=False), "var", limit=1e-6)
    for (name, buffer), wanted in zip(bn.named_buffers(), expected.buffers(), strict=True):
        assert_close_to_truth(buffer.double(), wanted.double(), name, limit=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("uses", "given"), [(2, 1), (3, 2), (4, 3), (4, 4)])
@pytest.mark.parametrize("relu", [True, False])
def test_gradients_of_several_uses(
    form: str, uses: int, given: int, relu: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One result used several times, or one of the uses not at all: as exact as eager's sum."""
    cut_into(monkeypatch, 3)
    check_uses(random_inputs((3, 5, 7, 9), form, dtype, device), uses, given, relu)


def check_uses(inputs: Inputs, uses: int, given: int, relu: bool) -> None:
    """Every gradient of a result with `uses`, of which the first `given` are used, is as exact as eager's."""
    dtype = inputs.x.dtype
    if relu:
        inputs = without_grad_at_the_kink(inputs)
    rounding = torch.where(inputs.grad_out == 0, 0, torch.randn_like(inputs.grad_out.float())).to(dtype)
    weights = [inputs.grad_out, rounding, 2 * rounding, -inputs.grad_out / 2][:given]

    def used(outs: tuple[Tensor, ...]) -> Tensor:
        terms = []
        for place, (out, weight) in enumerate(zip(outs[:given], weights, strict=True)):
            if (place + relu) % 2:  # half of something wider: its gradient lies in one of twice as many channels
                out = torch.cat((torch.zeros_like(out), out), 1)
                weight = torch.cat((-3 * weight, weight), 1).contiguous(memory_format=torch.channels_last)
            terms.append((out * weight).sum())
        return torch.stack(terms).sum()

    def gradients(function: Any, inputs: Inputs) -> dict[str, Tensor]:
        inputs = copy.deepcopy(inputs)
        leaves = {"x": inputs.x, "residual": inputs.residual}
        leaves |= {f"bn.{name}": p for name, p in inputs.bn.named_parameters()}
        if inputs.residual_bn is not None:
            leaves |= {f"residual_bn.{name}": p for name, p in inputs.residual_bn.named_parameters()}
        present = {name: leaf.requires_grad_() for name, leaf in leaves.items() if leaf is not None}
        used(function(*inputs[:4], relu)).backward()
        assert all(leaf.grad is not None for leaf in present.values())
        return {name: leaf.grad for name, leaf in present.items()}  # type: ignore[misc]

    def fused(*arguments: Any) -> tuple[Tensor, ...]:
        return batch_norm_act_repeatable(*arguments, uses=uses).outs

    def eager(*arguments: Any) -> tuple[Tensor, ...]:
        return (reference.batch_norm_act(*arguments),) * uses

    actual, expected = gradients(fused, inputs), gradients(eager, inputs)
    doubles = Inputs(*(None if value is None else copy.deepcopy(value).double() for value in inputs))
    truth = gradients(eager, doubles)
    for name, value in actual.items():
        assert_as_exact_as_eager(value, expected[name], truth[name], name, precision=dtype, relative_limit=1e-5)
    assert all(torch.equal(value, actual[name]) for name, value in gradients(fused, inputs).items())


@pytest.mark.parametrize("shape", [(2, 6, 1, 1), (1, 6, 2, 1), (2, 6)])
@pytest.mark.parametrize("form", FORMS)
def test_two_rows_only(shape: tuple[int, ...], form: str, device: str) -> None:
    inputs = random_inputs(shape, form, device=device)
    # x̂ is ±1 here and the exact gradient of x almost 0: the terms that cancel are of the size of grad_out/deviation,
    # eager rounds them as we do, and 1e-5 of what is left is no measure.
    check(inputs, relative_limit=None)


@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (1, 6)])
def test_one_value_per_channel_is_batch_norms_own_error(shape: tuple[int, ...], device: str) -> None:
    inputs = random_inputs(shape, "normalized_residual", device=device)
    before = copy.deepcopy(inputs.bn.state_dict())
    messages = []
    for function in (batch_norm_act, reference.batch_norm_act):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as error:
            run(function, inputs)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        batch_norm_act(inputs.x, inputs.bn.eval(), inputs.residual, inputs.residual_bn)
    assert all(torch.equal(value, before[name]) for name, value in inputs.bn.state_dict().items())
    inputs.residual_bn.eval()
    check(inputs)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.3, "eps": 1e-3},
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_options_of_batch_norm(options: dict[str, object], training: bool, device: str) -> None:
    inputs = random_inputs((3, 6, 5, 7), "normalized_residual", device=device, **options)
    inputs.bn.train(training)
    inputs.residual_bn.train(training)
    check(inputs)


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
def test_running_statistics_after_five_steps_and_eval_after_train(momentum: float | None, device: str) -> None:
    fused = random_bn(6, momentum=momentum).to(device)
    eager, truth = copy.deepcopy(fused), copy.deepcopy(fused).double()
    for step in range(5):
        torch.manual_seed(step)
        x = random_rows((2, 6, 5, 3), torch.float32, device) * (step + 1)
        batch_norm_act(x, fused)
        eager(x)
        truth(x.double())
        for name in ("running_mean", "running_var"):
            assert_as_exact_as_eager(getattr(fused, name), getattr(eager, name), getattr(truth, name), name)
        assert int(fused.num_batches_tracked) == int(truth.num_batches_tracked) == step + 1
    for bn in (fused, eager, truth):
        bn.eval()
    out, out_eager, out_truth = batch_norm_act(x, fused, relu=False), eager(x), truth(x.double())
    assert_as_exact_as_eager(out, out_eager, out_truth, "eval after train")


def test_tracking_switched_off_after_construction(device: str) -> None:
    inputs = random_inputs((3, 6, 5, 7), "plain", device=device)
    inputs.bn.track_running_stats = False
    before = copy.deepcopy(inputs.bn.state_dict())
    actual = check(inputs)
    assert all(torch.equal(actual[f"bn.{name}"], value) for name, value in before.items() if "running" in name)


def test_eval_without_buffers_uses_the_batch_and_counts_nothing(device: str) -> None:
    inputs = random_inputs((3, 6, 5, 7), "plain", device=device)
    inputs.bn.eval()
    inputs.bn.running_mean = inputs.bn.running_var = None
    assert int(check(inputs)["bn.num_batches_tracked"]) == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_and_buffers_in_the_inputs_dtype(dtype: torch.dtype, training: bool, device: str) -> None:
    inputs = random_inputs((3, 6, 5, 7), "normalized_residual", dtype, device)
    for bn in (inputs.bn, inputs.residual_bn):
        bn.to(dtype).train(training)
    check(inputs)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_any_layout(form: str, device: str) -> None:
    inputs = random_inputs((3, 6, 5, 7), form, device=device)
    expanded = torch.randn(3, 1, 1, 7, device=device).expand(3, 6, 5, 7)
    strided = torch.randn(3, 7, 12, 5, device=device)[:, :, ::2].permute(0, 2, 3, 1)
    for grad_out in (expanded, strided, inputs.grad_out.contiguous()):
        check(inputs._replace(grad_out=grad_out), relu=False)
    actual = run(batch_norm_act, inputs._replace(grad_out=expanded))
    expected = run(batch_norm_act, inputs._replace(grad_out=expanded.contiguous(memory_format=torch.channels_last)))
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())


def test_nchw_input_is_converted_with_a_notice(device: str) -> None:
    inputs = random_inputs((3, 6, 5, 7), "residual", device=device)
    expected = run(batch_norm_act, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(batch_norm_act, inputs)  # channels-last: no notice
    nchw = inputs._replace(x=inputs.x.contiguous(), residual=inputs.residual.contiguous())
    with pytest.warns(UserWarning, match="(x|residual) is not channels-last") as notices:
        actual = run(batch_norm_act, nchw)
    assert len(notices) == 2
    assert notices[0].filename == __file__
    assert actual["out"].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_output_is_written(form: str, training: bool, device: str) -> None:
    inputs = random_inputs((2, 5, 3, 5), form, device=device)
    inputs.bn.train(training)
    check(inputs)


@pytest.mark.parametrize("form", FORMS)
def test_two_runs_give_the_same_bits(form: str, device: str) -> None:
    inputs = random_inputs((3, 33, 5, 7), form, device=device)
    first, second = run(batch_norm_act, inputs), run(batch_norm_act, inputs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_not_hidden(dtype: torch.dtype, device: str) -> None:
    inputs = random_inputs((2, 3, 3, 3), "residual", dtype, device)
    inputs.residual[0, 1, 0, 0] = float("nan")
    inputs.residual[0, 2, 0, 0] = float("inf")
    out = batch_norm_act(inputs.x, inputs.bn, inputs.residual)
    assert torch.isnan(out).nonzero().tolist() == [[0, 1, 0, 0]]
    assert torch.isinf(out).nonzero().tolist() == [[0, 2, 0, 0]]
    inputs.x[1, 0, 0, 0] = float("nan")
    assert torch.isnan(batch_norm_act(inputs.x, inputs.bn)[:, 0]).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_passes_its_gradient_as_torch_passes_it(form: str, device: str) -> None:
    inputs = random_inputs((2, 6, 3, 5), form, device=device)
    for bn in filter(None, (inputs.bn, inputs.residual_bn)):
        bn.eval()  # so that a NaN does not spread
    where = (0, 1, 2, 3)
    (inputs.x if inputs.residual is None else inputs.residual)[where] = float("nan")
    actual, expected = run(batch_norm_act, inputs), run(reference.batch_norm_act, inputs)
    assert actual["out"][where].isnan()
    for name in ("grad x", "grad residual"):
        if name in expected:
            assert expected[name][where] != 0
            torch.testing.assert_close(actual[name][where], expected[name][where])


def test_same_tensor_as_input_and_residual(device: str) -> None:
    inputs = random_inputs((2, 5, 3, 5), "residual", device=device)
    x, twin = (inputs.x.clone().requires_grad_() for _ in range(2))
    batch_norm_act(x, inputs.bn, x).sum().backward()
    reference.batch_norm_act(twin.double(), copy.deepcopy(inputs.bn).double(), twin.double()).sum().backward()
    assert_close_to_truth(x.grad, twin.grad.double(), "grad x")


def test_parameters_do_not_share_gradients(device: str) -> None:
    """Both biases have one gradient, but each its own tensor: clipping in place must not scale it twice."""
    inputs = random_inputs((2, 5, 3, 5), "normalized_residual", device=device)
    biases = (inputs.bn.bias, inputs.residual_bn.bias)
    grad, residual_grad = torch.autograd.grad(batch_norm_act(*inputs[:4]), biases, inputs.grad_out)
    assert torch.equal(grad, residual_grad)
    grad.zero_()
    assert residual_grad.abs().min() > 0


def test_only_inputs_and_channel_vectors_are_saved(device: str) -> None:
    """Full-size tensors kept for the backward pass: x, and the residual where it is needed; nothing else."""
    for form, relu, expected in (
        ("plain", True, 1),
        ("residual", True, 2),
        ("residual", False, 1),
        ("normalized_residual", False, 2),
    ):
        inputs = random_inputs((2, 5, 3, 5), form, device=device)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=saved: kept.append(t) or t, lambda t: t):
            batch_norm_act(inputs.x.requires_grad_(), inputs.bn, inputs.residual, inputs.residual_bn, relu)
        sources = {t.untyped_storage().data_ptr() for t in saved if t.numel() == inputs.x.numel()}
        given = {t.untyped_storage().data_ptr() for t in (inputs.x, inputs.residual) if t is not None}
        assert len(sources) == expected, (form, relu)
        assert sources <= given, (form, relu)


def test_double_backward_is_refused(device: str) -> None:
    inputs = random_inputs((2, 5, 3, 5), "plain", device=device)
    x = inputs.x.requires_grad_()
    (grad,) = torch.autograd.grad(batch_norm_act(x, inputs.bn).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


def op_arguments(form: str, device: str, requires_grad: bool) -> tuple[object, ...]:
    inputs = random_inputs((40, 6), form, device=device)
    mean, var = batch_norm_statistics(inputs.x)
    x = inputs.x.clone().requires_grad_(requires_grad)
    vectors: list[Tensor | None] = [
        mean,
        var,
        *(p.detach().requires_grad_(requires_grad) for p in inputs.bn.parameters()),
    ]
    residual = inputs.residual if inputs.residual is None else inputs.residual.requires_grad_(requires_grad)
    if inputs.residual_bn is None:
        vectors += [None] * 4
    else:
        vectors += [*batch_norm_statistics(inputs.residual.detach()), *inputs.residual_bn.parameters()]
    return (x, residual, *vectors, 1e-5, 1e-5, True, form == "normalized_residual", True)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck_forward(form: str, device: str) -> None:
    torch.library.opcheck(batch_norm_forward, op_arguments(form, device, requires_grad=True))


@pytest.mark.parametrize("form", FORMS)
def test_opcheck_backward_and_statistics(form: str, device: str) -> None:
    with torch.no_grad():
        x, *others = op_arguments(form, device, requires_grad=False)
        for grads in ([torch.randn_like(x)], [torch.randn_like(x), torch.randn(40, 12, device=device)[:, 6:]]):
            torch.library.opcheck(batch_norm_backward, (grads, x, *(_detached(a) for a in others)))
        buffers = (torch.zeros(6, device=device), torch.ones(6, device=device), torch.tensor(3, device=device))
        for arguments in ((x, None, None, None, None), (x, *buffers, 0.1), (x, *buffers, None)):
            torch.library.opcheck(_statistics, arguments)


def _detached(argument: object) -> object:
    return argument.detach() if isinstance(argument, Tensor) else argument


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_torch_compile_fullgraph(form: str, training: bool, device: str) -> None:
    inputs = random_inputs((2, 5, 3, 5), form, device=device)
    inputs.bn.train(training)
    torch.compiler.reset()
    compiled = torch.compile(batch_norm_act, fullgraph=True, backend="aot_eager")
    expected, actual = run(batch_norm_act, inputs), run(compiled, inputs)
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 5, 3)}, ValueError, r"x has shape \(2, 5, 3\); accepted: \(N, C, H, W\) or \(M, C\)"),
        ({"x": torch.ones(2, 5, 3, 3, dtype=torch.float64)}, TypeError, "x has dtype torch.float64; accepted"),
        ({"bn": nn.BatchNorm2d(4)}, ValueError, "bn has 4 channels, but x has shape"),
        ({"bn": nn.LayerNorm(5)}, TypeError, "bn is a LayerNorm; accepted: nn.BatchNorm1d, nn.BatchNorm2d"),
        (
            {"residual": torch.ones(2, 5, 3, 2)},
            ValueError,
            r"residual has shape \(2, 5, 3, 2\); accepted: \(2, 5, 3, 3\)",
        ),
        ({"residual": torch.ones(2, 5, 3, 3, dtype=torch.float16)}, TypeError, "residual has dtype torch.float16"),
        ({"residual": None}, ValueError, "residual_bn is given, but residual is None"),
        ({"residual_bn": nn.BatchNorm2d(6)}, ValueError, "residual_bn has 6 channels, but x has shape"),
        ({"bn": nn.BatchNorm2d(5, dtype=torch.float64)}, TypeError, "running_mean has dtype torch.float64; accepted"),
        ({"x": torch.ones(0, 5, 3, 3), "residual": torch.ones(0, 5, 3, 3)}, ValueError, "at least one row"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*not channels-last")
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], message: str, device: str) -> None:
    inputs = random_inputs((2, 5, 3, 3), "normalized_residual", device=device)
    moved = {name: None if value is None else value.to(device) for name, value in change.items()}  # type: ignore[attr-defined]
    with pytest.raises(error, match=message):
        batch_norm_act(*inputs._replace(**moved)[:4])


def test_too_many_channels_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="1025 channels; accepted: 1 to 1024"):
        batch_norm_act(torch.ones(2, 1025, device=device), nn.BatchNorm1d(1025).to(device))


def test_partners_and_layouts_of_the_op(device: str) -> None:
    x, residual, *rest = op_arguments("normalized_residual", device, requires_grad=False)
    with pytest.raises(ValueError, match="weight and bias must both be given"):
        batch_norm_forward(x, residual, *rest[:3], None, *rest[4:])
    with pytest.raises(ValueError, match="x has strides"):
        batch_norm_forward(x.t().contiguous().t(), residual, *rest)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        batch_norm_statistics(x[:1])
    with pytest.raises(ValueError, match=r"running_mean has shape \(5,\)"):
        batch_norm_statistics(x, torch.zeros(5, device=device))
    for grads, message in (
        ([], "there are 0 gradients"),
        ([x] * 5, "there are 5 gradients of one output; accepted: 1 to 4"),
        ([x, x[:, :5]], r"grads\[1\] has shape"),
        ([x.t().contiguous().t()], r"grads\[0\] has strides"),
    ):
        with pytest.raises(ValueError, match=message):
            batch_norm_backward(grads, x, residual, *rest)


def test_cut_of_the_recipes_shapes_fills_the_gpu() -> None:
    """No launch of the recipe has fewer programs than 132 SMs, more partials than a merge takes, or unread rows."""
    shapes = [(64, 16), (64, 32), (64, 64), (32, 64), (16, 128), (8, 256)]
    for key, tiling in batch_norm_tiling.TILINGS.items():
        for size, n_channels in shapes:
            for dtype in DTYPES:
                n_rows = 576 * size * size
                rows = batch_norm_tiling.row_launch(key, n_rows, n_channels, dtype)
                programs, rows_each = rows.split.programs, rows.split.rows_per_program
                assert 132 <= rows.grid[0] * rows.grid[1] <= tiling.max_programs
                assert (programs - 1) * rows_each < n_rows <= programs * rows_each
                if key.startswith(("statistics", "reduce")):
                    assert programs <= batch_norm_tiling.MAX_PARTIALS
                    sums = 3 if key.startswith("reduce/normalized_residual") else 2
                    assert 4 * sums * programs * n_channels <= n_rows * n_channels * dtype.itemsize / 32


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu_to_itself")  # up to 15 GB
@pytest.mark.parametrize(
    ("n_channels", "size", "dtype"),
    # Each block of channels and each dtype that the audit compiles; then several blocks of channels: the 128 channels
    # of 16×16 maps and the 64 of 32×32 ones run the same code.
    [
        (16, 64, torch.bfloat16),
        (32, 64, torch.bfloat16),
        (32, 64, torch.float32),
        (64, 64, torch.bfloat16),
        (256, 8, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_recipe_shapes_on_the_gpu(form: str, n_channels: int, size: int, dtype: torch.dtype) -> None:
    check(random_inputs((576, n_channels, size, size), form, dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("relu", [True, False])
def test_gradients_of_several_uses_on_the_gpu(form: str, relu: bool, dtype: torch.dtype) -> None:
    """All that a block of the encoder's side of the U-Net has, at the recipe's maps, of a ninth of its frames."""
    check_uses(random_inputs((64, 32, 64, 64), form, dtype, "cuda"), 4, 4, relu)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu_to_itself")  # 20 GB
def test_more_than_2_to_the_31_elements() -> None:
    n_rows, n_channels = 2**26 + 3, 33
    x = torch.zeros(n_rows, n_channels, dtype=torch.bfloat16, device="cuda")
    x[-3:] = 2.0
    bn = nn.BatchNorm1d(n_channels, eps=1e-8).cuda()
    out = batch_norm_act(x.requires_grad_(), bn, relu=False)
    mean = 6.0 / n_rows
    expected = (2.0 - mean) / (mean * (2.0 - mean) + 1e-8) ** 0.5
    torch.testing.assert_close(out[-3:].float(), torch.full_like(out[-3:], expected).float(), rtol=1e-2, atol=0.0)
    out.backward(x.detach())
    assert_close_to_truth(bn.bias.grad, torch.full((n_channels,), 6.0, dtype=torch.float64), "grad bias")
