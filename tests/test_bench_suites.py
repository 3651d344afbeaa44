"""The suites of `python -m bench`: their work is counted right, their variants agree, and their smoke runs work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import batch_norm, ceilings, checks, convolution, evaluation, layers, moments, rollout, step, train
from bench.harness.case import BACKWARD, BOTH, FORWARD
from bench.harness.roofline import H200
from bench.harness.rows import Row, read_rows
from bench.harness.variants import channels_last
from bench.recipe import HIDDEN, OUT, TINY, Recipe, build_model, count, make_batch, step_work
from bench.step_memory import StepSizes, count_step
from compare import assert_close_to_truth
from fastjepa.config import Config
from fastjepa.eb_jepa import OriginalStep
from fastjepa.kernels.convolution.recipe import predictor_layers
from fastjepa.model.networks import ResNet5

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


def test_flops_of_the_original_step_are_what_pytorch_counts() -> None:
    batch = make_batch(TINY, CPU, torch.float32)
    original = OriginalStep(*build_model(TINY, CPU), steps=TINY.steps)
    with FlopCounterMode(display=False) as counter:
        original(batch["video"], batch["digit_location"])
    assert step_work(TINY).original_flops == counter.get_total_flops()


def test_work_of_the_published_recipe() -> None:
    work = step_work(Recipe())
    assert work.original_flops == pytest.approx(12.5e12, rel=0.01)  # as the specification of the recipe says
    assert work.flops < work.original_flops
    # No more than the roofline of separate layers, ≈ 30 ms, and no less than half of it.
    assert 0.015 < H200.seconds(*vars(work.once(torch.bfloat16)).values(), "bf16") < 0.030


# -- step and eval


def test_models_and_batches_are_the_same_every_time() -> None:
    first, second = build_model(TINY, CPU)[0], build_model(TINY, CPU, torch.float64)[0]
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter.double(), second.get_parameter(name))
    assert torch.equal(make_batch(TINY, CPU, torch.float32)["video"], make_batch(TINY, CPU, torch.float32)["video"])


def test_every_way_of_the_step_gives_the_losses_and_gradients_of_the_original() -> None:
    inputs = make_batch(TINY, CPU, torch.float64)
    exact = step.truth(TINY, inputs)
    assert set(exact) == {"losses", *(f"gradient of {part}" for part in ("encoder", "predictor", "projector"))}
    ways = [step.Way(original=True), step.Way(projection="eager"), step.Way(projection="closed_form")]
    ways += [step.Way(projection="closed_form", channels_last=True), step.Way(projection="closed_form", graph=True)]
    for way in ways:
        found = step.Step(TINY, way, CPU, torch.float64)(inputs)
        for name, expected in exact.items():
            assert_close_to_truth(found[name], expected, f"{way}, {name}", limit=1e-9)


SMALL = Recipe(batch=1, frames=3, pixels=8, henc=2, hpre=2, dstc=4, steps=1)  # for Triton's interpreter


def test_fused_variants_give_what_they_are_compared_with(interpreted: None) -> None:
    inputs = make_batch(SMALL, CPU, torch.float32)
    exact = step.truth(SMALL, {name: x.double() for name, x in inputs.items()})
    found = step.build(SMALL, step.Way(projection="fused", fused_blocks=True), CPU)(inputs)
    for name, expected in exact.items():  # a group of gradients in another order is off by ~1
        assert_close_to_truth(found[name], expected, name, limit=1e-3)
    states = rollout.make_states(SMALL, CPU, torch.float32)
    frames = rollout.build(SMALL, 2, rollout.Way(fused=True, graph=True), CPU)(states)["frames"]
    plain = rollout.truth(SMALL, 2, {"states": states["states"].double()})["frames"]
    assert_close_to_truth(frames, plain, "rollout")
    for graph in (False, True):
        frames = rollout.build(SMALL, 2, rollout.Way(own_convolutions=True, graph=graph), CPU)(states)["frames"]
        assert_close_to_truth(frames, plain, f"rollout of folded convolutions, graph {graph}")
    half = rollout.Way(own_convolutions=True, bf16=True)
    frames = rollout.build(SMALL, 2, half, CPU)({"states": states["states"].bfloat16()})["frames"]
    assert frames.dtype == torch.bfloat16
    assert_close_to_truth(frames, plain, "rollout in bf16", limit=0.05)


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
    inputs = evaluation.make_inputs(TINY, CPU, torch.float32)
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


def test_sizes_and_weights_of_the_losses_are_the_published_recipes() -> None:
    jepa = build_model(Recipe(), CPU)[0]
    published = Config()
    assert (jepa.regularizer.std_coeff, jepa.regularizer.cov_coeff) == (published.std_coeff, published.cov_coeff)
    assert jepa.regularizer.proj.state_dict()["net.0.weight"].shape == (HIDDEN, Recipe().dstc)
    assert jepa.regularizer.proj.state_dict()["net.3.weight"].shape == (OUT, HIDDEN)
    assert Recipe().batch == published.batch_size


# -- layers


def test_blocks_are_those_of_the_networks() -> None:
    jepa = build_model(TINY, torch.device("meta"))[0]
    seen: set[tuple[int, ...]] = set()

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        seen.add(tuple(out.shape))

    for module in jepa.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(note)
    video = torch.empty(TINY.batch, 1, TINY.frames, TINY.pixels, TINY.pixels, device="meta")
    jepa.predictor(jepa.encoder(video))
    blocks = batch_norm.blocks_of(TINY)
    assert {(b.frames, b.channels, b.pixels, b.pixels) for b in blocks} == seen
    assert len(batch_norm.blocks_of(Recipe())) == 15


@pytest.mark.parametrize("form", [batch_norm.PLAIN, batch_norm.RESIDUAL, batch_norm.NORMALIZED])
def test_fused_block_computes_what_it_is_compared_with(form: str, interpreted: None) -> None:
    block = batch_norm.Block(3, 4, 5, form)
    inputs = batch_norm.make_block_inputs(block, CPU, torch.float32)
    eager, fused = (
        batch_norm.block_eager(inputs)["out"],
        batch_norm.build_fused_block(CPU)(channels_last(inputs))["out"],
    )
    torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-5)
    weight = "residual_weight" if form == batch_norm.NORMALIZED else "weight"
    (expected,) = torch.autograd.grad(eager.square().sum(), inputs[weight])
    laid_out = channels_last(inputs)
    (found,) = torch.autograd.grad(batch_norm.build_fused_block(CPU)(laid_out)["out"].square().sum(), laid_out[weight])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_work_of_a_block_is_its_passes_over_the_tensors() -> None:
    block = batch_norm.Block(576, 32, 64, batch_norm.RESIDUAL)
    one = 576 * 32 * 64 * 64 * 2
    works = [batch_norm.block_work(block, phase, torch.bfloat16).bytes_moved for phase in (FORWARD, BACKWARD, BOTH)]
    assert works == [4 * one, 7 * one, 11 * one]


def test_layers_measure_networks_and_blocks(tmp_path: Path) -> None:
    arguments = ["--quick", "--device", "cpu", "--no-memory", "--only", "predictor", "10x4x16x16 residual"]
    assert layers.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "layers.jsonl")
    assert len({row.case for row in rows}) == 2
    assert {row.status for row in rows if row.variant == batch_norm.EAGER} == {"exact"}
    predictor = next(row for row in rows if row.case.startswith("predictor") and row.phase == BACKWARD)
    forward = next(row for row in rows if row.case == predictor.case and row.phase == FORWARD)
    assert predictor.flops == 2 * (forward.flops or 0)  # its input wants a gradient too


# -- rollout


def test_rollout_is_the_autoregressive_unroll() -> None:
    states = rollout.make_states(TINY, CPU, torch.float32)
    found = rollout.build(TINY, 4, rollout.Way(), CPU)(states)["frames"]
    graphed = rollout.build(TINY, 4, rollout.Way(folded=True, graph=True), CPU)(states)["frames"]
    jepa = build_model(TINY, CPU)[0]
    evaluation.settle(jepa, TINY)
    jepa.encoder = torch.nn.Identity()  # the states are given
    unrolled, _ = jepa.eval().unroll(
        states["states"], nsteps=4, unroll_mode="autoregressive", ctxt_window_time=2, compute_loss=False
    )
    assert isinstance(unrolled, torch.Tensor)
    for frames in (found, graphed):
        torch.testing.assert_close(frames, unrolled[:, :, 2:], rtol=1e-5, atol=1e-5)


def test_rollout_neither_grows_nor_dies() -> None:
    frames = rollout.build(TINY, 100, rollout.Way(), CPU)(rollout.make_states(TINY, CPU, torch.float32))["frames"]
    assert 0.05 < frames[:, :, -1].std() < 5.0


def test_rollout_states_latency_and_frames_per_second(tmp_path: Path) -> None:
    assert rollout.main(["--quick", "--device", "cpu", "--no-memory", "--horizon", "3", "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "rollout.jsonl")
    assert rows[0].quantiles == (0.5, 0.99)
    assert rows[0].median_ms is not None
    assert rows[0].quality["frames_per_second"] == pytest.approx(3e3 / rows[0].median_ms)
    status = status_of(rows)
    assert status["eager, BatchNorm folded"] == "exact"
    assert status["folded convolutions bf16, in one graph"] == "unavailable"
    # Convolutions with their biases, BatchNorms, ReLUs, skips, and what is put side by side.
    assert rows[0].quality["launches_per_step"] > rows[1].quality["launches_per_step"] > 18


def test_launches_and_bytes_of_a_rollout_step_are_counted(interpreted: None) -> None:
    for clips in (1, 2):
        recipe = replace(Recipe(), batch=clips)
        counted = rollout.step_traffic(recipe, rollout.Way(own_convolutions=True, bf16=True))
        layers = predictor_layers(clips)
        moved = sum(layer.bytes_moved for layer in layers.values())
        assert counted == {"launches_per_step": len(layers), "bytes_per_frame": moved / clips}
    folded, eager = (rollout.step_traffic(Recipe(batch=1), rollout.Way(folded=way)) for way in (True, False))
    assert folded["launches_per_step"] < eager["launches_per_step"]
    assert folded["bytes_per_frame"] < eager["bytes_per_frame"]


# -- train


def test_training_is_timed_stopped_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--quick", "--out", str(tmp_path / "out")]
    flags = ["--", "--device", "cpu", "--cache_dir", str(tmp_path / "cache")]
    assert train.main([*arguments, "--seconds", "0.001", *flags]) == 0
    first = read_rows(tmp_path / "out" / "train.jsonl")
    assert [row.rounds for row in first] == [1]  # the step that was running when the time was over
    assert train.main([*arguments, "--seconds", "500", *flags]) == 0
    rows = read_rows(tmp_path / "out" / "train.jsonl")
    assert rows[0] == first[0]
    assert [row.quality["step"] for row in rows] == [1, 3, 6]
    assert [row.quality["epoch"] for row in rows] == pytest.approx([1 / 3, 1, 2])
    seconds = [row.quality["seconds"] for row in rows]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert all(0 <= row.quality["mAP"] <= 1 for row in rows)


def test_moments_measures_both_passes(tmp_path: Path) -> None:
    assert moments.main(["--quick", "--device", "cpu", "--no-memory", "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "moments.jsonl")
    assert {row.case.split(" N=")[0] for row in rows} == {"mean and scatter", "linear map"}
    for row in rows:
        assert row.status == ("unavailable" if row.variant.startswith(("fused", "torch.compile")) else "exact"), row


def test_moments_kernels_agree_with_the_definition(device: str) -> None:
    inputs = moments.make_inputs(TINY, torch.device(device), torch.float32)
    for eager, fused in ((moments.moments_eager, moments.moments_fused), (moments.linear_eager, moments.linear_fused)):
        expected, found = eager(inputs), fused(inputs)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))


# -- saved


def test_counting_without_computing_whatever_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        eager, closed = (
            count_step(StepSizes(batch=1), bf16=False, fused=False, projection=path)
            for path in ("eager", "closed_form")
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert 0 < closed.total < eager.total


# -- ceilings and checks


def test_ceilings_know_every_3x3_convolution_of_the_recipe() -> None:
    found = ceilings.convolutions_of(Recipe())
    assert len(found) == 16
    assert ceilings.Convolution(640, 1, 32, 64, 1) in found
    down = ceilings.Convolution(576, 32, 64, 64, 2)
    assert down in found
    assert down.flops == 2 * 576 * 32**2 * 32 * 64 * 9
    inputs = ceilings.make_convolution_inputs(ceilings.convolutions_of(TINY)[0], CPU, torch.float32)
    out = torch.nn.functional.conv2d(inputs["x"], inputs["weight"], padding=1)
    exact = torch.autograd.functional.vjp(
        lambda x, weight: torch.nn.functional.conv2d(x, weight, padding=1),
        (inputs["x"], inputs["weight"]),
        inputs["grad"],
    )[1]
    for direction, expected in zip(ceilings.DIRECTIONS, (out, *exact), strict=True):
        compute = ceilings.convolve(ceilings.convolutions_of(TINY)[0], direction, True, False, CPU)
        torch.testing.assert_close(compute(inputs)["out"], expected)


def test_checks_find_graphs_equal_and_kernels_unavailable_on_a_cpu(tmp_path: Path) -> None:
    arguments = ["--quick", "--device", "cpu", "--no-memory", "--rounds", "1", "--only", "graphed"]
    assert checks.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "checks.jsonl")
    assert {row.case for row in rows} == {"graphed training step = plain", "graphed rollout = plain"}
    for row in rows:
        by_kernels = "fused" in row.variant or "folded convolutions" in row.variant
        assert row.status == ("unavailable" if by_kernels else "exact"), row


def test_one_number_that_differs_fails_a_check() -> None:
    same = {"a": torch.ones(3), "b": torch.zeros(2)}
    other = {"a": torch.ones(3), "b": torch.tensor([0.0, 1e-30])}
    assert checks.differences(same, same)[checks.DIFFERENCES] == 0
    assert checks.differences(same, other)[checks.DIFFERENCES] == 1
    nan = {"a": torch.full((3,), torch.nan), "b": torch.zeros(2)}
    assert checks.differences(nan, nan)[checks.DIFFERENCES] == 3  # what is no number is equal to nothing


# -- convolution


@pytest.mark.parametrize("name", convolution.odd_layers())
def test_a_convolutions_variants_agree(name: str, interpreted: None) -> None:
    layer = convolution.odd_layers()[name]
    inputs = convolution.make_inputs(layer, CPU, torch.float32)
    exact = convolution.compute_eager(layer, {key: x.double() for key, x in inputs.items()})["out"]
    assert exact.shape == (layer.frames, layer.head or layer.out, layer.out_height, layer.out_width)
    fused = convolution.compute_fused(layer, convolution.as_kernels_take(layer, inputs))["out"]
    assert_close_to_truth(fused, exact, name)
    half = convolution.as_cudnn_takes(convolution.make_inputs(layer, CPU, torch.bfloat16))
    assert {x.dtype for x in half.values()} == {torch.bfloat16}
    assert_close_to_truth(convolution.compute_eager(layer, half)["out"], exact, name, limit=0.05)


def test_work_of_a_convolution_is_its_tensors_once_and_what_pytorch_counts() -> None:
    for layer in convolution.odd_layers().values():
        with FlopCounterMode(display=False) as counter:
            convolution.compute_eager(layer, convolution.make_inputs(layer, CPU, torch.float32))
        assert convolution.work(layer, FORWARD, torch.float32).flops == counter.get_total_flops()
        packed = convolution.as_kernels_take(layer, convolution.make_inputs(layer, CPU, torch.bfloat16))
        out = layer.frames * layer.out_height * layer.out_width * (layer.head or layer.out) * 2
        moved = sum(x.numel() * x.element_size() for x in packed.values()) + out
        assert convolution.work(layer, FORWARD, torch.bfloat16).bytes_moved == moved


def test_convolution_measures_a_few_layers_on_a_cpu(tmp_path: Path) -> None:
    assert convolution.main(["--quick", "--device", "cpu", "--no-memory", "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "convolution.jsonl")
    assert len({row.case for row in rows}) == 5
    for row in rows:
        assert row.status == ("unavailable" if row.variant.startswith(("fused", "torch.compile")) else "exact"), row
        assert row.flops or row.status == "unavailable"


def test_convolution_refuses_no_clips(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        convolution.main(["--estimate", "--batch", "0"])
    assert "--batch must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variant", "networks"),
    [
        ("each thing once", ("ResNet5", "StateOnlyPredictor")),
        ("fused bf16", ("FusedResNet5", "FusedStateOnlyPredictor")),
        ("folded convolutions bf16", ("InferenceEncoder", "InferencePredictor")),
    ],
)
def test_an_evaluation_has_the_networks_of_its_name(variant: str, networks: tuple[str, str], device: str) -> None:
    found = next(v for v in evaluation.make_variants(TINY) if v.name == variant).build(torch.device(device))
    assert isinstance(found, evaluation.Evaluate)
    jepa = found.model[0]
    assert (type(jepa.encoder).__name__, type(jepa.predictor).__name__) == networks
