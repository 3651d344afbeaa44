"""Inference networks against float64, by kernels and by torch's convolutions; that weights are never stale; rollouts.

In the interpreter a program costs milliseconds for each tap, so kernels run at few pixels, frames and steps there.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from absence import python, without
from bench.folding import folded_batch_norm
from fastjepa import autotune
from fastjepa.fused.autocast import InBf16
from fastjepa.fused.inference import InferenceEncoder, InferencePredictor, for_evaluation, run
from fastjepa.fused.inference import layers as inference_layers
from fastjepa.fused.inference.layers import unet_layers
from fastjepa.fused.inference.networks import InferenceNetwork
from fastjepa.fused.swap import _copy_modes
from fastjepa.graphs import GraphedRollout, GraphedTrainStep
from fastjepa.graphs.capture import Recording
from fastjepa.kernels.convolution import recipe
from fastjepa.model.jepa import JEPA, eval_mode, parallel_unroll
from fastjepa.model.networks import ResNet5, ResUNet, StateOnlyPredictor
from fastjepa.policy import judge, relative_errors
from fastjepa.training.evaluation import rollout_tails
from graph_cases import EVERY_DEVICE, some_clips, some_step, trained_jepa
from original import action_unet_jepa, original_jepa
from tiny import tiny_batch

D = 4
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def settled(network: nn.Module, *inputs: Tensor) -> Any:
    """In eval mode, with the statistics of a first batch, and affine parameters off their defaults."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
            with torch.no_grad():
                layer.weight.uniform_(0.8, 1.2)
                layer.bias.uniform_(-0.2, 0.2)
    with torch.no_grad():
        network.train()(*inputs)
    return network.eval()


def an_encoder(width: int = 16, channels: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    frames = torch.rand(4, channels, 8, 8)
    return settled(ResNet5(channels, width, D, **options), frames)


def a_predictor(width: int = 16, context: int = 2, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    predictor = StateOnlyPredictor(ResUNet(context * D, width, D), context)
    return settled(predictor, torch.rand(2, D, context + 1, 8, 8))


def states_of(batch: int = 1, frames: int = 2, size: tuple[int, int] = (8, 8)) -> Tensor:
    return torch.rand(batch, D, frames, *size, generator=torch.Generator().manual_seed(4))


def autocast(precision: str, device: str = "cpu") -> Any:
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16")


def assert_exact(actual: Tensor, eager: Tensor, truth: Tensor, precision: str) -> None:
    """The policy for what goes through many layers: by norms."""
    assert truth.dtype == torch.float64
    expected = {"result": truth}
    found, beside = (relative_errors({"result": x}, expected, {}, expected, "norm") for x in (actual, eager))
    judgement = judge(found, beside, precision)
    assert judgement.exact, f"error {judgement.ours:.2e} beyond {judgement.bound:.2e}"


def assert_as_exact_as_eager(folded: nn.Module, network: nn.Module, x: Tensor, precision: str) -> None:
    """Eager in bf16 is the folded copy in autocast."""
    device = x.device.type
    with torch.no_grad():
        assert folded.folds_now()  # type: ignore[operator]
        truth = copy.deepcopy(network).double()(x.double())
        eager = network if precision == "fp32" else folded_batch_norm(network)
        with autocast(precision, device):
            actual, beside = folded(x), eager(x)
    assert actual.dtype == beside.dtype
    assert_exact(actual, beside, truth, precision)


def literal(predictor: Callable[..., Tensor], states: Tensor, steps: int) -> Tensor:
    """The autoregressive rollout, spelled out."""
    with torch.no_grad():
        for _ in range(steps):
            states = torch.cat((states, predictor(states[:, :, -2:])[:, :, -1:].to(states.dtype)), dim=2)
    return states


# ---- the same numbers ----


@PRECISIONS
@pytest.mark.parametrize("size", [(8, 8), (9, 10), (5, 3)])
@pytest.mark.parametrize("options", [{}, {"s1": 2, "s3": 2}, {"channels": 3}, {"avg_pool": True, "s2": 2}])
def test_an_encoder_by_torch(options: dict[str, Any], size: tuple[int, int], precision: str) -> None:
    network = an_encoder(**options)
    channels = options.get("channels", 1)
    x = torch.rand(3, channels, *size) if options.get("avg_pool") else torch.rand(2, channels, 3, *size)
    assert_as_exact_as_eager(InferenceEncoder.from_eager(network, convolutions="eager"), network, x, precision)


@pytest.mark.parametrize(
    ("options", "size", "precision"),
    [
        ({}, (3, 5), "fp32"),
        ({}, (4, 8), "bf16"),
        ({"channels": 3, "s1": 2, "avg_pool": True}, (5, 7), "fp32"),
    ],
)
def test_an_encoder_by_kernels(options: dict[str, Any], size: tuple[int, int], precision: str, device: str) -> None:
    network = an_encoder(**options).to(device)
    channels = options.get("channels", 1)
    x = torch.rand(1, channels, *size) if options.get("avg_pool") else torch.rand(1, channels, 1, *size)
    folded = InferenceEncoder.from_eager(network, convolutions="fused")
    assert_as_exact_as_eager(folded, network, x.to(device), precision)


@PRECISIONS
@pytest.mark.parametrize("size", [(8, 8), (9, 10), (5, 3)])
@pytest.mark.parametrize("context", [1, 2, 3])
def test_a_predictor_by_torch(context: int, size: tuple[int, int], precision: str) -> None:
    network = a_predictor(context=context)
    folded = InferencePredictor.from_eager(network, convolutions="eager")
    assert_as_exact_as_eager(folded, network, states_of(2, 5, size), precision)


@pytest.mark.parametrize(
    ("context", "size", "precision"),
    [(2, (5, 6), "fp32"), (2, (4, 8), "bf16"), (1, (4, 4), "fp32"), (3, (4, 4), "fp32")],
)
def test_a_predictor_by_kernels(context: int, size: tuple[int, int], precision: str, device: str) -> None:
    network = a_predictor(8 if context == 2 else 4, context).to(device)
    folded = InferencePredictor.from_eager(network, convolutions="fused")
    assert_as_exact_as_eager(folded, network, states_of(1, context, size).to(device), precision)


def test_biases_of_convolutions_and_norms_without_affine_are_folded() -> None:
    network = an_encoder()
    network.layer2.conv1 = nn.Conv2d(16, 32, 3, padding=1)
    network.layer2.shortcut[0] = nn.Conv2d(16, 32, 1)
    network.layer1.bn1 = nn.BatchNorm2d(16, affine=False, eps=1e-2)
    network.eval()
    x = torch.rand(1, 1, 2, 8, 8)
    assert_as_exact_as_eager(InferenceEncoder.from_eager(network, convolutions="eager"), network, x, "fp32")


def test_in_float64_everything_is_torchs() -> None:
    network = a_predictor().double()
    folded = InferencePredictor.from_eager(network, torch.bfloat16, convolutions="eager")
    states = states_of(2, 4).double()
    with torch.no_grad():
        torch.testing.assert_close(folded(states), network(states), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("convolutions", ["eager", "fused"])
def test_a_head_that_no_launch_can_hold_is_one_of_its_own(
    convolutions: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = a_predictor(4).to(device)
    monkeypatch.setattr(inference_layers, "MOST_BEFORE_HEAD", 3)
    folded = InferencePredictor.from_eager(network, convolutions=convolutions)
    assert [layer.name for layer in folded._folded.layers[-2:]] == ["dec1.conv2", "head"]
    assert_as_exact_as_eager(folded, network, states_of(size=(4, 4)).to(device), "fp32")


def test_the_networks_of_the_original() -> None:
    theirs = original_jepa(h=8, d=D)
    video = torch.rand(2, 1, 4, 9, 10)
    states = settled(theirs.encoder, video)(video).detach()
    settled(theirs.predictor, states, None)
    encoder = InferenceEncoder.from_eager(theirs.encoder, convolutions="eager")
    predictor = InferencePredictor.from_eager(theirs.predictor, convolutions="eager")
    assert_as_exact_as_eager(encoder, theirs.encoder, video, "fp32")
    with torch.no_grad():
        torch.testing.assert_close(predictor(states), theirs.predictor(states, None), rtol=1e-4, atol=1e-5)
    assert predictor.train()(states).requires_grad


def test_fused_networks_are_folded_too(device: str) -> None:
    from fastjepa.fused.networks import FusedResNet5, FusedStateOnlyPredictor

    encoder, predictor = an_encoder(8).to(device), a_predictor(4).to(device)
    video, states = torch.rand(1, 1, 1, 8, 8).to(device), states_of().to(device)
    of_encoder = InferenceEncoder.from_eager(FusedResNet5.from_eager(encoder), convolutions="eager")
    of_predictor = InferencePredictor.from_eager(
        FusedStateOnlyPredictor.from_eager(predictor, torch.bfloat16), convolutions="eager"
    )
    assert_as_exact_as_eager(of_encoder, encoder, video, "fp32")
    assert of_predictor.autocast_dtype == torch.bfloat16  # that of the network
    with torch.no_grad():
        expected = InferencePredictor.from_eager(predictor, torch.bfloat16, convolutions="eager")(states)
        assert torch.equal(of_predictor(states), expected)


def test_results_have_the_dtype_of_the_input_or_of_the_autocast_around() -> None:
    encoder, predictor = an_encoder(), a_predictor()
    video, states = torch.rand(1, 1, 2, 8, 8), states_of()
    with torch.no_grad():
        for network, kind, x in ((encoder, InferenceEncoder, video), (predictor, InferencePredictor, states)):
            plain, own = (
                kind.from_eager(network, convolutions="eager"),
                kind.from_eager(network, torch.bfloat16, convolutions="eager"),
            )
            with torch.autocast("cpu", dtype=torch.bfloat16):
                expected = plain(x)
            assert (expected.dtype, plain(x).dtype, own(x).dtype) == (torch.bfloat16, torch.float32, torch.float32)
            assert torch.equal(own(x), expected.float())
            with torch.autocast("cpu", dtype=torch.float16):
                assert plain(x).dtype == torch.float16
                assert torch.equal(own(x), expected.float())
            assert torch.equal(plain.to(torch.bfloat16)(x.to(torch.bfloat16)), kind.from_eager(
                copy.deepcopy(network).to(torch.bfloat16), convolutions="eager")(x.to(torch.bfloat16)))  # fmt: skip
            network.float()
    assert InferencePredictor.from_eager(_in_bf16(predictor), convolutions="eager").autocast_dtype == torch.bfloat16


def _in_bf16(predictor: Any) -> Any:
    wrapped = copy.deepcopy(predictor)
    wrapped.predictor = InBf16(wrapped.predictor)
    return wrapped


# ---- rollouts ----


def launched_quickly(layer: Any, architecture: int) -> Any:
    """Sixteen steps of a sum at a time, of which the interpreter makes one."""
    from fastjepa.kernels.convolution import split_k, table
    from fastjepa.kernels.launch import LaunchConfig

    if layer.is_transposed or not split_k.fits(layer, 16):
        return table.choose(layer, architecture)
    sizes = {"P": 16, "N": 16, "D": 16, "I": 16, "O": max(16, 1 << (layer.out - 1).bit_length())}
    return table.Launch("split_k", LaunchConfig(4, 1, {f"BLOCK_{name}": size for name, size in sizes.items()}))


@PRECISIONS
@pytest.mark.parametrize("by_kernels", [False, True])
def test_a_rollout_of_fifty_steps(
    precision: str, by_kernels: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of states that neither die nor explode: they still move at its end."""
    device = request.getfixturevalue("device") if by_kernels else "cpu"
    if by_kernels and device == "cpu":
        monkeypatch.setattr("fastjepa.kernels.convolution.op.choose", launched_quickly)
    predictor = a_predictor(16, seed=5) if by_kernels else a_predictor(8, seed=3)
    with torch.no_grad():
        predictor.predictor.head.weight.mul_(0.25 if by_kernels else 0.35)
    states = states_of(size=(4, 4) if by_kernels else (8, 8))
    truth = literal(copy.deepcopy(predictor).double(), states.double(), 50)
    last, before, first = (truth[:, :, t].norm() for t in (-1, -2, 2))
    assert 0.2 < last / first < 5
    assert (truth[:, :, -1] - truth[:, :, -2]).norm() > 1e-3 * before
    predictor, states = predictor.to(device), states.to(device)
    with autocast(precision, device):
        eager = literal(predictor if precision == "fp32" else folded_batch_norm(predictor), states, 50)
        actual = InferencePredictor.from_eager(predictor, convolutions="fused" if by_kernels else "eager").roll_out(
            states, 50
        )
    assert actual.dtype == states.dtype
    assert torch.equal(actual[:, :, :2], states)
    assert_exact(actual, eager, truth.to(device), precision)


def test_a_rollout_by_kernels_is_the_steps_one_after_another_and_has_the_same_bits_twice(device: str) -> None:
    folded = InferencePredictor.from_eager(a_predictor(4).to(device), torch.bfloat16, convolutions="fused")
    states = states_of(frames=3, size=(4, 4)).to(device)
    found = folded.roll_out(states, 1)
    assert torch.equal(found, literal(folded, states, 1))
    assert torch.equal(found, folded.roll_out(states, 1))


class Operators(TorchDispatchMode):
    """The operators that run; views run nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func.name()).partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("size", "resized"), [((8, 8), 0), ((9, 10), 3)])
def test_a_step_is_eighteen_launches_and_nothing_else(
    size: tuple[int, int], resized: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fastjepa.kernels.convolution.op as op

    monkeypatch.setattr(op, "launch", lambda *_: None)  # what they compute is seen elsewhere
    predictor = a_predictor(4).to(device)
    folded = InferencePredictor.from_eager(predictor, convolutions="fused")
    states = states_of(1, 3, size).to(device)
    with torch.no_grad(), Operators() as once:
        folded.roll_out(states, 1)  # weights are folded, memory is made
    counts = []
    for steps in (1, 4):
        with torch.no_grad(), Operators() as counted:
            folded.roll_out(states, steps)
        counts.append(counted.names)
    assert counts[0].count("fastjepa::convolution") == 18
    more = list(counts[1])
    for name in counts[0]:
        more.remove(name)
    assert sorted(set(more)) == ["aten::upsample_bilinear2d"] * bool(resized) + ["fastjepa::convolution"]
    assert more.count("fastjepa::convolution") == 3 * 18
    assert more.count("aten::upsample_bilinear2d") == 3 * resized
    assert len(once.names) > len(counts[0])
    with torch.no_grad(), Operators() as counted:
        list(folded.tails(states_of(1, 6, size).to(device), 3))
    assert counted.names.count("aten::copy_") <= 1 + 3  # the given states, and what precedes each tail


def test_in_inference_mode_and_outside_the_memory_is_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastjepa.kernels.convolution.op as op

    written: list[set[int]] = []
    monkeypatch.setattr(op, "launch", lambda operands, _: written[-1].add(operands.out.data_ptr()))
    folded = InferencePredictor.from_eager(a_predictor(4).to(device), convolutions="fused")
    states, out = states_of().to(device), states_of(frames=4).to(device)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        written.append(set())
        with mode():
            folded.roll_out(states, 2, out)
            folded.predictor.conv1.weight.mul_(2)  # type: ignore[union-attr, operator]
    assert len(written[0] & written[1] & written[2]) >= len(written[0]) - 2  # all but the two frames


def test_an_image_of_one_channel_is_read_where_it_lies(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastjepa.kernels.convolution.op as op

    read = []
    monkeypatch.setattr(op, "launch", lambda operands, _: read.append(operands.x))
    folded = InferenceEncoder.from_eager(an_encoder(8).to(device), torch.bfloat16, convolutions="fused")
    video = torch.rand(2, 1, 3, 8, 8).to(device)
    with torch.no_grad():
        folded(video)
    assert len(read) == 7
    assert (read[0].data_ptr(), read[0].dtype, len(read[0])) == (video.data_ptr(), torch.float32, 6)


@pytest.mark.parametrize("context", [1, 2, 3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_rollouts_and_tails_are_those_of_single_calls(context: int, dtype: torch.dtype | None) -> None:
    folded = InferencePredictor.from_eager(a_predictor(context=context), dtype, convolutions="eager")
    states = states_of(3, context + 4, (9, 7))
    expected, tails, current = states, [], states
    with torch.no_grad():
        for _ in range(4):
            expected = torch.cat((expected, folded(expected[:, :, -context:])), dim=2)
        for s in range(3):
            tails.append(folded(current[:, :, s:-1]))
            current = torch.cat((current[:, :, : s + context], tails[-1]), dim=2)
        assert torch.equal(folded.roll_out(states, 4), expected)
        out = states.new_empty(expected.transpose(0, 2).shape).transpose(0, 2)
        assert folded.roll_out(states, 4, out) is out
        assert torch.equal(out, expected)
        found = list(folded.tails(states, 3))
    for tail, wanted in zip(found, tails, strict=True):
        assert torch.equal(tail, wanted)
        assert tail.dtype == wanted.dtype == torch.float32


def test_a_model_rolls_out_encodes_and_unrolls_through_them() -> None:
    jepa = trained_jepa()
    folded = JEPA(
        encoder := InferenceEncoder.from_eager(jepa.encoder, convolutions="eager"),
        encoder,
        InferencePredictor.from_eager(jepa.predictor, convolutions="eager"),
        jepa.regularizer,
        jepa.predcost,
    )
    video = tiny_batch(5, 4)[0]
    for call in (
        lambda j: j.rollout(video, 3),
        lambda j: j.rollout(video, 3, chunk=2),
        lambda j: j.rollout(states=states_of(2, 3, (16, 16)), steps=2),
    ):
        expected, found = call(jepa), call(folded)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert found.is_contiguous()
    with eval_mode(jepa, folded):
        torch.testing.assert_close(folded.encode(video), jepa.encode(video), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(folded.infer(video), jepa.infer(video), rtol=1e-4, atol=1e-5)
        states = jepa.encode(video)
        unrolled = parallel_unroll(folded.predictor, states, None, 2)[1]
        for sequence, wanted in zip(unrolled, parallel_unroll(jepa.predictor, states, None, 2)[1], strict=True):
            torch.testing.assert_close(sequence, wanted, rtol=1e-4, atol=1e-5)
        tails = rollout_tails(folded.predictor, states, 2)
        for tail, wanted in zip(tails, rollout_tails(jepa.predictor, states, 2), strict=True):
            torch.testing.assert_close(tail, wanted, rtol=1e-4, atol=1e-5)


def test_whoever_waits_for_calls_of_a_predictor_gets_them() -> None:
    jepa = trained_jepa()
    jepa.predictor = InferencePredictor.from_eager(jepa.predictor, convolutions="eager")
    calls: list[int] = []
    rolled_out = jepa.rollout(states=states_of(1, 2, (16, 16)), steps=3)
    jepa.predictor.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].shape[2]))
    assert torch.equal(jepa.rollout(states=states_of(1, 2, (16, 16)), steps=3), rolled_out)
    assert calls == [2, 2, 2]


# ---- as the module that was replaced ----


def folded_pair() -> list[tuple[InferenceNetwork, nn.Module, Tensor]]:
    encoder, predictor = an_encoder(8), a_predictor(8)
    return [
        (InferenceEncoder.from_eager(encoder, convolutions="eager"), encoder, torch.rand(2, 1, 3, 8, 8)),
        (InferencePredictor.from_eager(predictor, convolutions="eager"), predictor, states_of(2, 4)),
    ]


def test_everything_is_shared_with_the_module_that_was_replaced() -> None:
    for folded, network, _ in folded_pair():
        assert list(folded.state_dict()) == list(network.state_dict())
        for (name, mine), (wanted, theirs) in zip(folded.named_parameters(), network.named_parameters(), strict=True):
            assert name == wanted
            assert mine is theirs
        assert dict(folded.named_buffers()).keys() == dict(network.named_buffers()).keys()
        assert len(list(folded.parameters())) == len(list(network.parameters()))
        assert for_evaluation(folded, "encoder") is folded
        for training in (False, True):
            assert folded.train(training).source is network  # type: ignore[comparison-overlap]
            assert network.training is training
        folded.conv1.eval() if isinstance(folded, InferenceEncoder) else folded.predictor.eval()  # type: ignore[operator]
        _copy_modes(folded, network)
        assert network.training


def test_in_training_mode_or_with_gradients_the_network_runs_as_it_was() -> None:
    for folded, network, x in folded_pair():
        twin = copy.deepcopy(network)
        assert torch.equal(folded(x), network(x))  # gradients are enabled
        assert folded(x).requires_grad
        with torch.no_grad():
            assert not torch.equal(folded(x), network(x))  # another computation
            folded.train()
            assert torch.equal(folded(x), twin.train()(x))
            for mine, theirs in zip(folded.buffers(), twin.buffers(), strict=True):
                assert torch.equal(mine, theirs)
            folded.eval()
            next(m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)).train()
            assert not folded.folds_now()
        if isinstance(folded, InferencePredictor):
            assert torch.equal(folded.train().roll_out(x, 2), literal(twin, x, 2))
            with pytest.raises(RuntimeError, match="eval mode"):
                next(rollout_tails(folded, x, 1))
            folded.eval()
            for tail, wanted in zip(rollout_tails(folded, x, 2), rollout_tails(network, x, 2), strict=True):
                assert tail.requires_grad
                assert torch.equal(tail, wanted)


def test_in_training_mode_an_autocast_of_its_own_stays() -> None:
    network = an_encoder(8)
    folded = InferenceEncoder.from_eager(network, torch.bfloat16, convolutions="eager")
    video = torch.rand(1, 1, 2, 8, 8)
    assert torch.equal(folded(video), InBf16(network)(video))


def test_modules_that_are_replaced_later_are_followed() -> None:
    for folded, _, x in folded_pair():
        with torch.no_grad():
            before = folded(x)
            block = folded.layer3 if isinstance(folded, InferenceEncoder) else folded.predictor.dec1  # type: ignore[union-attr]
            block.conv1 = copy.deepcopy(block.conv1)  # type: ignore[union-attr]
            block.conv1.weight.mul_(2)  # type: ignore[union-attr, operator]
            assert_follows(folded, x, before)
            before = folded(x)
            if isinstance(folded, InferencePredictor):
                folded.predictor = a_predictor(8, seed=3).predictor
            else:
                folded.conv1 = copy.deepcopy(folded.conv1)
                folded.conv1.weight.mul_(3)  # type: ignore[operator]
            assert_follows(folded, x, before)


def test_copies_and_pickles_fold_their_own_weights() -> None:
    for folded, _, x in folded_pair():
        with torch.no_grad():
            before = folded(x)
            other = copy.deepcopy(folded)
            assert other._kept is None  # memory for maps, say, which it makes itself when it needs it
            assert torch.equal(other(x), before)
            next(other.parameters()).mul_(2)
            assert torch.equal(folded(x), before)
            assert_follows(other, x, before)
            file = io.BytesIO()
            torch.save(folded, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=False)
            assert torch.equal(loaded(x), before)


def test_results_are_memory_of_their_own_and_sizes_take_turns() -> None:
    folded, _, x = folded_pair()[1]
    with torch.no_grad():
        sizes = [(8, 8), (9, 7), (4, 4), (16, 8), (10, 10), (8, 8)]
        inputs = [states_of(1 + i % 3, 3, size) for i, size in enumerate(sizes)]
        first = [folded(x) for x in inputs]
        kept = [x.clone() for x in first]
        for x, out, wanted in zip(inputs, first, kept, strict=True):
            assert torch.equal(folded(x), wanted)
            assert torch.equal(out, wanted)
    with torch.inference_mode():
        assert torch.equal(folded(inputs[0]), kept[0])
        fresh, _, _ = folded_pair()[1]
        inside = fresh(inputs[1])  # of which maps are resized
        fresh.refresh()
    with torch.no_grad():
        assert torch.equal(fresh(inputs[1]), inside)  # memory that was made there is no trap
        fresh.refresh()


# ---- what is registered later ----


def _hook(network: nn.Module) -> Callable[[], None]:
    return _conv(network).register_forward_hook(lambda module, inputs, out: 2 * out).remove  # type: ignore[no-any-return]


def _pre_hook_of_the_network(network: nn.Module) -> Callable[[], None]:
    return network.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0], *inputs[1:])).remove


def _hook_of_all(network: nn.Module) -> Callable[[], None]:
    double = lambda module, inputs, out: 2 * out if isinstance(module, nn.ConvTranspose2d | nn.BatchNorm2d) else None  # noqa: E731
    return nn.modules.module.register_module_forward_hook(double).remove


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _parametrization(network: nn.Module) -> Callable[[], None]:
    conv = _conv(network)
    parametrize.register_parametrization(conv, "weight", Doubled())
    return lambda: parametrize.remove_parametrizations(conv, "weight", leave_parametrized=False)  # type: ignore[return-value]


def _forward_of_its_own(network: nn.Module) -> Callable[[], None]:
    conv = _conv(network)
    conv.forward = lambda x: 2 * type(conv).forward(conv, x)
    return lambda: delattr(conv, "forward")


@pytest.mark.parametrize(
    "register", [_hook, _pre_hook_of_the_network, _hook_of_all, _parametrization, _forward_of_its_own]
)
def test_what_is_registered_on_a_module_later_runs(register: Callable[[nn.Module], Callable[[], None]]) -> None:
    """The network that was given runs then, and the launches again once that is gone."""
    for folded, network, x in folded_pair():
        rollout = GraphedRollout(folded, 2) if isinstance(folded, InferencePredictor) else None
        with torch.no_grad():
            before, plain = folded(x), network(x)
            rolled_out = rollout(x) if rollout else None
            remove = register(network)
            expected = network(x)
            assert not torch.allclose(expected, plain)
            assert torch.equal(folded(x), expected)
            if isinstance(folded, InferencePredictor) and rollout:
                assert torch.equal(folded.roll_out(x, 2), literal(network, x, 2))
                assert torch.equal(rollout(x), literal(network, x[:, :, -2:], 2))
            remove()
            assert torch.equal(folded(x), before)
            assert rollout is None or torch.equal(rollout(x), rolled_out)  # type: ignore[arg-type]


def test_auto_takes_what_is_fastest(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastjepa.kernels.convolution.op as op

    launched: list[Any] = []
    monkeypatch.setattr(op, "launch", lambda operands, _: launched.append(operands.layer))
    asked: list[tuple[str, list[str]]] = []

    def last(key: str, candidates: Any, device: torch.device) -> str:
        for candidate in candidates.values():
            candidate()
        asked.append((key, list(candidates)))
        return list(candidates)[-1]

    network, states = a_predictor(4).to(device), states_of(size=(4, 4)).to(device)
    folded = InferencePredictor.from_eager(network)
    with torch.no_grad():
        expected = InferencePredictor.from_eager(network, convolutions="eager")(states)
        monkeypatch.setattr(autotune, "fastest", lambda key, candidates, device: next(iter(candidates)))
        assert torch.equal(folded(states), expected)
        assert launched == []
        monkeypatch.setattr(autotune, "fastest", last)
        folded(states)
        assert len(launched) == 2 * 18  # a candidate, and the call
        assert asked == [("InferencePredictor 4 1x4x4 torch.float32", ["eager", "fused"])]
        wide = InferencePredictor.from_eager(StateOnlyPredictor(ResUNet(2 * D, 80, D)).to(device).eval())
        wide(states)
        assert len(asked) == 1  # there is no choice


# ---- weights are never stale ----


def assert_follows(folded: nn.Module, x: Tensor, before: Tensor) -> None:
    """The result is that of the weights of now, and another than before."""
    kind: Any = type(folded)
    with torch.no_grad():
        found = folded(x)
        wanted = kind.from_eager(copy.deepcopy(folded.source), convolutions="eager")(x)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, before)


def _step(network: nn.Module, x: Tensor, fused: bool) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, fused=fused)
    network(x).square().mean().backward()
    optimizer.step()


def _load(network: nn.Module, x: Tensor, assign: bool = False) -> None:
    state = {name: value * 2 if value.is_floating_point() else value for name, value in network.state_dict().items()}
    network.load_state_dict(state, assign=assign)


def _train_mode(network: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        network.train()(x * 2)
    network.eval()


def _conv(network: nn.Module) -> Any:
    return next(m for m in network.modules() if isinstance(m, nn.Conv2d))


def _with_inference_tensors(network: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        _conv(network).weight = nn.Parameter(_conv(network).weight * 2, requires_grad=False)


def _in_inference_mode(network: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        next(network.parameters()).mul_(2)


CHANGES: list[Callable[[Any, Tensor], object]] = [
    partial(_step, fused=False),
    partial(_step, fused=True),  # whose changes torch does not count
    _load,
    partial(_load, assign=True),
    _train_mode,
    _with_inference_tensors,
    _in_inference_mode,
    torch.no_grad()(lambda n, x: list(n.parameters())[-1].add_(1)),
    lambda n, x: next(n.buffers()).add_(1),
    lambda n, x: setattr(next(m for m in n.modules() if isinstance(m, nn.BatchNorm2d)), "eps", 0.1),
    lambda n, x: setattr(_conv(n), "weight", nn.Parameter(_conv(n).weight.detach() * 2)),
    lambda n, x: setattr(_conv(n), "bias", nn.Parameter(torch.ones(_conv(n).out_channels))),
    lambda n, x: setattr(next(n.parameters()), "data", next(n.parameters()).data * 2),
]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_are_folded_again(change: Callable[[nn.Module, Tensor], None]) -> None:
    for folded, network, x in folded_pair():
        with torch.no_grad():
            before = folded(x)
            assert torch.equal(folded(x), before)
        change(network, x)
        assert_follows(folded, x, before)


def test_inference_tensors_that_change_are_folded_again() -> None:
    """They do not count their changes: nobody can tell."""
    folded, network, x = folded_pair()[0]
    _with_inference_tensors(network, x)
    with torch.inference_mode():
        before = folded(x).clone()
        network.conv1.weight.mul_(2)  # type: ignore[operator, union-attr]
        assert not torch.equal(folded(x), before)


def test_statistics_that_nobody_counts_are_read_in_each_call() -> None:
    folded, network, x = folded_pair()[0]
    network.bn1.num_batches_tracked = None  # type: ignore[assignment]
    with torch.no_grad():
        before = folded(x)
    _train_mode(network.bn1, torch.rand(2, 8, 8, 8))  # type: ignore[arg-type]
    assert_follows(folded, x, before)


def test_what_torch_cannot_see_needs_refresh() -> None:
    for folded, network, x in folded_pair():
        with torch.no_grad():
            before = folded(x)
            next(network.parameters()).data.mul_(2)
            assert torch.equal(folded(x), before)
            folded.refresh()
        assert_follows(folded, x, before)


def test_weights_are_folded_where_they_were() -> None:
    folded, network, x = folded_pair()[1]
    with torch.no_grad():
        folded(x)
        weights = next(iter(folded._folded.weights.values())).of
        addresses = [w["weight"].data_ptr() for w in weights.values()]  # type: ignore[union-attr]
        network.predictor.conv1.weight.mul_(2)  # type: ignore[union-attr, operator]
        folded(x)
    assert [w.of for w in folded._folded.weights.values()] == [weights]
    assert [w["weight"].data_ptr() for w in weights.values()] == addresses  # type: ignore[union-attr]


def test_the_statistics_of_fused_networks_are_seen(device: str) -> None:
    from fastjepa.fused.networks import FusedResNet5

    network = FusedResNet5.from_eager(an_encoder(4).to(device))
    folded = InferenceEncoder.from_eager(network, convolutions="eager")
    x = torch.rand(1, 1, 2, 8, 8).to(device)
    with torch.no_grad():
        before = folded(x)
    _train_mode(network, x)
    assert_follows(folded, x, before)


@EVERY_DEVICE
def test_replays_of_training_steps_are_seen(device: str) -> None:
    step = some_step(device)
    folded = InferencePredictor.from_eager(step.jepa.predictor, convolutions="eager")  # type: ignore[arg-type]
    x, graphed = states_of(1, 3).to(device), GraphedTrainStep(step, some_clips(device))
    for _ in range(3):
        with eval_mode(folded):
            before = folded(x)
        graphed(torch.tensor([0, 1], device=device))
        with eval_mode(folded):
            assert_follows(folded, x, before)


def test_replays_that_count_nothing_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, here by `.data`, which counts on its own."""
    step = some_step()
    folded = InferencePredictor.from_eager(step.jepa.predictor, convolutions="eager").eval()  # type: ignore[arg-type]
    x, graphed = states_of(1, 3), GraphedTrainStep(step, some_clips())
    graphed(torch.tensor([0, 1]))
    with eval_mode(folded):
        before = folded(x)
    parameters = [*step.jepa.predictor.parameters(), *step.jepa.predictor.buffers()]
    monkeypatch.setattr(Recording, "replay", lambda _: [p.data.mul_(2) for p in parameters])
    graphed(torch.tensor([0, 1]))
    with eval_mode(folded):
        assert_follows(folded, x, before)


# ---- in one launch ----


@EVERY_DEVICE
def test_a_recorded_rollout_of_a_folded_predictor(device: str) -> None:
    """By torch on a CPU, by kernels on a GPU."""
    jepa = trained_jepa(device)
    plain: Any = jepa.predictor.eval()
    jepa.predictor = folded = InferencePredictor.from_eager(
        plain, convolutions="fused" if device == "cuda" else "eager"
    )
    states = states_of(2, 4, (9, 7)).to(device)
    rollout = GraphedRollout(jepa, 3)
    with torch.no_grad():
        found = rollout(states)
        assert torch.equal(found, folded.roll_out(states[:, :, -2:], 3))
        view = rollout(states, copy=False)
        assert torch.equal(view, found)
        assert view.data_ptr() == rollout(states + 1, copy=False).data_ptr()
        assert not torch.equal(view, found)
        for tail, wanted in zip(rollout.tails(states, 2), folded.tails(states, 2), strict=True):
            assert torch.equal(tail, wanted)
        for parameter in plain.parameters():
            parameter.mul_(1.1)
        assert torch.equal(rollout(states), folded.roll_out(states[:, :, -2:], 3))  # without refresh()
        assert not torch.equal(rollout(states), found)
        next(plain.parameters()).data.mul_(2)
        before = rollout(states)
        rollout.refresh()
        assert not torch.equal(rollout(states), before)
    assert rollout.recordings_made == 2
    folded.train()  # the recording is in eval mode whatever the predictor is in
    assert not torch.equal(rollout(states), before)
    jepa.predictor = plain  # as `restore` does
    torch.testing.assert_close(rollout(states)[:, :, :2], states[:, :, -2:])
    assert rollout.recordings_made == 3


def test_a_recorded_rollout_keeps_the_dtype_of_the_states() -> None:
    predictor = a_predictor(8)
    folded = InferencePredictor.from_eager(predictor, convolutions="eager")
    states = states_of(2, 4)
    in_bf16 = InferencePredictor.from_eager(predictor, torch.bfloat16, convolutions="eager")
    for own in (folded, in_bf16):
        rollout = GraphedRollout(own, 3, autocast_dtype=torch.bfloat16 if own is folded else None)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=own is folded):
            expected = own.roll_out(states[:, :, -2:], 3)
            tails = list(own.tails(states, 2))
        found = rollout(states)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        assert torch.equal(found[:, :, :2], states[:, :, -2:])
        for tail, wanted in zip(rollout.tails(states, 2), tails, strict=True):
            assert tail.dtype == torch.float32
            assert torch.equal(tail, wanted.float())


def test_a_recorded_rollout_by_kernels(device: str) -> None:
    predictor = a_predictor(4).to(device)
    states = states_of(size=(4, 4)).to(device)
    rollout = GraphedRollout(predictor, 1, fold_batch_norm=True, convolutions="fused")
    assert rollout.predictor is predictor
    assert torch.equal(
        rollout(states), InferencePredictor.from_eager(predictor, convolutions="fused").roll_out(states, 1)
    )
    given = InferencePredictor.from_eager(predictor, convolutions="eager")
    made = GraphedRollout(given, 1, fold_batch_norm=True, convolutions="fused")._runs
    assert made is not None
    assert made.convolutions == "fused"


def test_a_recorded_rollout_by_torch() -> None:
    predictor, states = a_predictor(8), states_of(2, 3)

    def expected() -> Tensor:
        return InferencePredictor.from_eager(predictor, convolutions="eager").roll_out(states[:, :, -2:], 2)

    rollout = GraphedRollout(predictor, 2, fold_batch_norm=True)
    before = rollout(states)
    assert torch.equal(before, expected())
    for asked in ("auto", "eager"):
        given = InferencePredictor.from_eager(predictor, convolutions=asked)  # type: ignore[arg-type]
        again = GraphedRollout(given, 2, fold_batch_norm=True, convolutions="eager")
        assert torch.equal(again(states), before)
    with torch.no_grad():
        predictor.predictor.head.weight.mul_(2)
    assert torch.equal(rollout(states), expected())
    assert not torch.equal(rollout(states), before)
    predictor.predictor = a_predictor(8, seed=5).predictor
    assert rollout.recordings_made == 1
    assert torch.equal(rollout(states), expected())


def test_a_rollout_that_cannot_have_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = a_predictor(4)
    with pytest.raises(ValueError, match="convolutions must be one of auto, fused, eager; got 'cudnn'"):
        GraphedRollout(predictor, convolutions="cudnn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give fold_batch_norm=True"):
        GraphedRollout(predictor, convolutions="fused")
    with pytest.raises(ValueError, match="is not supported here: it has the published names but"):
        GraphedRollout(action_unet_jepa().predictor, fold_batch_norm=True, convolutions="fused")
    monkeypatch.setattr("fastjepa.kernels.checks.unavailable_reason", lambda _: "there are none today")
    for make in (
        lambda: GraphedRollout(predictor, fold_batch_norm=True, convolutions="fused"),
        lambda: InferencePredictor.from_eager(predictor, convolutions="fused"),
    ):
        with pytest.raises(RuntimeError, match="convolution: there are none today"):
            make()
    InferencePredictor.from_eager(predictor)


# ---- the launches ----


def test_launches_are_those_of_the_recipe(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the layers for which configurations are chosen are those that run."""
    import fastjepa.kernels.convolution.op as op

    launched: list[Any] = []
    monkeypatch.setattr(op, "launch", lambda operands, _: launched.append(operands.layer))
    encoder = InferenceEncoder.from_eager(ResNet5(1, 32, 16).eval().to(device), torch.bfloat16, "fused")
    predictor = InferencePredictor.from_eager(
        StateOnlyPredictor(ResUNet(32, 32, 16)).eval().to(device), torch.bfloat16, "fused"
    )
    with torch.no_grad():
        encoder(torch.rand(3, 1, 64, 64).to(device))
        predictor(torch.rand(2, 16, 2, 64, 64).to(device))
    assert launched == [*recipe.encoder_layers(3).values(), *recipe.predictor_layers(2).values()]


@pytest.mark.gpu
@pytest.mark.parametrize("allowed", [False, True])
def test_fp32_is_multiplied_in_tf32_where_torch_would(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastjepa.kernels.convolution.op as op

    launched: list[str] = []
    monkeypatch.setattr(op, "launch", lambda operands, _: launched.append(operands.layer.precision))
    folded = InferencePredictor.from_eager(a_predictor(4).cuda(), convolutions="fused")
    torch.backends.cudnn.allow_tf32 = allowed  # put back by the fixture `exact_arithmetic`
    folded.roll_out(states_of().cuda(), 1)
    assert launched == ["tf32" if allowed else "fp32"] * 18


def test_limits_are_those_of_the_kernels(needs_triton: None) -> None:
    from fastjepa.kernels.convolution import op, stem

    assert (inference_layers.MOST_CHANNELS, inference_layers.MOST_BEFORE_HEAD) == (
        op.MOST_CHANNELS,
        op.MOST_BEFORE_HEAD,
    )
    assert inference_layers.MOST_OF_IMAGE == stem.MOST_CHANNELS


@pytest.mark.parametrize("size", [(8, 8), (9, 10)])
def test_no_map_lies_where_one_lies_that_is_still_read(size: tuple[int, int]) -> None:
    layers = unet_layers(a_predictor().predictor, 2)
    names = [layer.name for layer in layers]
    places, sizes = run.places(layers, True, *size)
    assert len(sizes) < 8

    def written_and_last_read() -> Iterator[tuple[str, int, int]]:
        for name in places:
            maker = names.index(name.removesuffix(", resized"))
            readers = [i for i, layer in enumerate(layers) if name.removesuffix(", resized") in layer.read]
            is_made_smaller = run.resized(name) in places
            yield name, maker, maker if is_made_smaller else max(readers)

    lives = list(written_and_last_read())
    for name, written, _ in lives:
        for other, before, until in lives:
            if other != name and before <= written <= until and (before, other) < (written, name):
                assert places[name].slot != places[other].slot, (name, other)
        slot, channels, height, width = places[name]
        assert channels * height * width <= sizes[slot]


def test_without_triton_torch_runs_everything() -> None:
    code = f"""{without("triton")}
import torch, fastjepa, fastjepa.graphs
from fastjepa.fused.inference import InferenceEncoder, InferencePredictor
jepa = fastjepa.build_jepa(dobs=1, henc=2, hpre=2, dstc=4, std_coeff=10.0, cov_coeff=100.0).eval()
video = torch.rand(1, 1, 3, 9, 8)
expected = jepa.rollout(video, 2)
plain = jepa.encoder, jepa.predictor
jepa.encoder = InferenceEncoder.from_eager(jepa.encoder, convolutions="eager")
jepa.predictor = InferencePredictor.from_eager(jepa.predictor, convolutions="eager")
torch.testing.assert_close(jepa.rollout(video, 2), expected, rtol=1e-4, atol=1e-5)
for make in (lambda: InferenceEncoder.from_eager(plain[0], convolutions="fused"),
             lambda: fastjepa.graphs.GraphedRollout(plain[1], fold_batch_norm=True, convolutions="fused")):
    try:
        make()
    except RuntimeError as error:
        print(error)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert len(lines := done.stdout.splitlines()) == 2
    assert all(line.startswith("convolution: kernels need Triton, which cannot be imported here") for line in lines)


# ---- refusals ----


def _without_statistics() -> nn.Module:
    network = an_encoder(8)
    network.layer2.bn1 = nn.BatchNorm2d(16, track_running_stats=False)
    return network


def _with_another(**options: Any) -> nn.Module:
    network = an_encoder(8)
    network.layer1.conv1 = nn.Conv2d(8, 8, 3, **{"padding": 1, **options})
    return network


FROM_EAGER: Any = InferenceEncoder.from_eager


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FROM_EAGER(nn.Linear(1, 1)), "Linear has no bn1, conv1"),
        (lambda: FROM_EAGER(_without_statistics()), "layer2.conv1 has no running statistics"),
        (lambda: FROM_EAGER(_with_another(groups=2)), "layer1.conv1 is Conv2d.*one group"),
        (lambda: FROM_EAGER(_with_another(dilation=2)), "no dilation"),
        (lambda: FROM_EAGER(_with_another(stride=3)), "with stride 1 or 2"),
        (lambda: FROM_EAGER(_with_another(padding=0)), "padding 1"),
        (lambda: FROM_EAGER(_with_another(padding_mode="circular")), "not a plain Conv2d"),
        (lambda: FROM_EAGER(an_encoder(8), torch.float64), "autocast_dtype is torch.float64"),
        (lambda: FROM_EAGER(an_encoder(8), convolutions="cudnn"), "must be one of auto, fused, eager; got 'cudnn'"),
        (lambda: InferencePredictor.from_eager(nn.Linear(1, 1)), "is not one network `predictor`"),
        (
            lambda: InferencePredictor.from_eager(StateOnlyPredictor(ResUNet(2 * D, 80, D)), convolutions="fused"),
            "bott.conv1 has maps of 640 channels; kernels take up to 512",
        ),
        (
            lambda: InferencePredictor.from_eager(action_unet_jepa().predictor, convolutions="eager"),
            "reads 6 channels, which are not 1 states of 4",
        ),
    ],
)
def test_what_cannot_be_folded_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, _: f(torch.rand(1, 2, 8, 8)), ValueError, "InferenceEncoder takes 1 channels"),
        (lambda f, _: f(torch.rand(1, 8, 8)), ValueError, "expected frames"),
        (lambda f, _: f(torch.zeros(1, 1, 8, 8, dtype=torch.uint8)), TypeError, "scale uint8 video"),
        (lambda f, _: f(torch.rand(1, 1, 8, 8).double()), TypeError, "has dtype torch.float64"),
        (lambda f, _: f(torch.rand(1, 1, 8, 8).bfloat16()), TypeError, "has dtype torch.bfloat16"),
        (lambda f, _: f(torch.rand(1, 1, 8, 8, device="meta")), ValueError, "is on meta, the weights are on cpu"),
        (lambda _, p: p(torch.rand(1, D, 8, 8)), ValueError, r"expected states \(B, D, T, H, W\)"),
        (lambda _, p: p(torch.rand(1, D, 1, 8, 8)), ValueError, "at least 2 frames, got 1"),
        (lambda _, p: p(torch.rand(1, D + 1, 3, 8, 8)), ValueError, "InferencePredictor takes 4 channels"),
        (lambda _, p: p.roll_out(torch.rand(1, D, 8, 8), 2), ValueError, r"expected states \(B, D, T, H, W\)"),
        (lambda _, p: p.roll_out(torch.rand(1, D, 1, 8, 8), 2), ValueError, "at least 2 frames, got 1"),
        (lambda _, p: p.roll_out(torch.rand(1, D, 2, 8, 8).double(), 2), TypeError, "has dtype torch.float64"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    (encoder, _, _), (predictor, _, _) = folded_pair()
    with torch.no_grad(), pytest.raises(error, match=message):
        call(encoder, predictor)
    pooled = InferenceEncoder.from_eager(an_encoder(8, avg_pool=True), convolutions="eager")
    with torch.no_grad(), pytest.raises(ValueError, match="an encoder with avg_pool takes frames"):
        pooled(torch.rand(1, 1, 2, 8, 8))
