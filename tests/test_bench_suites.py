"""The suites of `python -m bench`: their work is counted right, their variants agree, and their smoke runs work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import evaluation, losses, step
from bench.recipe import TINY, Recipe, build_model, count, make_batch, step_work
from bench.results import Row, read_rows
from bench.roofline import H200
from fastjepa.networks import ResNet5
from fastjepa.step import TrainStep

CPU = torch.device("cpu")


def status_of(rows: list[Row]) -> dict[str, str]:
    return {row.variant: row.status for row in rows}


# -- work


def test_flops_of_the_encoder_equal_a_hand_count() -> None:
    # Multiply–adds per pixel: conv1, layer1 twice, layer2 (two convs, 1×1 shortcut), layer3 (the same).
    macs = 9 * 32 + 2 * 9 * 32 * 32 + (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64) + (9 * 64 * 16 + 9 * 16 * 16 + 64 * 16)
    counted = count(ResNet5(1, 32, 16), torch.empty(3, 1, 8, 8))
    assert counted.forward == 2 * macs * 3 * 64
    assert counted.backward == 2 * counted.forward - 2 * 9 * 32 * 3 * 64  # no gradient for the video
    # Read and written: 1+32, then 32+32 twice, 32+64, 64+64, 32+64, 64+16, 16+16, 64+16.
    assert counted.elements == (33 + 64 * 2 + 96 + 128 + 96 + 80 + 32 + 80) * 3 * 64


def test_flops_of_the_literal_step_are_what_pytorch_counts() -> None:
    batch = make_batch(TINY, CPU, torch.float32)
    literal = TrainStep(*build_model(TINY, CPU), steps=TINY.steps, literal=True)
    with FlopCounterMode(display=False) as counter:
        literal(batch["video"], batch["digit_location"])
    assert step_work(TINY).literal_flops == counter.get_total_flops()


def test_work_of_the_published_recipe() -> None:
    work = step_work(Recipe())
    assert work.literal_flops == pytest.approx(12.5e12, rel=0.01)  # as the specification of the recipe says
    assert work.flops < work.literal_flops
    # No more than the roofline of separate layers, ≈ 30 ms, and no less than half of it.
    assert 0.015 < H200.seconds(*vars(work.once(torch.bfloat16)).values(), "bf16") < 0.030


# -- step and eval


def test_models_and_batches_are_the_same_every_time() -> None:
    first, second = build_model(TINY, CPU)[0], build_model(TINY, CPU, torch.float64)[0]
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter.double(), second.get_parameter(name))
    assert torch.equal(make_batch(TINY, CPU, torch.float32)["video"], make_batch(TINY, CPU, torch.float32)["video"])


def test_every_way_of_the_step_gives_the_losses_and_gradients_of_the_original() -> None:
    inputs = make_batch(TINY, CPU, torch.float32)
    exact = step.truth(TINY, {name: x.double() for name, x in inputs.items()})
    assert set(exact) == {"losses", *(f"gradient of {part}" for part in ("encoder", "predictor", "projector"))}
    for way in (step.Way(literal=True), step.Way(projection="eager"), step.Way(projection="closed_form")):
        found = step.build(TINY, way, CPU)(inputs)
        for name, expected in exact.items():
            error = (found[name].double() - expected).abs().max() / expected.abs().max()
            assert error < 1e-4, (way, name)  # fp32 through ~40 layers; a wrong term or order gives ~1


def test_step_writes_exact_rows_and_says_what_needs_a_gpu(tmp_path: Path) -> None:
    assert step.main(["--quick", "--device", "cpu", "--no-memory", "--out", str(tmp_path), "--eval"]) == 0
    rows = read_rows(tmp_path / "step.jsonl")
    status = status_of(rows)
    assert list(status)[:2] == [step.ORIGINAL, "TF32"]
    assert status[step.ORIGINAL] == "exact"
    assert status["TF32"] == status["fused blocks"] == "unavailable"
    original = rows[0]
    assert original.median_ms is not None
    assert original.quality["samples_per_second"] == pytest.approx(TINY.batch / original.median_ms * 1e3)
    assert original.flops == step_work(TINY).flops
    assert status_of(read_rows(tmp_path / "eval.jsonl"))["each thing once"] == "exact"


def test_evaluations_agree_on_every_detection() -> None:
    inputs = evaluation.make_clips(TINY, CPU, torch.float32)
    exact = evaluation.truth(TINY, inputs)
    found = evaluation.build(TINY, evaluation.Way(), CPU)(inputs)
    # Frames seen (5) and predicted by one and by two steps (3 + 2), 64 cells each, of 2 batches of 2 clips.
    assert exact["detections"].shape == (4 * (5 + 3 + 2) * 64,)
    for name, expected in exact.items():
        assert (found[name].double() - expected).abs().max() <= 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize("arguments", [["--batch", "0"], ["--rounds", "0"], ["--variant", "magic"], ["--only", "no"]])
def test_suites_refuse_what_they_cannot_serve(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        step.main(["--quick", "--device", "cpu", *arguments])
    assert arguments[1] in capsys.readouterr().err


def test_loss_weights_are_the_recipes() -> None:
    jepa = build_model(TINY, CPU)[0]
    assert (jepa.regularizer.std_coeff, jepa.regularizer.cov_coeff) == (losses.STD_COEFF, losses.COV_COEFF)
