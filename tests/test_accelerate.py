"""`accelerate`: fastjepa's own JEPA and one of the original's structure, trained, compared and restored."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastjepa
from compare import assert_near
from fastjepa.execution import ExecutionConfig
from fastjepa.fused import auto, swap
from fastjepa.fused.losses import ClosedFormVCLoss
from original import (
    MLP,
    Encoder,
    OriginalJEPA,
    PairPredictor,
    PredictionCost,
    Regularizer,
    UNet,
    action_jepa,
    action_unet_jepa,
    original_jepa,
    unrolled_loss,
)
from tiny import tiny_batch, tiny_jepa

# The contract for whole models in fp32: tensors to 1e-4 of their norm, losses to 1e-5.
GRADIENT, LOSS = 1e-4, 1e-5


def original(seed: int = 0) -> OriginalJEPA:
    torch.manual_seed(seed)
    return original_jepa()


def gradients(jepa: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in jepa.named_parameters() if p.grad is not None}


def names_and_objects(jepa: nn.Module) -> tuple[list[str], list[tuple[str, int]]]:
    """Keys of the state_dict, and parameters in the order that an optimizer counts."""
    return list(jepa.state_dict()), [(name, id(p)) for name, p in jepa.named_parameters()]


@pytest.mark.parametrize("size", [(16, 16), (11, 9)])
def test_an_original_jepa_accelerated_trained_and_restored(device: str, size: tuple[int, int]) -> None:
    eager, fast = original().to(device), original().to(device)
    names = names_and_objects(fast)
    assert fastjepa.accelerate(fast, backend="fused", verbose=False) is fast
    assert fast.acceleration.swapped == ("encoder", "predictor", "regularizer", "predcost")
    assert type(fast.encoder).__name__ == "FusedResNet5"
    assert fast.action_encoder is fast.encoder
    assert names_and_objects(fast) == names

    video = tiny_batch(2, 4, size)[0].to(device)
    losses = [unrolled_loss(jepa, video, 2) for jepa in (eager, fast)]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=LOSS)
    assert_near(gradients(fast), gradients(eager), GRADIENT)
    assert_near(dict(fast.named_buffers()), dict(eager.named_buffers()), LOSS)

    for jepa in (eager, fast):
        jepa.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast.encoder(video), eager.encoder(video), rtol=1e-4, atol=1e-5)
        assert unrolled_loss(fast, video, 1).item() == pytest.approx(unrolled_loss(eager, video, 1).item(), rel=LOSS)
    fastjepa.restore(fast)
    assert type(fast.encoder).__name__ == "Encoder"
    assert not any(module.training for module in fast.modules())
    assert names_and_objects(fast) == names


def test_freezing_and_copying(device: str) -> None:
    fast = original().to(device)
    fastjepa.accelerate(fast, backend="fused", verbose=False)
    fast.encoder.requires_grad_(False)
    video = tiny_batch(1, 3, (8, 8))[0].to(device)
    loss = unrolled_loss(fast, video, 1)
    loss.backward()
    assert all(p.grad is None for p in fast.encoder.parameters())
    assert all(p.grad is not None for p in fast.predictor.parameters())

    twin = copy.deepcopy(fast)
    fastjepa.restore(twin)
    assert isinstance(fast.regularizer, ClosedFormVCLoss)
    assert twin.encoder.conv1.weight is not fast.encoder.conv1.weight
    assert twin.regularizer.proj is twin.predcost.proj
    with torch.no_grad():
        twin.predictor.predictor.head.weight.zero_()
    assert fast.predictor.predictor.head.weight.any()


def test_autocast_of_its_own(device: str) -> None:
    fast = original().to(device)
    fastjepa.accelerate(fast, backend="fused", precision="bf16", verbose=False)
    seen = []
    fast.encoder.layer1.conv1.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    video = tiny_batch(1, 3, (8, 8))[0].to(device)
    state = fast.encoder(video)
    assert state.dtype == torch.float32
    assert seen == [torch.bfloat16]
    torch.testing.assert_close(state, original().to(device).encoder(video), rtol=0.1, atol=0.1)


def test_auto_on_a_cpu_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    jepa, fast = tiny_jepa(), tiny_jepa()
    fastjepa.accelerate(fast)
    printed = capsys.readouterr().out
    assert "encoder      ResNet5 left as it is: auto uses them on CUDA devices, this is cpu" in printed
    assert "closed form in plain torch" in printed
    video = tiny_batch()[0]
    expected, found = jepa.unroll(video, nsteps=2)[1], fast.unroll(video, nsteps=2)[1]
    assert expected is not None
    assert found is not None
    torch.testing.assert_close(found[0], expected[0], rtol=LOSS, atol=0)
    assert_near(dict(fast.named_buffers()), dict(jepa.named_buffers()), LOSS)
    fastjepa.restore(fast)
    assert "ClosedForm" not in str(fast)


class Clamped(Encoder):
    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return super()._forward(x).clamp(max=20)  # which nothing reaches in a model that was never trained


class Noisy(Encoder):
    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(super()._forward(x), 0.1, self.training)


class Stopped(PairPredictor):
    def forward(self, x: torch.Tensor, a: torch.Tensor | None) -> torch.Tensor:
        return super().forward(x.detach(), a)


class Gained(Encoder):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(()))

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gain * super()._forward(x)


class Nearest(UNet):
    def _up(self, up: nn.Module, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return torch.cat([nn.functional.interpolate(up(x), size=skip.shape[-2:]), skip], 1)


class ZeroHead(UNet):
    """Behind a head of zeros nothing shows."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return super()._forward(x.abs().neg())


class GhostNorm(nn.BatchNorm2d):
    """Of half a batch at a time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        halves = x.chunk(2) if self.training else (x,)
        return torch.cat([super(GhostNorm, self).forward(half) for half in halves])


class Ghost(Encoder):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.bn1 = GhostNorm(2)


def hooked(network: nn.Module, context_length: int) -> nn.Module:
    predictor = PairPredictor(network, context_length)
    predictor.register_forward_hook(lambda module, inputs, out: 2 * out if module.training else out)
    return predictor


@pytest.mark.parametrize(
    ("part", "make", "reason"),
    [
        ("encoder", Clamped, "computes something else"),
        ("encoder", Noisy, "computes something else"),
        ("encoder", Gained, "has tensors of its own: gain"),
        ("encoder", Ghost, "bn1 is a GhostNorm, not a BatchNorm2d"),
        ("predictor.predictor", Nearest, "computes something else"),
        ("predictor.predictor", ZeroHead, "computes something else"),
        ("predictor", Stopped, ""),
        ("predictor", hooked, ""),
    ],
)
def test_what_one_look_in_eval_mode_does_not_show(part: str, make: Any, reason: str, device: str) -> None:
    """The network is left as it is; so is a wrapper, around a network that is fused."""
    torch.manual_seed(0)
    jepa = original_jepa()
    if part == "encoder":
        jepa.encoder = jepa.action_encoder = make(1, 2, 4)
    elif part == "predictor":
        jepa.predictor = make(jepa.predictor.predictor, 2)
    else:
        jepa.predictor.predictor = make(8, 2, 4)
    module = jepa.to(device).get_submodule(part)
    state = copy.deepcopy(jepa.state_dict())
    drawn = torch.get_rng_state()
    fastjepa.accelerate(jepa, backend="fused", strict=False, verbose=False)
    assert jepa.get_submodule(part) is module
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(state[name], value) for name, value in jepa.state_dict().items())
    if reason:
        assert any(reason in swap.reason for swap in jepa.acceleration.swaps)
    else:
        assert "predictor.predictor" in jepa.acceleration.swapped


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"s1": 2}, (13, 11)),
        ({"s1": 2, "s2": 2, "s3": 2}, (19, 17)),
        ({"avg_pool": True}, (8, 8)),
        ({"s3": 3, "avg_pool": True}, (11, 9)),
    ],
)
def test_every_option_of_the_encoder_is_fused(options: dict[str, Any], size: tuple[int, int], device: str) -> None:
    torch.manual_seed(0)
    fast = original_jepa(**options).to(device)
    truth = copy.deepcopy(fast).cpu().double()
    fastjepa.accelerate(fast, backend="fused", verbose=False)
    assert "encoder" in fast.acceleration.swapped
    frames = torch.rand(6, 1, *size, generator=torch.Generator().manual_seed(1))  # enough rows for BatchNorm
    found, expected = fast.encoder(frames.to(device)), truth.encoder(frames.double())
    weights = torch.linspace(0.5, 1.5, expected.numel()).view_as(expected)
    (found * weights.to(device)).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    assert_near({n: g.cpu() for n, g in gradients(fast.encoder).items()}, gradients(truth.encoder), GRADIENT)
    buffers = {n: b.cpu() for n, b in fast.encoder.named_buffers()}
    assert_near(buffers, dict(truth.encoder.named_buffers()), LOSS)
    if options.get("avg_pool"):
        with pytest.raises(ValueError, match=r"avg_pool takes frames \(N, in_d, H, W\).*got a video"):
            fast.encoder(torch.rand(1, 1, 2, 8, 8, device=device))


def test_a_pool_that_is_something_else_is_named(device: str) -> None:
    jepa = original().to(device)
    jepa.encoder.avgpool = nn.AdaptiveAvgPool2d((2, 2))  # which `avg_pool` = False does not announce
    with pytest.raises(ValueError, match="encoder: Encoder has further layers: avgpool"):
        fastjepa.accelerate(jepa, backend="fused")
    jepa.encoder.avgpool = nn.AdaptiveAvgPool2d((1, 1))
    jepa.encoder.avg_pool = True
    jepa.encoder.layer3.relu = nn.Identity()
    with pytest.raises(ValueError, match="encoder: it has the published names but computes something else"):
        fastjepa.accelerate(jepa, backend="fused")


def test_what_a_network_says_of_itself_is_kept(device: str) -> None:
    jepa = original().to(device)
    jepa.predictor.predictor.is_rnn = jepa.predictor.is_rnn = True
    fastjepa.accelerate(jepa, backend="fused", verbose=False)
    assert jepa.predictor.is_rnn
    assert jepa.predictor.predictor.is_rnn
    assert jepa.encoder.avg_pool is False


def test_recurrent_and_action_conditioned_parts_are_left_with_a_reason(device: str) -> None:
    torch.manual_seed(0)
    eager = action_jepa().to(device)
    video, actions = torch.rand(2, 2, 5, 9, 9, device=device), torch.rand(2, 2, 5, device=device)
    for options in ({"backend": "auto"}, {"backend": "fused", "strict": False}):
        fast = copy.deepcopy(eager)
        fastjepa.accelerate(fast, verbose=False, **options)
        assert fast.acceleration.swapped == ()
        assert [swap.part for swap in fast.acceleration.swaps] == ["encoder", "predictor", "regularizer", "predcost"]
        assert all(swap.reason for swap in fast.acceleration.swaps)
        expected = eager.unroll(video, actions, nsteps=3, unroll_mode="autoregressive")
        found = fast.unroll(video, actions, nsteps=3, unroll_mode="autoregressive")
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1][0], expected[1][0])
    with pytest.raises(
        ValueError,
        match=r"encoder: VectorEncoder has no .*; predictor: GRUPredictor is not one network.*"
        r"; regularizer: ActionRegularizer has no proj; predcost: Identity is not a Sequential",
    ):
        fastjepa.accelerate(copy.deepcopy(eager), backend="fused")


def test_a_wrapper_that_reads_actions_stays_around_a_fused_network(device: str) -> None:
    torch.manual_seed(0)
    eager = action_unet_jepa().to(device)
    fast = copy.deepcopy(eager)
    fastjepa.accelerate(fast, backend="fused", verbose=False)
    assert fast.acceleration.swapped == ("encoder", "predictor.predictor", "regularizer", "predcost")
    video = tiny_batch(1, 3, (8, 8))[0].to(device)
    actions = torch.rand(1, 2, 3, 8, 8, device=device)
    losses = [jepa.unroll(video, actions, nsteps=1)[1][0] for jepa in (eager, fast)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=LOSS)
    losses[1].backward()
    assert all(p.grad is not None for p in fast.parameters())


class ScaledCost(PredictionCost):
    def forward(self, state: torch.Tensor, predi: torch.Tensor) -> torch.Tensor:
        return 1.1 * super().forward(state, predi)


class StoppedCost(PredictionCost):
    def forward(self, state: torch.Tensor, predi: torch.Tensor) -> torch.Tensor:
        return super().forward(state.detach(), predi)


class NeedsActions(Regularizer):
    def forward(self, x: torch.Tensor, actions: torch.Tensor | None = None) -> Any:
        assert actions is not None, "actions are needed"
        return super().forward(x, actions)


def test_a_loss_with_the_published_attributes_is_tried(device: str) -> None:
    def refused(part: str, loss: nn.Module) -> str:
        jepa = original().to(device)
        setattr(jepa, part, loss.to(device))
        fastjepa.accelerate(jepa, backend="fused", strict=False, verbose=False)
        swap = next(swap for swap in jepa.acceleration.swaps if swap.part == part)
        assert swap.by is None
        assert jepa.get_submodule(part) is loss
        return swap.reason

    proj = MLP("4-6-5")
    assert "computes something else (loss differs)" in refused("predcost", ScaledCost(proj))
    assert "computes something else (gradient of the state differs)" in refused("predcost", StoppedCost(proj))
    assert "cannot be called like the published loss: actions are needed" in refused(
        "regularizer", NeedsActions(1.0, 1.0, proj)
    )
    margin = Regularizer(1.0, 1.0, proj)
    margin.std_loss_fn.std_margin = 0.5
    assert refused("regularizer", margin) == "its std_margin is 0.5, and the published one is 1"
    hooked = PredictionCost(proj)
    hooked.register_forward_hook(lambda *_: None)
    assert refused("predcost", hooked) == "PredictionCost has hooks, which a fused pass would not call"


def test_what_cannot_be_swapped_is_named(device: str) -> None:
    jepa = original().to(device)
    jepa.encoder.layer2.conv1.register_forward_hook(lambda *_: None)
    jepa.predcost.proj = nn.Identity()
    with pytest.raises(ValueError, match=r"encoder: Conv2d has hooks.*predcost: Identity is not a Sequential"):
        fastjepa.accelerate(jepa, backend="fused")
    assert type(jepa.predictor.predictor).__name__ == "UNet"  # all or nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "fast"}, "backend must be one of auto, eager, fused; got 'fast'"),
        ({"precision": "fp8"}, "precision must be one of keep, bf16; got 'fp8'"),
        ({"purpose": "fun"}, "purpose must be one of train, inference; got 'fun'"),
        ({"execution": ExecutionConfig(), "backend": "fused"}, "so do backend and recompute; give one"),
        ({"recompute": "maybe"}, "recompute must be one of on, off; got 'maybe'"),
        ({"recompute": "on", "backend": "eager"}, "recompute='on' is for fused networks in training"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastjepa.accelerate(original(), **options)


def test_bad_objects() -> None:
    with pytest.raises(ValueError, match="jepa has no module 'encoder'"):
        fastjepa.accelerate(nn.Linear(1, 1))
    jepa = original()
    with pytest.raises(RuntimeError, match="not accelerated"):
        fastjepa.restore(jepa)
    fastjepa.accelerate(jepa, verbose=False)
    with pytest.raises(RuntimeError, match="accelerated already"):
        fastjepa.accelerate(jepa)


@pytest.mark.usefixtures("needs_triton")
def test_fused_where_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastjepa.kernels.launch.INTERPRET", False)
    for options in ({"backend": "fused"}, {"execution": ExecutionConfig(fused=True)}):
        with pytest.raises(RuntimeError, match="fused kernels are not supported here: Triton kernels need a CUDA"):
            fastjepa.accelerate(original(), **options)  # type: ignore[arg-type]


# ---- auto, and what a run has resolved -------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [None, "losses are off"])
def test_auto_takes_all_or_nothing_by_the_self_check(
    problem: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap, "auto_problem", lambda *_: problem)
    jepa = original().to(device)
    fastjepa.accelerate(jepa, verbose=False)
    assert (jepa.acceleration.swapped[:2] == ("encoder", "predictor")) == (problem is None)
    assert jepa.acceleration.swaps[0].reason == (problem or "")
    laid = problem is None and device == "cuda"
    assert jepa.acceleration.execution == ExecutionConfig(fused=problem is None, channels_last=laid)


def test_auto_leaves_a_part_that_is_not_the_published_one(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "auto_problem", lambda *_: None)
    jepa = tiny_jepa(projector="4-6-6-5").to(device)
    fastjepa.accelerate(jepa, verbose=False)
    assert jepa.acceleration.swapped == ("encoder", "predictor")
    assert "the projector is Linear" in str(jepa.acceleration)


def test_an_execution_config_is_followed_laid_out_and_undone(device: str) -> None:
    jepa = original().to(device)
    before = {name: p.stride() for name, p in jepa.named_parameters()}
    execution = ExecutionConfig(fused=True, recompute=True, channels_last=True)
    fastjepa.accelerate(jepa, execution=execution, verbose=False)
    assert jepa.encoder.recompute
    assert jepa.regularizer.projection_path == "fused"
    weight = jepa.encoder.layer1.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert "fused kernels, recomputation, channels-last" in str(jepa.acceleration)
    fastjepa.restore(jepa)
    assert {name: p.stride() for name, p in jepa.named_parameters()} == before
    assert jepa.encoder.layer1.conv1.weight is weight
    assert torch.equal(weight, original().encoder.layer1.conv1.weight.to(device))


def test_widths_are_read_from_the_weights() -> None:
    found = auto.widths_of(tiny_jepa())
    assert found is not None
    assert fastjepa.build_jepa(**found._asdict(), std_coeff=1.0, cov_coeff=1.0).state_dict().keys()
    assert auto.widths_of(nn.Linear(1, 1)) is None


# ---- inference networks ----------------------------------------------------------------------------------------------


def with_statistics(device: str) -> tuple[OriginalJEPA, OriginalJEPA, torch.Tensor]:
    """Two of the original's structure with statistics that folding shows, in eval mode, and a video."""
    eager = original().to(device).eval()
    generator = torch.Generator().manual_seed(3)
    for layer in eager.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(0.1 * torch.randn(layer.num_features, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(layer.num_features, generator=generator))
    return eager, copy.deepcopy(eager), tiny_batch(1, 3, (8, 8))[0].to(device)


@torch.no_grad()
def assert_same_states(fast: OriginalJEPA, eager: OriginalJEPA, video: torch.Tensor, rtol: float, atol: float) -> None:
    state = eager.encoder(video)
    assert fast.encoder(video).dtype == torch.float32
    torch.testing.assert_close(fast.encoder(video), state, rtol=rtol, atol=atol)
    torch.testing.assert_close(fast.predictor(state, None), eager.predictor(state, None), rtol=rtol, atol=atol)


def test_inference_networks(device: str) -> None:
    eager, fast, video = with_statistics(device)
    names, modules = names_and_objects(fast), (fast.encoder, fast.predictor)
    fastjepa.accelerate(fast, backend="fused", purpose="inference", verbose=False)
    assert fast.acceleration.swapped == ("encoder", "predictor")
    assert fast.action_encoder is fast.encoder
    assert names_and_objects(fast) == names
    assert_same_states(fast, eager, video, 1e-4, 1e-5)
    fast.encoder.train()
    fastjepa.restore(fast)
    assert (fast.encoder, fast.predictor) == modules
    assert fast.action_encoder is fast.encoder
    assert fast.encoder.layer1.conv1.training
    assert not fast.predictor.training


def test_a_model_that_only_encodes_and_predicts_in_bf16(device: str) -> None:
    eager, fast, video = with_statistics(device)
    for jepa in (eager, fast):
        del jepa.regularizer, jepa.predcost
    fastjepa.accelerate(fast, backend="fused", purpose="inference", precision="bf16", verbose=False)
    assert fast.acceleration.swapped == ("encoder", "predictor")
    assert fast.encoder.autocast_dtype is fast.predictor.autocast_dtype is torch.bfloat16
    assert_same_states(fast, eager, video, 0.1, 0.1)
    with pytest.raises(ValueError, match=r"no module 'regularizer'.*purpose='inference'\) needs none"):
        fastjepa.accelerate(fastjepa.restore(fast), backend="fused")


def test_inference_networks_of_what_is_not_of_the_published_form(device: str) -> None:
    torch.manual_seed(0)
    jepa = action_unet_jepa().to(device)
    predictor = jepa.predictor
    jepa.encoder.__class__ = Clamped
    with pytest.raises(ValueError, match=r"encoder: it has the published names but computes something else.*predictor"):
        fastjepa.accelerate(jepa, backend="fused", purpose="inference")
    fastjepa.accelerate(jepa, backend="fused", purpose="inference", strict=False, verbose=False)
    assert jepa.acceleration.swapped == ()
    assert jepa.predictor is predictor  # nothing is folded inside a wrapper of another kind
    jepa = original().to(device)
    jepa.encoder.layer2.bn1 = nn.BatchNorm2d(jepa.encoder.layer2.bn1.num_features, track_running_stats=False).to(device)
    with pytest.raises(ValueError, match=r"encoder: .*no running statistics"):
        fastjepa.accelerate(jepa, backend="fused", purpose="inference")


def test_an_inference_network_is_held_against_the_module(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastjepa.fused.inference import weights

    fold = weights.fold

    def wrong(conv: nn.Module, norm: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = fold(conv, norm)
        return 1.1 * weight, bias

    monkeypatch.setattr(weights, "fold", wrong)
    with pytest.raises(ValueError, match=r"encoder: InferenceEncoder computes something else \(.* off\)"):
        fastjepa.accelerate(original().to(device), backend="fused", purpose="inference")


def test_in_bf16_a_network_still_says_what_it_is() -> None:
    torch.manual_seed(0)
    jepa = action_jepa()
    fastjepa.accelerate(jepa, backend="eager", precision="bf16", verbose=False)
    assert type(jepa.predictor).__name__ == "InBf16"
    assert jepa.predictor.is_rnn
    assert jepa.predictor.context_length == 0
    with pytest.raises(AttributeError, match="colour"):
        _ = jepa.predictor.colour
    pooling = original_jepa(avg_pool=True)
    fastjepa.accelerate(pooling, backend="eager", precision="bf16", verbose=False)
    assert pooling.encoder.avg_pool
    assert pooling.encoder(torch.rand(2, 1, 8, 8)).shape == (2, 4)


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_bf16_where_networks_stay_eager(backend: Any) -> None:
    jepa, fast = original(), original()
    names = names_and_objects(fast)
    fastjepa.accelerate(fast, backend=backend, precision="bf16", verbose=False)
    assert {swap.part: swap.by for swap in fast.acceleration.swaps if swap.by == "InBf16"} == {
        "encoder": "InBf16", "predictor.predictor": "InBf16",
    }  # fmt: skip
    assert names_and_objects(fast) == names
    assert fast.action_encoder is fast.encoder
    seen = []
    hook = fast.encoder.layer1.conv1.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    video = tiny_batch(2, 4)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = jepa.encoder(video)
        expected = jepa.predictor(state.float(), None)
    assert torch.equal(fast.encoder(video), state.float())
    assert torch.equal(fast.predictor(state.float(), None), expected.float())
    assert seen == [torch.bfloat16]
    hook.remove()
    unrolled_loss(fast, video, 1).backward()
    assert all(p.grad is not None for p in fast.encoder.parameters())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(fast.encoder.eval())))
    assert torch.equal(twin(video), fast.encoder(video))
    fastjepa.restore(fast)
    assert type(fast.encoder).__name__ == "Encoder"
    assert not fast.encoder.training
    assert names_and_objects(fast) == names
