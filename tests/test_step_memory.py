"""The memory of a training step, counted on fake tensors, and what follows from it for recomputation."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from absence import python
from calibration_standins import some_setting
from fastjepa.calibration.choice import EAGER, Choice
from fastjepa.calibration.memory import Memory, recompute_first
from fastjepa.fused import step_memory as module
from fastjepa.fused.step_memory import Kept, StepSizes, count_step, free_bytes, kept_bytes, memory_on, step_memory
from fastjepa.fused.swap import accelerate
from fastjepa.model.jepa import build_jepa
from fastjepa.model.probes import build_probes
from fastjepa.model.step import TrainStep

TINY = StepSizes(
    batch=2, frames=4, height=16, width=8, henc=3, hpre=2, dstc=4, projector="4-6-5", steps=2
)  # fmt: skip
KEEPING = Choice(batch_norm=True, losses="fused")
RECOMPUTING = dataclasses.replace(KEEPING, recompute=True)


def really_kept(sizes: StepSizes, device: str, *, bf16: bool, recompute: bool | None) -> int:
    """By fused networks, or, if `recompute` is None, by eager ones."""
    jepa = build_jepa(
        dobs=sizes.dobs, henc=sizes.henc, hpre=sizes.hpre, dstc=sizes.dstc, projector=sizes.projector,
        std_coeff=1.0, cov_coeff=1.0,
    ).to(device)  # fmt: skip
    if recompute is not None:
        accelerate(jepa, backend="fused", recompute="on" if recompute else "off", verbose=False)
    heads = [head.to(device) for head in build_probes(dobs=sizes.dobs, dstc=sizes.dstc)]
    video = torch.rand(sizes.batch, sizes.dobs, sizes.frames, sizes.height, sizes.width, device=device)
    maps = torch.zeros(sizes.batch, sizes.frames, 8, 8, device=device)
    projection: Any = "eager" if recompute is None else "auto"
    autocast_dtype = torch.bfloat16 if bf16 else None
    step = TrainStep(jepa, *heads, steps=sizes.steps, projection=projection, autocast_dtype=autocast_dtype)
    owned = [t for part in (jepa, *heads) for t in (*part.parameters(), *part.buffers())]
    return kept_bytes(lambda: step.losses(video, maps), [*owned, video])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_count_is_what_a_real_step_keeps(device: str, bf16: bool, recompute: bool) -> None:
    counted = count_step(TINY, bf16=bf16, fused=True, recompute=recompute)
    # On a GPU cuDNN may keep small things of its own.
    close = 0.0 if device == "cpu" else 0.05
    assert counted.total == pytest.approx(really_kept(TINY, device, bf16=bf16, recompute=recompute), rel=close)
    assert 0 < counted.largest < counted.total


def test_a_count_of_an_eager_step() -> None:
    """Where eager BatchNorm keeps running buffers, which are nobody's but the model's."""
    counted = count_step(TINY, bf16=False, fused=False, projection="eager")
    assert counted.total == really_kept(TINY, "cpu", bf16=False, recompute=None)


def test_recomputation_keeps_less_and_the_margin_is_the_stated_one(needs_triton: None) -> None:
    keeping, recomputing = (count_step(TINY, bf16=True, fused=True, recompute=again) for again in (False, True))
    assert recomputing.total < 0.7 * keeping.total
    assert recomputing.weights == keeping.weights
    assert Kept(total=1600, largest=100, weights=10).needed == 1600 + 100 + 8 * 100 + 4 * 10 + (1 << 30)


def test_the_caller_notices_nothing(needs_triton: None) -> None:
    """Whatever modes are on; and the count is the same in all of them."""
    expected = count_step(TINY, bf16=False, fused=True, recompute=True)
    numbers, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(3)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert count_step(TINY, bf16=False, fused=True, recompute=True) == expected
            assert torch.is_inference_mode_enabled()
            assert torch.is_autocast_enabled("cpu")
        with torch.no_grad():
            assert count_step(TINY, bf16=False, fused=True, recompute=True) == expected
            assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64
        assert torch.empty(1).device.type == "meta"
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(torch.get_rng_state(), numbers)


def test_kernels_that_are_compiled_are_counted_without_a_gpu(needs_triton: None) -> None:
    """As on a machine that trains, where they are registered in another way than for the interpreter."""
    code = (
        "from fastjepa.fused.step_memory import StepSizes, count_step\n"
        "from fastjepa.kernels.checks import unavailable_reason\n"
        f"print(count_step({TINY!r}, bf16=True, fused=True, recompute=True).total)\n"
        "import torch; print(unavailable_reason(torch.device('cpu')))\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    total, reason = done.stdout.splitlines()
    assert int(total) == count_step(TINY, bf16=True, fused=True, recompute=True).total
    assert reason.startswith("Triton kernels need a CUDA device")  # and afterwards nothing else is let through


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_memory_of_a_step_is_counted_at_its_setting(precision: str, needs_triton: None) -> None:
    setting = some_setting(frames=4, batch=2, steps=2, height=16, precision=precision)
    sizes = StepSizes.of(setting)
    assert dataclasses.asdict(sizes).items() <= dataclasses.asdict(setting).items()
    keeping, recomputing = (
        count_step(sizes, bf16=precision == "bf16", fused=True, recompute=again).needed for again in (False, True)
    )
    assert step_memory(setting, free=5, clips=3) == Memory(keeping + 3, recomputing + 3, 5)


def test_a_projector_that_kernels_do_not_take_is_counted_with_eager_losses(needs_triton: None) -> None:
    wide = some_setting(projector="4-500-7", frames=4)
    eager = count_step(StepSizes.of(wide), bf16=False, fused=True, recompute=False, projection="eager")
    memory = step_memory(wide, free=5)
    assert memory == Memory(eager.needed, memory.recomputing, 5)  # type: ignore[union-attr]


def test_what_cannot_be_counted_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Kept:
        raise RuntimeError("no fakes here\nand more")

    monkeypatch.setattr(module, "_count_fused", broken)
    assert step_memory(some_setting(), 1) == (
        "the memory of a step could not be counted (RuntimeError: no fakes here): recomputation first"
    )


def test_what_is_set_aside_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("memory_reserved", 700), ("memory_allocated", 200), ("mem_get_info", (1000, 5000))):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert free_bytes(torch.device("cuda")) == 1500


def test_memory_matters_for_training_on_a_gpu_that_runs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_bytes", lambda _: 7)
    monkeypatch.setattr(module, "step_memory", lambda setting, free, clips: f"{free} {clips}")
    with monkeypatch.context() as patch:
        patch.setattr(module.checks, "unavailable_reason", lambda _: None)
        assert memory_on(some_setting(), torch.device("cuda"), 5) == "7 5"
        assert memory_on(some_setting(), torch.device("cpu")) == ""
        assert memory_on(some_setting(purpose="inference"), torch.device("cuda")) == ""
        patch.setattr(module.checks, "unavailable_reason", lambda _: "no Triton")
        assert memory_on(some_setting(), torch.device("cuda")) == ""


@pytest.mark.parametrize(
    ("free", "first", "both"),
    [(30, False, True), (20, False, True), (19, True, False), (10, True, False), (9, True, True)],
)
def test_recomputation_is_for_where_memory_asks_for_it(free: int, first: bool, both: bool) -> None:
    memory = Memory(keeping=20, recomputing=10, free=free)
    assert memory.recompute == recompute_first(memory) == first
    assert memory.allows(RECOMPUTING)
    assert memory.allows(KEEPING) == both
    assert memory.allows(EAGER)
    assert memory.allows(Choice(losses="fused", cuda_graph=True))


def test_it_says_what_was_counted() -> None:
    told = str(Memory(22_700_000_000, 14_300_000_000, 79_000_000_000))
    assert told == (
        "by count a fused step that keeps its activations needs 22.7 GB, one that computes them again 14.3 GB, and "
        "79.0 GB are free: they are kept"
    )
    assert str(Memory(3, 2, 2)).endswith(": recomputation")
    assert str(Memory(3, 2, 1)).endswith(": recomputation, and perhaps too little")
    assert recompute_first("it is not known") is True
