"""`fastjepa.verify` finds a fault in what was swapped, finds none where there is none, and leaves a model as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastjepa
from fastjepa import verification
from fastjepa.fused.losses import ClosedFormSquareLoss, ClosedFormVCLoss
from fastjepa.model.step import TrainStep
from original import action_jepa, original_jepa
from tiny import tiny_jepa


def original(**options: Any) -> Any:
    torch.manual_seed(0)
    return original_jepa(**options)


def some_video(batch: int = 2, frames: int = 5, size: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.rand(batch, 1, frames, *size, generator=torch.Generator().manual_seed(1))


def faulty(jepa: Any, name: str, kind: type[nn.Module]) -> Any:
    """The module that was swapped in becomes one of `kind`, on this model and its copies."""
    getattr(jepa, name).__class__ = kind
    return jepa


def steeper(loss: Tensor, by: float) -> Tensor:
    """The same number with a larger gradient."""
    return loss + by * (loss - loss.detach())


class WrongGradient(ClosedFormSquareLoss):
    def forward(self, state: Tensor, prediction: Tensor) -> Tensor:
        return steeper(super().forward(state, prediction), 1e-3)


class WrongLoss(ClosedFormVCLoss):
    def forward(self, state: Tensor, actions: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, unweighted, parts = super().forward(state, actions)
        return loss + 1e-3, unweighted, parts


class WrongPart(ClosedFormVCLoss):
    def forward(self, state: Tensor, actions: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, unweighted, parts = super().forward(state, actions)
        return loss, unweighted, parts | {"cov_loss": parts["cov_loss"] + 1e-3}


class WrongBuffer(ClosedFormVCLoss):
    def forward(self, state: Tensor, actions: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        found = super().forward(state, actions)
        self.proj.net[1].running_var.data.mul_(1.001)
        return found


class WrongCount(ClosedFormVCLoss):
    def forward(self, state: Tensor, actions: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        found = super().forward(state, actions)
        self.proj.net[1].num_batches_tracked.data.add_(1)
        return found


class NoGradient(ClosedFormSquareLoss):
    def forward(self, state: Tensor, prediction: Tensor) -> Tensor:
        return super().forward(state, prediction).detach()


class NotANumber(ClosedFormSquareLoss):
    def forward(self, state: Tensor, prediction: Tensor) -> Tensor:
        return super().forward(state, prediction) * float("nan")


@pytest.mark.parametrize("make", [original, tiny_jepa])
@pytest.mark.parametrize("accelerated", [False, True])
def test_what_is_exact_passes(make: Any, accelerated: bool, capsys: pytest.CaptureFixture[str]) -> None:
    jepa = make()
    if accelerated:
        fastjepa.accelerate(jepa, verbose=False)
    found = fastjepa.verify(jepa, some_video())
    assert found.passed
    assert all(row.exact and 0 <= row.ours <= row.bound for row in found.rows)  # type: ignore[operator]
    assert {row.precision for row in found.rows} == {"fp32"}
    kinds = ("gradient", "buffers", "call counts")
    parts = [f"{kind} of {part}" for kind in kinds for part in ("encoder", "predictor", "projector")]
    assert [row.result for row in found.rows] == ["losses", *parts, "loss of a TrainStep"]
    assert [part.split(":")[0] for part in found.swapped] == ["regularizer", "predcost"]
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    assert printed.startswith("fastjepa.verify: passed\n  video (2, 1, 5, 16, 16), 4 steps, parallel, on cpu\n")
    assert "→ ClosedFormVCLoss" in printed


@pytest.mark.parametrize(
    ("part", "fault", "results"),
    [
        ("predcost", WrongGradient, {"gradient of encoder", "gradient of predictor", "gradient of projector"}),
        ("predcost", NoGradient, {"gradient of encoder", "gradient of predictor", "gradient of projector"}),
        ("regularizer", WrongLoss, {"losses"}),
        ("regularizer", WrongPart, {"losses"}),
        ("regularizer", WrongBuffer, {"buffers of projector"}),
        ("regularizer", WrongCount, {"call counts of projector"}),
        ("predcost", NotANumber, {"losses", "gradient of predictor"}),
    ],
)
def test_a_planted_fault_is_found(
    part: str, fault: type[nn.Module], results: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    jepa = faulty(fastjepa.accelerate(original(), verbose=False), part, fault)
    found = fastjepa.verify(jepa, some_video(), steps=2)
    wrong = {row.result for row in found.rows if not row.exact} - {"loss of a TrainStep"}
    assert not found.passed
    assert results <= wrong if fault is NotANumber else results == wrong
    assert not found.worst.exact
    printed = capsys.readouterr().out
    count = sum(not row.exact for row in found.rows)
    assert printed.startswith(f"fastjepa.verify: NOT PASSED: {count} of 11 results too far off\n")
    assert printed.count("TOO FAR OFF") == count


def test_kernels_and_their_autocast(device: str) -> None:
    """With bf16 of its own, fp32 is checked too: there a gradient a tenth too large shows, and in bf16 it does not."""
    from fastjepa.fused.networks import FusedResNet5

    class TooSteep(FusedResNet5):
        def forward(self, x: Tensor) -> Tensor:
            return steeper(super().forward(x), 0.1)

    jepa = fastjepa.accelerate(original().to(device), backend="fused", precision="bf16", verbose=False)
    video = some_video(1, 3, (8, 8)).to(device)
    found = fastjepa.verify(faulty(jepa, "encoder", TooSteep), video, steps=1, verbose=False)
    assert len(found.swapped) == 4
    assert [row.precision for row in found.rows] == ["fp32"] * 10 + ["bf16"] * 7 + ["fp32"]
    errors = {(row.precision, row.result): row.ours for row in found.rows}
    assert errors["bf16", "gradient of predictor"] > 1e-2 > 1e-4 > errors["fp32", "gradient of predictor"]
    assert [(row.precision, row.result) for row in found.rows if not row.exact] == [("fp32", "gradient of encoder")]


@pytest.mark.parametrize("way", ["asked for", "accelerated so", "ambient", "weights"])
def test_bf16_by_every_way(way: str) -> None:
    jepa, options = original(), {}
    if way == "asked for":
        options = {"precision": "bf16"}
    elif way == "accelerated so":
        fastjepa.accelerate(jepa, precision="bf16", verbose=False)
    elif way == "weights":
        jepa.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "ambient"):
        found = fastjepa.verify(jepa, some_video(), steps=1, verbose=False, **options)  # type: ignore[arg-type]
    assert {row.precision for row in found.rows} == {"fp32", "bf16"}
    assert found.passed, str(found)
    half = {row.result: row.eager for row in found.rows if row.precision == "bf16"}
    assert half["gradient of predictor"] > 1e-3  # eager is in bf16 too


def snapshot(jepa: Any) -> dict[str, Any]:
    return {
        "tensors": {name: tensor.clone() for name, tensor in jepa.state_dict(keep_vars=True).items()},
        "objects": {name: id(tensor) for name, tensor in jepa.state_dict(keep_vars=True).items()},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in jepa.named_parameters()},
        "modules": {name: (id(module), module.training, set(vars(module))) for name, module in jepa.named_modules()},
        "numbers": torch.get_rng_state(),
        "acceleration": getattr(jepa, "acceleration", None),
    }


@pytest.mark.parametrize("accelerated", [False, True])
def test_the_model_stays_as_it_was(accelerated: bool) -> None:
    jepa = original()
    if accelerated:
        fastjepa.accelerate(jepa, precision="bf16", verbose=False)
    jepa.unroll(some_video(), None, nsteps=1)[1][0].backward()
    jepa.predictor.predictor.enc1.eval()
    jepa.encoder.conv1.requires_grad_(False)
    before = snapshot(jepa)
    with torch.no_grad():
        fastjepa.verify(jepa, some_video(), steps=1, verbose=False)
        assert not torch.is_grad_enabled()
    after = snapshot(jepa)
    for kind in ("tensors", "gradients"):
        assert before[kind].keys() == after[kind].keys()
        for name, value in before[kind].items():
            other = after[kind][name]
            assert other is None if value is None else torch.equal(other, value), name
    assert torch.equal(before.pop("numbers"), after.pop("numbers"))
    for kind in ("objects", "modules"):
        assert before[kind] == after[kind]
    assert before["acceleration"] is after["acceleration"]


def test_parts_that_are_frozen_or_in_eval_mode() -> None:
    jepa = original()
    jepa.encoder.requires_grad_(False)
    found = fastjepa.verify(jepa.eval(), some_video(), steps=1, verbose=False)
    assert found.passed
    assert "gradient of encoder" not in {row.result for row in found.rows}
    assert ", in eval mode" in str(found)


def test_what_reads_actions() -> None:
    torch.manual_seed(0)
    jepa = action_jepa()
    video, actions = torch.rand(2, 2, 5, 8, 8), torch.rand(2, 2, 5)
    found = fastjepa.verify(jepa, video, actions, unroll_mode="autoregressive", steps=3, verbose=False)
    assert found.passed, str(found)
    assert "nothing is swapped: this holds eager against itself" in str(found)
    assert "gradient of regularizer" in {row.result for row in found.rows}  # the inverse dynamics
    with pytest.raises(ValueError, match=r"cannot be unrolled on a video of shape \(2, 2, 5, 8, 8\).*needs actions="):
        fastjepa.verify(jepa, video)


def test_a_plain_model_is_held_against_what_the_backend_would_make_of_it(device: str) -> None:
    jepa, video = original().to(device), some_video(1, 3, (8, 8)).to(device)
    assert fastjepa.verify(jepa, video, steps=1, backend="eager", verbose=False).swapped == ()
    assert len(fastjepa.verify(jepa, video, steps=1, backend="fused", verbose=False).swapped) == 4
    fastjepa.accelerate(jepa, verbose=False, backend="eager")
    with pytest.raises(ValueError, match="accelerated already, and is verified as it is; backend='fused'"):
        fastjepa.verify(jepa, video, backend="fused")


@pytest.mark.parametrize(("faults", "draws", "passed"), [(0, 1, True), (1, 2, True), (2, 3, True), (9, 3, False)])
def test_a_gradient_that_jumps_gets_other_chances(
    faults: int, draws: int, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a rounding moves the input of one ReLU across zero."""

    class Jumps(ClosedFormSquareLoss):
        calls = 0

        def forward(self, state: Tensor, prediction: Tensor) -> Tensor:
            type(self).calls += 1
            return steeper(super().forward(state, prediction), 5e-3 if type(self).calls <= faults else 0.0)

    videos = []
    unroll = verification._unroll

    def seen(model: Any, video: Tensor, actions: None, rule: str, **options: Any) -> Any:
        if rule == "float64":
            videos.append(video)
        return unroll(model, video, actions, rule, **options)

    monkeypatch.setattr(verification, "_unroll", seen)
    jepa = faulty(fastjepa.accelerate(original(), verbose=False), "predcost", Jumps)
    assert fastjepa.verify(jepa, some_video(), steps=1, verbose=False).passed == passed
    assert (len(videos), Jumps.calls) == (draws, draws + 1)  # a TrainStep calls it once more
    assert all(not torch.equal(video, videos[0]) for video in videos[1:])


@pytest.mark.parametrize(
    ("video", "error", "message"),
    [
        ([0.0], TypeError, "video must be a floating-point tensor .*, got list"),
        (torch.zeros(1, 1, 4, 8, 8, dtype=torch.uint8), TypeError, "divide uint8 video by 255"),
        (torch.rand(1, 4, 8, 8), ValueError, r"video must be \(B, C, T, H, W\), got shape \(1, 4, 8, 8\)"),
        (torch.rand(0, 1, 4, 8, 8), ValueError, r"cannot be unrolled on a video of shape \(0, 1, 4, 8, 8\)"),
        (torch.rand(1, 1, 4, 8, 8, device="meta"), ValueError, "video is on meta, the model on cpu"),
        (torch.full((1, 1, 4, 8, 8), float("nan")), ValueError, "not finite"),
        (
            torch.rand(1, 3, 4, 8, 8),
            ValueError,
            r"cannot be unrolled on a video of shape \(1, 3, 4, 8, 8\): .*channels",
        ),
        (torch.rand(1, 1, 2, 8, 8), ValueError, "parallel unrolling takes at least 3 frames, got T = 2"),
    ],
)
def test_wrong_videos(video: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastjepa.verify(original(), video)


@pytest.mark.parametrize(
    ("jepa", "options", "error", "message"),
    [
        (nn.Linear(1, 1), {}, ValueError, "jepa has no module 'encoder'"),
        (original().double(), {}, ValueError, "got torch.float64; truth is computed in float64"),
        (original(), {"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        (original(), {"precision": "fp32"}, ValueError, "precision must be one of keep, bf16; got 'fp32'"),
        (original(), {"backend": "fast"}, ValueError, "backend must be one of auto, eager, fused; got 'fast'"),
    ],
)
def test_wrong_arguments(jepa: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastjepa.verify(jepa, some_video(), **options)


def test_a_model_that_cannot_be_copied() -> None:
    jepa = original()
    jepa.last_loss = jepa.unroll(some_video(), None)[1][0]  # with its graph
    with pytest.raises(
        ValueError, match="this JEPA cannot be copied, and verify works on copies: Only Tensors created"
    ):
        fastjepa.verify(jepa, some_video(), verbose=False)


def test_a_model_whose_losses_are_not_finite() -> None:
    jepa = original()
    with torch.no_grad():
        jepa.encoder.conv1.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="losses of the plain model on this video are not finite"):
        fastjepa.verify(jepa, some_video())


def test_random_numbers_would_differ_between_precisions() -> None:
    jepa = original()
    jepa.encoder = nn.Sequential(jepa.encoder, nn.Dropout3d(0.1))
    with pytest.raises(ValueError, match=r"encoder.1 is dropout in train mode, .* verify with jepa.encoder.1.eval\(\)"):
        fastjepa.verify(jepa, some_video())
    jepa.encoder[1].eval()
    assert fastjepa.verify(jepa, some_video(), steps=1, verbose=False).passed


def test_no_memory_for_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    jepa = original()

    def no_memory(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(jepa), "unroll", no_memory)
    with pytest.raises(
        RuntimeError, match=r"no memory for a video of shape \(2, 1, 5, 16, 16\) in float64; give fewer"
    ):
        fastjepa.verify(jepa, some_video())


def test_what_cannot_be_judged_has_not_passed() -> None:
    jepa = original()
    found = fastjepa.verify(jepa, some_video(), steps=1, verbose=False)
    unsure = replace(found, rows=(replace(found.rows[0], bound=None), *found.rows[1:]))
    assert not unsure.passed
    assert unsure.worst.result == "losses"
    assert str(unsure).startswith("fastjepa.verify: NOT PASSED: 1 of 11 results cannot be judged by eager; give more")
    assert "cannot be judged\n" in str(unsure)


class DampedLoss(tiny_jepa().__class__):  # type: ignore[misc]
    """A JEPA with a composition of its own."""

    def unroll(self, *arguments: Any, **options: Any) -> Any:
        states, losses = super().unroll(*arguments, **options)
        return states, losses if losses is None else (1.1 * losses[0], *losses[1:])


def test_a_unroll_of_the_users_own_is_what_is_verified() -> None:
    jepa: Any = tiny_jepa()
    plain = fastjepa.verify(jepa, some_video(), steps=1, verbose=False)
    jepa.__class__ = DampedLoss
    found = fastjepa.verify(jepa, some_video(), steps=1, verbose=False)
    names = [row.result for row in found.rows]
    assert names[: len(plain.rows) - 1] == [row.result for row in plain.rows][:-1]
    assert all(row.exact for row in found.rows if row.result != "loss of a TrainStep")


def test_a_train_step_of_another_composition_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = TrainStep.losses

    def wrong(self: Any, *batch: Any) -> Any:
        found = losses(self, *batch)
        return found._replace(jepa=1.001 * found.jepa)

    assert fastjepa.verify(tiny_jepa(), some_video(), steps=1, verbose=False).passed
    monkeypatch.setattr(TrainStep, "losses", wrong)
    found = fastjepa.verify(tiny_jepa(), some_video(), steps=1, verbose=False)
    assert [row.result for row in found.rows if not row.exact] == ["loss of a TrainStep"]
