"""A batch that lies on several ranks gives what it gives on one: statistics, losses, gradients and buffers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compare import assert_as_exact_as_eager, assert_close_to_truth
from fastjepa.distributed.batch_norm import global_batch_norm, global_statistics
from fastjepa.distributed.group import BatchGroup
from fastjepa.distributed.losses import global_std_and_cov_loss
from fastjepa.distributed.ranks import Ranks as ProcessRanks
from fastjepa.fused.losses import swap_losses
from fastjepa.kernels.projected_losses import closed_form, reference
from fastjepa.kernels.shares import Shares, current_shares
from fastjepa.model.jepa import parallel_unroll
from fastjepa.model.losses import projected_losses
from fastjepa.model.running_stats import calls_in_order
from projector_cases import EPS, PARAMETERS, Case, loss_and_gradients, make_case
from ranks import Ranks, assert_same_bits, joined, split, total
from tiny import tiny_jepa

COUNTS = ((2, 1), (1, 3, 2), (3, 0, 2), (0, 2, 1))
every_counts = pytest.mark.parametrize("counts", COUNTS, ids=str)
FLOAT64_LIMIT = 1e-12  # as in the tests of the closed form


# ---- shares ----------------------------------------------------------------------------------------------------------


def test_what_one_rank_gives_for_all_is_given_by_one_that_has_something() -> None:
    """The gradients of a rank that has nothing are dropped, and with them would be the whole."""
    for counts in COUNTS:
        ones = torch.ones(2)
        given = [Shares(counts, rank, torch.clone).once(ones) for rank in range(len(counts))]
        assert torch.equal(total(given, counts), ones.double())


def test_the_entries_of_empty_ranks_are_left_out() -> None:
    shares = Shares((0, 2, 0, 1), 1, torch.clone)
    assert shares.filled(torch.arange(8).view(4, 2)).tolist() == [[2, 3], [6, 7]]
    assert shares.filled(shares.weights(10, torch.zeros(1))).tolist() == [10.0, 5.0]


# ---- BatchNorm in plain torch ----------------------------------------------------------------------------------------


def _batch_norm_inputs(shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(*shape, generator=g, dtype=torch.float64)
    x = x * torch.linspace(0.5, 3, shape[1]).view(-1, *(1,) * (len(shape) - 2)) + 2
    grad = torch.randn(*shape, generator=g, dtype=torch.float64)
    affine = [1 + 0.3 * torch.randn(shape[1], generator=g), torch.randn(shape[1], generator=g)]
    return x.to(dtype), grad.to(dtype), affine


def _norm(channels: int, dtype: torch.dtype, momentum: float | None, affine: list[Tensor] | None) -> Any:
    bn = nn.BatchNorm1d(channels, eps=1e-3, momentum=momentum, affine=affine is not None)
    if affine is not None:
        bn.weight.data, bn.bias.data = affine[0].clone(), affine[1].clone()
    return bn.to(dtype)


def _run_norm(bn: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Two steps, so that a cumulative average has something to average."""
    function = F.batch_norm
    x = x.detach().clone().requires_grad_()
    for factor in (1.0, 0.5):
        bn.num_batches_tracked += 1
        momentum = bn.momentum if bn.momentum is not None else 1 / int(bn.num_batches_tracked)
        y = function(factor * x, bn.running_mean, bn.running_var, bn.weight, bn.bias, True, momentum, bn.eps)
    y.backward(grad)
    results = {"y": y.detach(), "x": x.grad, "running_mean": bn.running_mean, "running_var": bn.running_var}
    if bn.weight is not None:
        results |= {"weight": bn.weight.grad, "bias": bn.bias.grad}
    return results


ROWS, SAME = {"y", "x", "z"}, {"running_mean", "running_var"}


def _merge(results: Sequence[dict[str, Tensor]], counts: Sequence[int], dim: int | None = None) -> dict[str, Tensor]:
    """What one process would have, from what each rank has; checks that what all have is the same."""
    merged = {}
    for name in results[0]:
        parts = [result[name] for result in results]
        if name in ROWS:
            merged[name] = joined(parts, counts)
        elif name.rpartition(".")[2] in SAME:
            assert_same_bits(parts, name)
            merged[name] = parts[0]
        else:
            merged[name] = total(parts, counts).to(parts[0].dtype)
    return merged


@every_counts
@pytest.mark.parametrize("shape", [(6, 3, 4, 5), (6, 4)], ids=["4-D", "2-D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("affine", "momentum"), [(True, 0.3), (False, None)], ids=["affine", "cumulative"])
def test_batch_norm_of_all_ranks(
    counts: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype, affine: bool, momentum: float | None
) -> None:
    shape = (sum(counts), *shape[1:])
    x, grad, vectors = _batch_norm_inputs(shape, dtype)

    def norm(dtype: torch.dtype) -> Any:
        return _norm(shape[1], dtype, momentum, vectors if affine else None)

    def of_rank(shares: Shares) -> dict[str, Tensor]:
        with global_statistics(shares):
            return _run_norm(norm(dtype), split(x, counts, shares.rank), split(grad, counts, shares.rank))

    found = Ranks(counts, of_rank)
    assert len(found.gathered) == 3  # two forward, one backward
    eager, truth = _run_norm(norm(dtype), x, grad), _run_norm(norm(torch.float64), x.double(), grad.double())
    for name, value in _merge(found.results, counts).items():
        if dtype == torch.float64:
            assert_close_to_truth(value, truth[name], name, limit=FLOAT64_LIMIT)
        else:
            assert_as_exact_as_eager(value, eager[name], truth[name], name)


def test_a_batch_norm_needs_two_rows_of_all_ranks() -> None:
    def of_rank(shares: Shares) -> Tensor:
        return global_batch_norm(torch.ones(1, 3), None, None, None, None, momentum=0.1, eps=1e-5, shares=shares)

    assert len(Ranks((1, 1), of_rank).results) == 2
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        Ranks((1, 0), of_rank)


@pytest.mark.parametrize("counts", [(2, 1), (0, 2, 1)], ids=str)
def test_a_mean_far_from_zero(counts: tuple[int, ...]) -> None:
    """A rank that has nothing gives a mean of 0, which nothing may be taken relative to."""
    g = torch.Generator().manual_seed(0)
    x = (1e3 + 1e-2 * torch.randn(sum(counts), 2, 64, generator=g)).float()

    def of_rank(shares: Shares) -> Tensor:
        own = split(x, counts, shares.rank)
        return global_batch_norm(own, None, None, None, None, momentum=0.1, eps=1e-12, shares=shares)

    y = joined(Ranks(counts, of_rank).results, counts)
    eager = F.batch_norm(x, None, None, training=True, eps=1e-12)
    truth = F.batch_norm(x.double(), None, None, training=True, eps=1e-12)
    # fp32 means of 1e3 are 3e-5 apart, beside deviations of 1e-2, in eager as well.
    assert_as_exact_as_eager(y, eager, truth, "y", relative_limit=None)


# ---- modules, whoever calls them -------------------------------------------------------------------------------------


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(3, momentum=0.2)
        self.bn2 = nn.BatchNorm2d(3, momentum=None)
        self.frozen = nn.BatchNorm2d(3).eval()
        nn.init.constant_(self.bn1.bias, 0.3)  # at 0, the second BatchNorm would undo the first one's weight

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.bn2(F.relu(self.bn1(self.conv(x)))))


def _run_module(net: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    (y,) = calls_in_order(net, [0, 0, 0], [lambda: net(x)])
    y.backward(grad)
    assert x.grad is not None
    results = {"y": y.detach(), "x": x.grad}
    results |= {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return results | {name: b.double() for name, b in net.named_buffers() if "running" in name}


@every_counts
def test_modules_within_use_the_statistics_of_all_ranks(counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = _Net().double()
    x, grad = (torch.randn(sum(counts), c, 4, 3, dtype=torch.float64) for c in (2, 3))

    def of_rank(shares: Shares) -> dict[str, Tensor]:
        own = copy.deepcopy(net)
        with global_statistics(shares), global_statistics(shares):  # the second changes nothing
            assert current_shares() is shares
            results = _run_module(own, split(x, counts, shares.rank), split(grad, counts, shares.rank))
        assert current_shares() is None
        return results

    found = Ranks(counts, of_rank)
    assert len(found.gathered) == 4  # once for each of two layers, each way
    expected = _run_module(copy.deepcopy(net), x, grad)
    for name, value in _merge(found.results, counts).items():
        like = "bn1.bias" if name == "conv.bias" else name  # exactly 0: what is left is rounding
        assert (value - expected[name]).abs().max() <= FLOAT64_LIMIT * expected[like].abs().max(), name


# ---- BatchNorm, the residual and the ReLU, fused ---------------------------------------------------------------------


class _Act(NamedTuple):
    """One call of `batch_norm_act_repeatable`."""

    residual: Literal["none", "raw", "normalised"] = "none"
    relu: bool = True
    uses: int = 1
    momentum: float | None = 0.2
    eval: str = ""  # which of "bn" and "residual_bn" are in eval mode
    dtype: torch.dtype = torch.float32
    offset: float = 0.0
    gathers: tuple[int, int] = (1, 1)  # forward, backward


ACTS = {
    "plain": _Act(),
    "no ReLU": _Act(relu=False),
    "cumulative": _Act(momentum=None),
    "residual": _Act("raw", uses=2),
    "residual, no ReLU": _Act("raw", relu=False),
    "normalised residual": _Act("normalised"),
    "normalised residual, 3 uses": _Act("normalised", uses=3, relu=False),
    "bn in eval": _Act("normalised", eval="bn"),
    "both in eval": _Act("normalised", eval="bn residual_bn", gathers=(0, 0)),
    "far from zero": _Act(offset=1e3),
    "normalised residual far from zero": _Act("normalised", offset=1e3),
    "bf16": _Act("normalised", uses=2, dtype=torch.bfloat16),
}
CHANNELS = 5


def _act_modules(act: _Act, device: str) -> nn.ModuleDict:
    g = torch.Generator().manual_seed(1)
    norms = {}
    for name in ("bn", "residual_bn"):
        norm = nn.BatchNorm2d(CHANNELS, momentum=act.momentum, eps=1e-4)
        norm.weight.data = 1 + 0.2 * torch.randn(CHANNELS, generator=g)
        norm.bias.data = torch.randn(CHANNELS, generator=g)
        assert norm.running_mean is not None
        norm.running_mean.copy_(torch.randn(CHANNELS, generator=g))
        norms[name] = norm.train(name not in act.eval.split())
    return nn.ModuleDict(norms).to(device)


def _act_inputs(act: _Act, n: int, device: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)

    def draw(offset: float = 0.0) -> Tensor:
        x = torch.randn(n, CHANNELS, 3, 4, generator=g) * (0.01 if offset else 1.0) + offset
        return x.to(device, act.dtype).contiguous(memory_format=torch.channels_last)

    inputs = {"x": draw(act.offset)} | ({} if act.residual == "none" else {"residual": draw(act.offset)})
    return inputs | {f"grad{i}": draw() for i in range(act.uses)}


def _run_act(act: _Act, norms: nn.ModuleDict, inputs: dict[str, Tensor], function: Any) -> dict[str, Tensor]:
    """`function(x, bn, residual, residual_bn)` gives the result once for each use."""
    x = inputs["x"].detach().clone(memory_format=torch.preserve_format).requires_grad_()
    residual = inputs.get("residual")
    if residual is not None:
        residual = residual.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    outs = function(x, norms["bn"], residual, norms["residual_bn"] if act.residual == "normalised" else None)
    torch.autograd.backward(outs, [inputs[f"grad{i}"] for i in range(act.uses)])
    assert x.grad is not None
    results = {"y": outs[0].detach(), "x": x.grad}
    if residual is not None:
        assert residual.grad is not None
        results["z"] = residual.grad
    results |= {name: p.grad for name, p in norms.named_parameters() if p.grad is not None}
    return results | {name: b for name, b in norms.named_buffers() if "running" in name}


@pytest.mark.parametrize(
    ("name", "counts"), [*((name, (2, 0, 1)) for name in ACTS), ("normalised residual", (0, 1, 1)), ("plain", (1, 3))]
)
def test_fused_batch_norm_of_all_ranks(name: str, counts: tuple[int, ...], device: str) -> None:
    from fastjepa.kernels.batch_norm.fused import batch_norm_act_repeatable  # only here: it needs Triton

    act = ACTS[name]
    inputs, norms = _act_inputs(act, sum(counts), device), _act_modules(act, device)

    def of_rank(shares: Shares) -> dict[str, Tensor]:
        own = {name: split(x, counts, shares.rank) for name, x in inputs.items()}

        def fused(x: Tensor, bn: Any, residual: Tensor | None, residual_bn: Any) -> Any:
            outs, again = batch_norm_act_repeatable(
                x, bn, residual, residual_bn, act.relu, uses=act.uses, shares=shares
            )
            assert torch.equal(again(residual), outs[0])
            return outs

        return _run_act(act, copy.deepcopy(norms), own, fused)

    def eager(x: Tensor, bn: Any, residual: Tensor | None, residual_bn: Any) -> Any:
        y = bn(x)
        if residual is not None:
            y = y + (residual if residual_bn is None else residual_bn(residual))
        return [y.relu() if act.relu else y] * act.uses

    found = Ranks(counts, of_rank)
    n_norms = 2 - len(act.eval.split()) if act.residual == "normalised" else 1
    forward = [(n_norms, 3, CHANNELS)] * act.gathers[0]
    backward = [(3 if act.residual == "normalised" else 2, CHANNELS)] * act.gathers[1]
    assert found.gathered == [*forward, *backward]
    expected = _run_act(act, copy.deepcopy(norms), inputs, eager)
    truth = _run_act(act, copy.deepcopy(norms).double(), {name: x.double() for name, x in inputs.items()}, eager)
    for name, value in _merge(found.results, counts).items():
        limit = None if act.offset else 1e-5  # fp32 means of 1e3 are 6e-5 apart, beside deviations of 1e-2
        precision = act.dtype if act.dtype != torch.float32 else None
        assert_as_exact_as_eager(value, expected[name], truth[name], name, precision=precision, relative_limit=limit)


def test_a_fused_batch_norm_needs_two_rows_of_all_ranks(device: str) -> None:
    from fastjepa.kernels.batch_norm.fused import batch_norm_act_repeatable

    x = torch.ones(1, CHANNELS, device=device)

    def of_rank(shares: Shares) -> Tensor:
        return batch_norm_act_repeatable(x, nn.BatchNorm1d(CHANNELS).to(device), shares=shares).outs[0]

    assert len(Ranks((1, 1), of_rank).results) == 2
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        Ranks((1, 0), of_rank)


def test_torch_compile_is_refused_what_ranks_say_to_each_other(device: str) -> None:
    from fastjepa.kernels.batch_norm.fused import batch_norm_act  # only here: it needs Triton
    from fastjepa.kernels.projected_losses.fused import projected_losses as fused

    shares = Shares((1, 1), 0, lambda tensor: torch.stack([tensor, tensor]))
    case = make_case((4, 3), 1, hidden=4, out=4, device=device)
    bn = nn.BatchNorm1d(3).to(device)

    def normalised(x: Tensor) -> Tensor:
        with global_statistics(shares):
            out: Tensor = bn(x)
            return out

    functions: list[Any] = [
        normalised,
        lambda x: batch_norm_act(x, bn, shares=shares),
        *(
            lambda x, f=f: f(x, [], *case.parameters, EPS, shares).std_loss
            for f in (closed_form.projected_losses, fused)
        ),
    ]
    for function in functions:
        assert function(case.z).isfinite().all()
        with pytest.raises(RuntimeError, match="on several ranks cannot be compiled"):
            torch.compile(function, backend="eager", fullgraph=True)(case.z)


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_covariance_of_all_ranks_far_from_zero_and_under_autocast() -> None:
    counts = (0, 3, 2)
    g = torch.Generator().manual_seed(0)
    features = 300.0 + 0.3 * torch.randn(sum(counts), 16, 5, generator=g)

    def of_rank(shares: Shares) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return global_std_and_cov_loss(split(features, counts, shares.rank).flatten(0, 1), shares)

    results = Ranks(counts, of_rank).results
    eager = reference.std_and_cov_loss(features.flatten(0, 1))
    truth = reference.std_and_cov_loss(features.double().flatten(0, 1))
    for i, name in enumerate(("std_loss", "cov_loss")):
        assert_same_bits([result[i] for result in results], name)
        assert_as_exact_as_eager(results[0][i], eager[i], truth[i], name, relative_limit=None)


def _of_rank(case: Case, counts: Sequence[int], rank: int) -> Case:
    return Case(split(case.z, counts, rank), [split(p, counts, rank) for p in case.predictions], case.parameters)


def _losses_of_ranks(function: Any, case: Case, counts: Sequence[int]) -> tuple[dict[str, Tensor], Ranks[Any]]:
    """As `loss_and_gradients` of one process; and what each rank has."""

    def of_rank(shares: Shares) -> dict[str, Tensor]:
        def with_shares(*arguments: Any) -> Any:
            return function(*arguments, shares=shares)

        return loss_and_gradients(with_shares, _of_rank(case, counts, shares.rank))

    found = Ranks(counts, of_rank)
    merged = {}
    for name in found.results[0]:
        parts = [result[name] for result in found.results]
        if name.removeprefix("gradient of ") in PARAMETERS:
            merged[name] = total(parts, counts).to(parts[0].dtype)
        elif name.startswith("gradient of"):
            merged[name] = joined(parts, counts)
        else:
            assert_same_bits(parts, name)
            merged[name] = parts[0]
    return merged, found


@every_counts
@pytest.mark.parametrize("n_predictions", [0, 1, 2, 5])
def test_closed_form_of_all_ranks(counts: tuple[int, ...], n_predictions: int) -> None:
    case = make_case((sum(counts), 6, 2, 7, 5), n_predictions, hidden=7, out=9).double()
    merged, found = _losses_of_ranks(closed_form.projected_losses, case, counts)
    assert len(found.gathered) == 3  # two forward, one backward
    for name, value in loss_and_gradients(closed_form.projected_losses, case).items():
        assert_close_to_truth(merged[name], value, name, limit=FLOAT64_LIMIT)


def test_closed_form_in_fp32_and_of_single_rows() -> None:
    for counts, shape in (((0, 3, 2), (5, 6, 2, 64, 5)), ((1, 9), (10, 3))):
        case = make_case(shape, 2, hidden=7, out=9)
        merged, _ = _losses_of_ranks(closed_form.projected_losses, case, counts)
        eager = loss_and_gradients(reference.projected_losses, case)
        truth = loss_and_gradients(reference.projected_losses, case.double())
        for name, value in merged.items():
            scale = float(truth["gradient of bn_bias"].abs().max()) if name == "gradient of bias1" else None
            assert_as_exact_as_eager(value, eager[name], truth[name], name, scale=scale)


@pytest.mark.parametrize(
    ("counts", "n_predictions", "dtype"),
    [
        ((2, 1), 0, torch.float32),
        ((2, 0, 1), 2, torch.float32),
        ((0, 1, 2), 1, torch.bfloat16),
        ((2, 1), 5, torch.bfloat16),
    ],
    ids=str,
)
def test_fused_losses_of_all_ranks(
    counts: tuple[int, ...], n_predictions: int, dtype: torch.dtype, device: str
) -> None:
    from fastjepa.kernels.projected_losses.fused import projected_losses as fused  # only here: it needs Triton

    case = make_case((sum(counts), 6, 2, 5, 7), n_predictions, hidden=7, out=9, dtype=dtype, device=device)
    merged, found = _losses_of_ranks(fused, case, counts)
    assert len(found.gathered) == 3  # two forward, one backward
    eager, truth = (loss_and_gradients(reference.projected_losses, c) for c in (case, case.double()))
    for name, value in merged.items():
        scale = float(truth["gradient of bn_bias"].abs().max()) if name == "gradient of bias1" else None
        assert_as_exact_as_eager(value, eager[name], truth[name], name, precision=dtype, scale=scale)


def test_losses_need_two_rows_of_all_ranks() -> None:
    case = make_case((1, 3), 0, hidden=4, out=4)
    with pytest.raises(ValueError, match="1 row"):
        _losses_of_ranks(closed_form.projected_losses, case, (0, 1))


def _group(shares: Shares | None) -> BatchGroup | None:
    if shares is None:
        return None
    group = BatchGroup(ProcessRanks())
    group._shares = shares
    return group


@pytest.mark.parametrize(
    ("path", "counts", "shared"),
    [
        ("eager", (2, 1), True),
        ("eager", (0, 1, 3), True),
        ("eager", (2, 1), False),  # two projectors; the closed form takes one
        ("closed_form", (0, 1, 3), True),
    ],
    ids=str,
)
def test_losses_of_the_model(path: Any, counts: tuple[int, ...], shared: bool) -> None:
    jepa = tiny_jepa().double()
    projector = jepa.regularizer.proj
    other = projector if shared else copy.deepcopy(projector)
    g = torch.Generator().manual_seed(0)
    state, *predictions = (torch.randn(sum(counts), 4, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))

    def run(state: Tensor, predictions: Sequence[Tensor], shares: Shares | None) -> dict[str, Tensor]:
        projectors = nn.ModuleList(copy.deepcopy([projector, other]))
        z, *ps = (x.detach().clone().requires_grad_() for x in (state, *predictions))
        losses = projected_losses(projectors[0], projectors[1], z, ps, path=path, group=_group(shares))
        (
            losses.std_loss
            + 30 * losses.cov_loss
            + losses.prediction_losses @ losses.prediction_losses.new_tensor([1.0, 2.0])
        ).backward()
        results = {
            "losses.running_mean": torch.stack([losses.std_loss, losses.cov_loss, *losses.prediction_losses]).detach()
        }
        results |= {"z": z.grad, "x": torch.cat([p.grad for p in ps], 1)}
        results |= {name: p.grad for name, p in projectors.named_parameters()}
        return results | {name: b for name, b in projectors.named_buffers() if "running" in name}

    def of_rank(shares: Shares) -> dict[str, Tensor]:
        rank = shares.rank
        with global_statistics(shares):
            return run(split(state, counts, rank), [split(p, counts, rank) for p in predictions], shares)

    expected = run(state, predictions, None)
    for name, value in _merge(Ranks(counts, of_rank).results, counts).items():
        like = name.replace("net.0.bias", "net.1.bias")  # exactly 0: what is left is rounding
        scale = float(expected[like].abs().max())
        assert (value - expected[name]).abs().max() <= FLOAT64_LIMIT * scale, name


# ---- a whole JEPA ----------------------------------------------------------------------------------------------------

# The contract for whole models in fp32: results and buffers to 1e-5 of their norm, gradients to 1e-4.
RESULT, GRADIENT = 1e-5, 1e-4
STEPS = 1


def _run_jepa(jepa: Any, video: Tensor, path: Any, shares: Shares | None) -> dict[str, Tensor]:
    """A training step without probes: states, losses, gradients and buffers."""
    projector = jepa.regularizer.proj
    video = video.detach().clone().requires_grad_()
    with global_statistics(shares):
        state, predictions = parallel_unroll(jepa.predictor, jepa.encoder(video), None, STEPS)
        if path == "fused":
            losses = jepa.regularizer.step_losses(jepa.predcost, state, predictions)
        else:
            losses = projected_losses(projector, projector, state, predictions, path=path, group=_group(shares))
    # The losses' gradients of a state are small beside what this adds, which is a sum over the rows.
    outs = torch.cat([state, *predictions], 1)
    (losses.std_loss + 30 * losses.cov_loss + losses.prediction_losses.sum() + 1e-3 * (outs**2).sum()).backward()
    assert video.grad is not None
    results = {"x": video.grad, "y": outs.detach()}
    results["losses.running_mean"] = torch.stack([losses.std_loss, losses.cov_loss, *losses.prediction_losses]).detach()
    results |= {name: p.grad for name, p in jepa.named_parameters() if p.grad is not None}
    return results | {name: b for name, b in jepa.named_buffers() if "running" in name}


def _assert_near_of_norm(found: dict[str, Tensor], truth: dict[str, Tensor], result: float, gradient: float) -> None:
    assert found.keys() == truth.keys()
    for name, value in found.items():
        like = name.replace("net.0.bias", "net.1.bias")  # exactly 0: what is left is rounding
        limit = result if name == "y" or name.rpartition(".")[2] in SAME else gradient
        error, scale = (value.double() - truth[name].double()).norm(), truth[like].double().norm()
        assert error <= limit * scale, f"{name}: {error:.2e} of {scale:.2e}"


def _jepa_and_video(n: int, device: str) -> tuple[Any, Tensor]:
    jepa = tiny_jepa().to(device)
    g = torch.Generator().manual_seed(4)
    for layer in jepa.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.weight.data = 1 + 0.2 * torch.randn(layer.weight.shape, generator=g).to(device)
            layer.bias.data = 0.3 * torch.randn(layer.bias.shape, generator=g).to(device)
    return jepa, torch.rand(n, 1, 3, 8, 8, generator=g).to(device)


@pytest.mark.parametrize(("counts", "path"), [((2, 1), "eager"), ((0, 1, 2), "closed_form")], ids=str)
def test_a_jepa_of_all_ranks_in_float64(counts: tuple[int, ...], path: str) -> None:
    jepa, video = _jepa_and_video(sum(counts), "cpu")
    jepa, video = jepa.double(), video.double()

    def of_rank(shares: Shares) -> dict[str, Tensor]:
        return _run_jepa(copy.deepcopy(jepa), split(video, counts, shares.rank), path, shares)

    merged = _merge(Ranks(counts, of_rank).results, counts)
    truth = _run_jepa(copy.deepcopy(jepa), video, path, None)
    _assert_near_of_norm(merged, truth, FLOAT64_LIMIT, 1e3 * FLOAT64_LIMIT)


def test_a_fused_jepa_of_all_ranks(device: str) -> None:
    from fastjepa.fused.networks import FusedResNet5, FusedStateOnlyPredictor  # only here: it needs Triton

    counts = (0, 2, 1)
    jepa, video = _jepa_and_video(sum(counts), device)

    def of_rank(shares: Shares) -> dict[str, Tensor]:
        own = copy.deepcopy(jepa)
        own.encoder = FusedResNet5.from_eager(own.encoder)
        own.predictor = FusedStateOnlyPredictor.from_eager(own.predictor)
        swap_losses(own, fused=True)
        return _run_jepa(own, split(video, counts, shares.rank), "fused", shares)

    found = Ranks(counts, of_rank)
    # Once each way for each activation: a stem and two of each block, of three blocks and STEPS times of seven; and
    # three times for the losses. With recomputation, which gathers nothing.
    assert len(found.gathered) == 2 * (7 + STEPS * 15) + 3
    truth = _run_jepa(copy.deepcopy(jepa).double(), video.double(), "eager", None)
    _assert_near_of_norm(_merge(found.results, counts), truth, RESULT, GRADIENT)


def test_a_fused_encoder_of_all_ranks_without_recomputation_has_the_same_bits(device: str) -> None:
    from fastjepa.fused.networks import FusedResNet5  # only here: it needs Triton

    counts = (2, 1)
    jepa, video = _jepa_and_video(sum(counts), device)
    runs = []
    for recompute in (True, False):

        def of_rank(shares: Shares, recompute: bool = recompute) -> dict[str, Tensor]:
            encoder = FusedResNet5.from_eager(copy.deepcopy(jepa.encoder), recompute=recompute)
            with global_statistics(shares):
                y = encoder(split(video, counts, shares.rank))
            (y * torch.linspace(-1, 1, y[0].numel(), device=y.device).view(y[0].shape)).sum().backward()
            return {"y": y.detach()} | {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}

        runs.append(_merge(Ranks(counts, of_rank).results, counts))
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name
