"""The memory of a training step, counted on fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from absence import python
from bench.step_memory import StepSizes, count_step, kept_bytes
from fastjepa.fused.swap import accelerate
from fastjepa.model.jepa import build_jepa
from fastjepa.model.probes import build_probes
from fastjepa.model.step import TrainStep

TINY = StepSizes(
    batch=2, frames=4, height=16, width=8, henc=3, hpre=2, dstc=4, projector="4-6-5", steps=2
)  # fmt: skip


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


def test_recomputation_keeps_less(needs_triton: None) -> None:
    keeping, recomputing = (count_step(TINY, bf16=True, fused=True, recompute=again) for again in (False, True))
    assert recomputing.total < 0.7 * keeping.total


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
        "from bench.step_memory import StepSizes, count_step\n"
        "from fastjepa.kernels.checks import unavailable_reason\n"
        f"print(count_step({TINY!r}, bf16=True, fused=True, recompute=True).total)\n"
        "import torch; print(unavailable_reason(torch.device('cpu')))\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    total, reason = done.stdout.splitlines()
    assert int(total) == count_step(TINY, bf16=True, fused=True, recompute=True).total
    assert reason.startswith("Triton kernels need a CUDA device")  # and afterwards nothing else is let through
