"""Convolutions and what surrounds them, as the table launches them and in every form, against torch in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compare import assert_as_exact_as_eager
from fastjepa.kernels.convolution import fused, op, reference, split_k, strip, weights
from fastjepa.kernels.convolution.audit import audit_cases, case_of
from fastjepa.kernels.convolution.layer import DTYPES, Layer, Precision
from fastjepa.kernels.convolution.recipe import encoder_layers, predictor_layers
from fastjepa.kernels.convolution.table import ARCHITECTURES, Launch, choose
from fastjepa.kernels.launch import LaunchConfig

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Operands = dict[str, Any]


@dataclass(frozen=True)
class Epilogue:
    bias: bool = True
    residual: bool = False
    relu: bool = True
    head: int = 0


def drawn(shape: Sequence[int], dtype: torch.dtype, device: str, seed: int, fan_in: int = 1) -> Tensor:
    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) / fan_in**0.5
    return x.to(device, dtype)


def feature_map(shape: Sequence[int], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Channels-last, in the middle of memory that is NaN: what is read beside it shows."""
    N, C, H, W = shape
    around = torch.full((N + 2, H, W, C), torch.nan, dtype=dtype, device=device)
    around[1:-1] = drawn((N, H, W, C), dtype, device, seed)
    return around[1:-1].permute(0, 3, 1, 2)


def operands(layer: Layer, epilogue: Epilogue, dtype: torch.dtype, device: str) -> Operands:
    """The arguments of `convolution`."""
    N, out_size = layer.frames, (layer.out_height, layer.out_width)
    before = [layer.shortcut_stride * size - (layer.shortcut_stride - 1) for size in out_size]  # the smallest that fits
    k, rows = layer.kernel_size, layer.rows
    weight = drawn((layer.out, sum(layer.sources), k, k), dtype, device, 0, rows)
    shortcut = drawn((layer.out, sum(layer.shortcut), 1, 1), dtype, device, 1, rows) if layer.shortcut else None
    head = None
    if epilogue.head:
        head_weight = drawn((layer.out, epilogue.head), dtype, device, 2, layer.out)
        head = (head_weight, drawn((epilogue.head,), torch.float32, device, 3))

    def maps(channels: Sequence[int], size: Sequence[int], seed: int) -> list[Tensor]:
        return [feature_map((N, c, *size), dtype, device, seed + i) for i, c in enumerate(channels)]

    return {
        "sources": maps(layer.sources, (layer.height, layer.width), 4),
        "weight": weights.pack(weight, shortcut),
        "bias": drawn((layer.out,), torch.float32, device, 6) if epilogue.bias else None,
        "kernel_size": k,
        "stride": layer.stride,
        "shortcut": maps(layer.shortcut, before, 7),
        "shortcut_stride": layer.shortcut_stride,
        "residual": maps((layer.out,), out_size, 9)[0] if epilogue.residual else None,
        "relu": epilogue.relu,
        "head": head,
    }


def wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    return type(value)(map(wide, value)) if isinstance(value, list | tuple) else value


def check(layer: Layer, epilogue: Epilogue, dtype: torch.dtype, device: str) -> None:
    arguments = operands(layer, epilogue, dtype, device)
    eager = reference.convolution(**arguments)
    out = torch.full_like(eager, torch.nan, memory_format=torch.channels_last)
    found = fused.convolution(**arguments, out=out)
    assert found is out
    truth = reference.convolution(**{name: wide(value) for name, value in arguments.items()})
    assert_as_exact_as_eager(found, eager, truth, "result")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Launch], None]:
    """Makes every convolution be launched like that, whatever the table says."""

    def use(launch: Launch) -> None:
        monkeypatch.setattr(op, "choose", lambda layer, architecture: launch)

    return use


def blocks(form: str, stages: int = 2, **sizes: int) -> Launch:
    return Launch(form, LaunchConfig(4, stages, {f"BLOCK_{name}": size for name, size in sizes.items()}))  # type: ignore[arg-type]


GEMM = blocks("gemm", N=32, D=16, I=16, O=16)
WIDE_GEMM = blocks("gemm", N=64, D=16, I=32, O=32)
SPLIT_K = blocks("split_k", P=4, N=16, D=16, I=16, O=16)
STRIP = blocks("strip", 1, N=16, W=8, D=16, I=16, O=32)

LAYERS = {
    "one frame": Layer((16,), 32, 1, 5, 6),
    "two sources": Layer((16, 16), 32, 2, 3, 5),
    "two sources that differ": Layer((16, 32), 32, 1, 4, 5),
    "shortcut": Layer((32,), 32, 1, 5, 5, shortcut=(16,)),
    "shortcut of two": Layer((16,), 32, 2, 3, 5, shortcut=(16, 16)),
    "shortcut of two that differ": Layer((16,), 32, 1, 3, 5, shortcut=(32, 16)),
    "frames smaller than a tile": Layer((16,), 32, 9, 1, 2, shortcut=(16,)),
    "one pixel": Layer((16,), 32, 1, 1, 1),
}
# Of which a strip takes none.
STRIDED = {
    "stride 2": Layer((16,), 32, 2, 6, 8, stride=2),
    "stride 2, odd": Layer((16,), 32, 2, 7, 5, stride=2),
    "strided shortcut": Layer((32,), 32, 1, 3, 4, shortcut=(16,), shortcut_stride=2),
    "both strides": Layer((16, 16), 32, 1, 5, 4, stride=2, shortcut=(16, 16), shortcut_stride=2),
    "1×1": Layer((32,), 32, 2, 5, 3, kernel_size=1),
    "1×1, stride 2": Layer((16, 16), 32, 1, 5, 4, kernel_size=1, stride=2),
}
# Which only `gemm` takes.
UNEVEN = {
    "odd channels": Layer((5,), 7, 1, 5, 4),
    "odd channels of two": Layer((3, 20), 24, 2, 4, 3),
    "odd channels of all": Layer((20, 12), 40, 1, 3, 4, shortcut=(9, 5)),
    "more than a block": Layer((17,), 40, 1, 3, 3, shortcut=(33,), shortcut_stride=2),
    "one channel of two": Layer((1, 1), 3, 1, 4, 4),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [*LAYERS, *STRIDED, *UNEVEN])
def test_as_the_table_launches_it(name: str, dtype: torch.dtype, device: str) -> None:
    check({**LAYERS, **STRIDED, **UNEVEN}[name], Epilogue(), dtype, device)


@pytest.mark.parametrize("launch", [GEMM, WIDE_GEMM, SPLIT_K, STRIP], ids=["gemm", "wide gemm", "split_k", "strip"])
@pytest.mark.parametrize("name", [*LAYERS, *STRIDED, *UNEVEN])
def test_every_form(name: str, launch: Launch, launched: Callable[[Launch], None], device: str) -> None:
    layer = {**LAYERS, **STRIDED, **UNEVEN}[name]
    launched(launch)
    if (launch is STRIP and not strip.fits(layer, launch.config)) or (
        launch is SPLIT_K and not split_k.fits(layer, 16)
    ):
        with pytest.raises(ValueError, match="fit"):
            fused.convolution(**operands(layer, Epilogue(), torch.float32, device))
        return
    check(layer, Epilogue(residual=name.startswith("one")), torch.float32, device)


@pytest.mark.parametrize("launch", [GEMM, SPLIT_K, STRIP, None], ids=["gemm", "split_k", "strip", "stem"])
@pytest.mark.parametrize(("bias", "residual", "relu"), [*itertools.product((False, True), repeat=3)])
def test_every_epilogue(
    bias: bool, residual: bool, relu: bool, launch: Launch | None, launched: Callable[[Launch], None], device: str
) -> None:
    layer = Layer((16 if launch else 3,), 32, 1, 5, 4)
    if launch:
        launched(launch)
    check(layer, Epilogue(bias, residual, relu), torch.float32, device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("launch", [WIDE_GEMM, STRIP, None], ids=["gemm", "strip", "table"])
@pytest.mark.parametrize("head", [1, 5, 16, 33])
def test_head(
    head: int, launch: Launch | None, dtype: torch.dtype, launched: Callable[[Launch], None], device: str
) -> None:
    if launch is not None:
        sizes = {**launch.config.blocks, "BLOCK_D": 64 if head > 16 else 16}
        launched(replace(launch, config=replace(launch.config, blocks=sizes)))
    check(Layer((16, 16), 32, 1, 4, 5, shortcut=(16,)), Epilogue(head=head, residual=head == 5), dtype, device)


def test_a_head_without_bias_or_relu(device: str) -> None:
    arguments = operands(Layer((16,), 20, 1, 3, 3), Epilogue(relu=False, head=4), torch.float32, device)
    arguments["head"] = (arguments["head"][0], None)
    truth = reference.convolution(**{name: wide(value) for name, value in arguments.items()})
    assert_as_exact_as_eager(fused.convolution(**arguments), reference.convolution(**arguments), truth, "result")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("channels", "out", "size", "stride"),
    [(1, 32, (9, 8), 1), (3, 20, (5, 7), 2), (4, 16, (4, 4), 1), (2, 70, (1, 1), 2)],
)
def test_stem(channels: int, out: int, size: tuple[int, int], stride: int, dtype: torch.dtype, device: str) -> None:
    check(Layer((channels,), out, 2, *size, stride=stride), Epilogue(residual=channels == 3), dtype, device)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_stem_reads_frames_of_a_video_in_place(channels: int, dtype: torch.dtype, device: str) -> None:
    """As fp32, which is rounded to the dtype of the weights, and in whatever layout."""
    video = drawn((1, channels, 3, 5, 6), torch.float32, device, 0)
    weight = weights.pack(drawn((16, channels, 3, 3), dtype, device, 1, 9 * channels))
    frames = video[0].transpose(0, 1)  # (T, C, H, W), strided
    expected = fused.convolution([frames.to(dtype).contiguous()], weight)
    for laid in (frames, frames.contiguous(memory_format=torch.channels_last), frames.flip(0).contiguous().flip(0)):
        assert torch.equal(fused.convolution([laid], weight), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("frames", "channels", "out", "size"),
    [(2, 16, 8, (3, 5)), (1, 20, 5, (4, 1)), (1, 1, 1, (1, 1)), (5, 32, 40, (1, 2))],
)
def test_transposed(
    frames: int, channels: int, out: int, size: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    x = feature_map((frames, channels, *size), dtype, device, 0)
    weight = drawn((channels, out, 2, 2), dtype, device, 1, channels)
    for bias in (drawn((out,), torch.float32, device, 2), None):
        packed = weights.pack_transposed(weight)
        found = fused.transposed_convolution(x, packed, bias)
        eager = reference.transposed_convolution(x, packed, bias)
        truth = F.conv_transpose2d(x.double(), weight.double(), None if bias is None else bias.double(), stride=2)
        assert_as_exact_as_eager(found, eager, truth, "result")
        assert torch.equal(
            found, fused.transposed_convolution(x.contiguous(), packed, bias, out=torch.empty_like(found))
        )


def test_the_reference_is_torchs_convolution(device: str) -> None:
    x, weight = drawn((2, 6, 5, 4), torch.float64, device, 0), drawn((3, 6, 3, 3), torch.float64, device, 1)
    expected = F.conv2d(x, weight, stride=2, padding=1)
    packed = weights.pack(weight)
    assert torch.allclose(reference.convolution([x[:, :2], x[:, 2:]], packed, stride=2), expected, rtol=1e-12, atol=0)
    shortcut = drawn((3, 4, 1, 1), torch.float64, device, 2)
    kernel, of_shortcut = weights.unpack(weights.pack(weight, shortcut), 6, 3)
    assert torch.equal(kernel, weight)
    assert of_shortcut is not None
    assert torch.equal(of_shortcut, shortcut)
    transposed = drawn((6, 3, 2, 2), torch.float64, device, 3)
    assert torch.equal(weights.unpack_transposed(weights.pack_transposed(transposed)), transposed)


@pytest.mark.parametrize("name", ["two sources", "shortcut", "both strides"])
def test_other_layouts_are_laid_out_first(name: str, device: str) -> None:
    arguments = operands({**LAYERS, **STRIDED}[name], Epilogue(residual=True), torch.float32, device)
    expected = fused.convolution(**arguments)
    for key in ("sources", "shortcut"):
        arguments[key] = [x.contiguous() for x in arguments[key]]
    arguments["residual"] = arguments["residual"].contiguous()
    assert torch.equal(fused.convolution(**arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_may_have_another_dtype(dtype: torch.dtype, device: str) -> None:
    arguments = operands(Layer((16,), 16, 1, 3, 4), Epilogue(), torch.bfloat16, device)
    narrow = fused.convolution(**arguments)
    out = torch.empty_like(narrow, dtype=dtype)
    assert torch.equal(fused.convolution(**arguments, out=out).bfloat16(), narrow)


@pytest.mark.parametrize("launch", [GEMM, SPLIT_K, STRIP], ids=["gemm", "split_k", "strip"])
def test_twice_the_same_bits(launch: Launch, launched: Callable[[Launch], None], device: str) -> None:
    arguments = operands(LAYERS["shortcut"], Epilogue(), torch.float32, device)
    launched(launch)
    assert torch.equal(fused.convolution(**arguments), fused.convolution(**arguments))


def test_nan_goes_through_relu_and_stays_in_its_frame(device: str) -> None:
    arguments = operands(Layer((16,), 16, 3, 4, 4), Epilogue(), torch.float32, device)
    arguments["sources"][0][1, 3, 0, 0] = torch.nan
    found = fused.convolution(**arguments)
    assert found[1, :, :2, :2].isnan().all()
    assert found.isnan().sum() == 16 * 4


def test_a_pixel_of_an_image_reaches_its_neighbours_only(device: str) -> None:
    arguments = operands(Layer((1,), 16, 2, 6, 6), Epilogue(), torch.float32, device)
    arguments["sources"][0][0, 0, 4, 3] = torch.nan
    found = fused.convolution(**arguments)
    assert found[0, :, 3:6, 2:5].isnan().all()
    assert found.isnan().sum() == 16 * 9


def test_sums_are_rounded_to_the_nearest_before_a_head_and_in_the_end(device: str) -> None:
    """259 lies between 258 and 260 in bf16, whose last bit is even; cut off, it would be 258."""
    x = torch.full((1, 16, 1, 1), 16.0, dtype=torch.bfloat16, device=device)
    weight, bias = torch.ones(16, 16, dtype=torch.bfloat16, device=device), torch.full((16,), 3.0, device=device)
    assert (fused.convolution([x], weight, bias, kernel_size=1) == 260).all()
    head = torch.eye(16, dtype=torch.bfloat16, device=device)
    out = torch.empty(1, 16, 1, 1, device=device)
    assert (fused.convolution([x], weight, bias, kernel_size=1, head=(head, None), out=out) == 260).all()


def test_no_frames_are_no_work(device: str) -> None:
    arguments = operands(Layer((16,), 16, 2, 4, 4), Epilogue(), torch.float32, device)
    arguments["sources"] = [x[:0] for x in arguments["sources"]]
    assert fused.convolution(**arguments).shape == (0, 16, 4, 4)


# ---- the table -------------------------------------------------------------------------------------------------------


def all_recipe_layers(frames: int, precision: Precision) -> dict[str, Layer]:
    predictor, encoder = predictor_layers(frames, precision), encoder_layers(frames, precision)
    return {**predictor, **{f"encoder.{name}": layer for name, layer in encoder.items()}}


def assert_taken(launch: Launch, layer: Layer, architecture: int) -> None:
    """What the kernel of the form asks for."""
    sizes = launch.config.blocks
    assert architecture in launch.instructions
    assert not launch.launch_early
    if layer.head:
        assert sizes["BLOCK_O"] >= layer.out
        assert sizes["BLOCK_D"] >= layer.head
    if launch.form == "strip":
        assert strip.fits(layer, launch.config)
    if launch.form == "split_k":
        assert split_k.fits(layer, sizes["BLOCK_I"])
        assert sizes["BLOCK_P"] == launch.config.num_warps
    if launch.form == "stem":
        assert sizes["BLOCK_I"] >= layer.rows
    tiles = (sizes["BLOCK_N"] + sizes["BLOCK_O"]) * sizes["BLOCK_I"] * sizes.get("BLOCK_P", 1)
    assert launch.config.num_stages * tiles * DTYPES[layer.precision].itemsize <= 132 * 1024


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    counts = st.integers(1, 512)
    kernel_size = draw(st.sampled_from((1, 2, 3)))
    shortcut: tuple[int, ...] = ()
    if kernel_size == 3:
        shortcut = tuple(draw(st.lists(counts, max_size=2)))
    return Layer(
        sources=tuple(draw(st.lists(counts, min_size=1, max_size=1 if kernel_size == 2 else 2))),
        out=draw(counts), frames=draw(st.integers(1, 2000)), height=draw(st.integers(1, 70)),
        width=draw(st.integers(1, 70)), kernel_size=kernel_size,
        stride=1 if kernel_size == 2 else draw(st.sampled_from((1, 2))), shortcut=shortcut,
        shortcut_stride=draw(st.sampled_from((1, 2))) if shortcut else 1,
        precision=draw(st.sampled_from(tuple(DTYPES))),
    )  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(layers(), st.sampled_from(ARCHITECTURES), st.integers(0, 128))
def test_the_table_has_a_launch_for_every_layer(layer: Layer, architecture: int, head: int) -> None:
    assert_taken(choose(layer, architecture), layer, architecture)
    if not layer.is_transposed and layer.out <= 128:
        layer = replace(layer, head=head)
        assert_taken(choose(layer, architecture), layer, architecture)


@pytest.mark.parametrize("precision", DTYPES)
def test_the_recipes_forms(precision: Precision) -> None:
    """One clip and 64 are launched differently, and each form has its use."""
    forms = {
        frames: {name: choose(layer).form for name, layer in all_recipe_layers(frames, precision).items()}
        for frames in (1, 64)
    }
    assert len(predictor_layers(1)) == 18
    assert forms[1]["up3"] == "transposed"
    assert forms[64]["encoder.conv1"] == "stem"
    if precision != "fp32":
        assert forms[1]["bott.conv2"] == "split_k"
        assert forms[1]["enc1.conv1"] == "gemm"
        assert forms[64]["enc1.conv1"] == "strip"
        assert choose(predictor_layers(64, precision)["enc1.conv1"], 80).form == "gemm"


def test_every_layer_of_the_recipe_is_audited_as_it_is_launched() -> None:
    """In bf16, on every architecture; what is compiled to the same code has one case."""
    audited = {
        (architecture, repr((case.kernel, case.config, case.constexprs, case.signature)))
        for case in audit_cases()
        for architecture in case.instructions
    }
    for frames, architecture in itertools.product((1, 64), ARCHITECTURES):
        networks = {**predictor_layers(frames), **{f"encoder.{n}": e for n, e in encoder_layers(10 * frames).items()}}
        for name, layer in networks.items():
            case = case_of(layer, choose(layer, architecture), name)
            assert (architecture, repr((case.kernel, case.config, case.constexprs, case.signature))) in audited, name


def test_work_of_a_layer() -> None:
    layer = Layer((16, 32), 8, 2, 5, 4, stride=2, shortcut=(4,), shortcut_stride=1, residual=True, head=3)
    assert (layer.out_height, layer.out_width, layer.pixels, layer.rows) == (3, 2, 12, 9 * 48 + 4)
    assert layer.flops == 2 * 12 * (8 * (9 * 48 + 4) + 8 * 3)
    elements = 2 * 20 * 48 + layer.rows * 8 + 12 * 4 + 12 * 3 + 12 * 8 + 8 * 3
    assert layer.bytes_moved == 2 * elements + 4 * (8 + 3)
    up = Layer((16,), 8, 2, 5, 4, kernel_size=2)
    assert (up.out_height, up.out_width, up.pixels, up.rows, up.columns) == (10, 8, 40, 16, 32)
    assert up.flops == 2 * 40 * 16 * 32
    assert up.bytes_moved == 2 * (40 * 16 + 16 * 32 + 160 * 8) + 4 * 8


# ---- the op ----------------------------------------------------------------------------------------------------------


def op_arguments(layer: Layer, epilogue: Epilogue, device: str) -> tuple[Any, ...]:
    a = operands(layer, epilogue, torch.float32, device)
    out = torch.empty_like(fused.convolution(**a))
    x, x2 = (*a["sources"], None)[:2]
    shortcut, shortcut2 = (*a["shortcut"], None, None)[:2]
    return (
        out, x, x2, shortcut, shortcut2, a["weight"], a["bias"], a["residual"], *(a["head"] or (None, None)),
        a["kernel_size"], a["stride"], a["shortcut_stride"], a["relu"], False,
    )  # fmt: skip


@pytest.mark.parametrize("case", [0, 1, 2])
def test_opcheck(case: int, device: str) -> None:
    layer, epilogue = [
        (LAYERS["shortcut of two"], Epilogue(head=3)),
        (STRIDED["1×1"], Epilogue(residual=True)),
        (Layer((1,), 16, 1, 3, 3), Epilogue(bias=False, relu=False)),
    ][case]
    torch.library.opcheck(op.convolution_out, op_arguments(layer, epilogue, device))


def test_under_torch_compile(device: str) -> None:
    arguments = operands(LAYERS["shortcut of two"], Epilogue(head=3), torch.float32, device)
    transposed = weights.pack_transposed(drawn((3, 4, 2, 2), torch.float32, device, 0))

    def both(sources: list[Tensor]) -> Tensor:
        return fused.transposed_convolution(fused.convolution(**{**arguments, "sources": sources}), transposed)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(arguments["sources"]), both(arguments["sources"]))


def change(**changes: Any) -> Operands:
    arguments = operands(Layer((16,), 8, 1, 4, 4, shortcut=(4,)), Epilogue(), torch.float32, "cpu")
    return {**arguments, **changes}


def cl(*shape: int) -> Tensor:
    return torch.ones(shape).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sources": []}, ValueError, "sources has 0 tensors; accepted: 1 or 2"),
        ({"sources": [cl(1, 16, 4, 4)] * 3}, ValueError, "sources has 3 tensors"),
        ({"shortcut": [cl(1, 4, 4, 4)] * 3}, ValueError, "shortcut has 3 tensors"),
        ({"sources": [torch.ones(16, 4, 4)]}, ValueError, r"sources\[0\] has shape \(16, 4, 4\)"),
        ({"sources": [cl(1, 16, 4, 4).double()]}, TypeError, r"sources\[0\] has dtype torch.float64"),
        ({"sources": [cl(1, 16, 4, 4).bfloat16()]}, TypeError, r"sources\[0\] has dtype torch.bfloat16; accepted"),
        ({"sources": [cl(1, 16, 4, 4), cl(1, 16, 4, 5)]}, ValueError, r"sources\[1\] has shape \(1, 16, 4, 5\)"),
        ({"sources": [cl(1, 15, 4, 4)]}, ValueError, r"weight has shape \(148, 8\); accepted: \(139, 8\)"),
        ({"shortcut": [cl(1, 4, 5, 4)]}, ValueError, r"shortcut\[0\] has shape \(1, 4, 5, 4\); accepted: \(1, any, 4"),
        ({"shortcut_stride": 2}, ValueError, r"shortcut\[0\] has shape \(1, 4, 4, 4\); accepted: \(1, any, 8"),
        ({"shortcut_stride": 3}, ValueError, "shortcut_stride is 3; accepted: 1, 2"),
        ({"stride": 3}, ValueError, "stride is 3; accepted: 1, 2"),
        ({"kernel_size": 5}, ValueError, "kernel_size is 5; accepted: 1, 3"),
        ({"bias": torch.ones(8).double()}, TypeError, "bias has dtype torch.float64; accepted: torch.float32"),
        ({"bias": torch.ones(7)}, ValueError, r"bias has shape \(7,\); accepted: \(8\)"),
        ({"residual": cl(1, 8, 4, 3)}, ValueError, "residual has shape"),
        ({"weight": torch.ones(148, 8).t().contiguous().t()}, ValueError, "weight has strides"),
        ({"weight": torch.ones(148)}, ValueError, r"weight has shape \(148,\)"),
        ({"head": (torch.ones(7, 3), None)}, ValueError, r"head\[0\] has shape \(7, 3\); accepted: \(8, any\)"),
        ({"head": (torch.ones(8, 3), torch.ones(2))}, ValueError, r"head\[1\] has shape"),
        ({"head": (torch.ones(8, 200), None)}, ValueError, "a head from 8 to 200 channels; accepted: up to 128"),
        ({"out": torch.ones(1, 8, 4, 4)}, ValueError, "out has strides"),
        ({"out": cl(1, 8, 4, 5)}, ValueError, "out has shape"),
        ({"out": cl(1, 8, 4, 4).double()}, TypeError, "out has dtype torch.float64"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_named(changes: Operands, error: type[Exception], message: str, device: str) -> None:
    arguments = change(**changes)

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return type(value)(map(moved, value)) if isinstance(value, list | tuple) else value

    with pytest.raises(error, match=message):
        fused.convolution(**{name: moved(value) for name, value in arguments.items()})


def test_too_many_channels_are_refused(device: str) -> None:
    x, weight = feature_map((1, 513, 1, 1), torch.float32, device, 0), torch.ones(513 * 9, 4, device=device)
    with pytest.raises(ValueError, match=r"sources has \(513,\) channels; accepted: 1 to 512"):
        fused.convolution([x], weight)


def test_a_transposed_convolution_takes_nothing_else(device: str) -> None:
    x, weight = feature_map((1, 4, 2, 2), torch.float32, device, 0), torch.ones(4, 8, device=device)
    out = torch.empty_like(fused.transposed_convolution(x, weight))
    with pytest.raises(ValueError, match="a transposed convolution takes one source and a bias"):
        op.convolution_out(out, x, None, None, None, weight, None, None, None, None, 2, 1, 1, True, False)


def test_a_second_map_of_a_shortcut_needs_a_first(device: str) -> None:
    arguments = list(op_arguments(LAYERS["shortcut of two"], Epilogue(), device))
    arguments[3] = None
    with pytest.raises(ValueError, match=r"shortcut\[1\] is given without shortcut\[0\]"):
        op.convolution_out(*arguments)


@pytest.mark.parametrize("out", [None, cl(1, 8, 4, 4)])
def test_what_is_no_tensor_is_named(out: Tensor | None) -> None:
    with pytest.raises(TypeError, match=r"sources\[0\] must be a tensor, got list"):
        fused.convolution([[1.0]], torch.ones(9, 8), out=out)  # type: ignore[list-item]


def test_without_kernels_it_says_so(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr("fastjepa.kernels.checks.unavailable_reason", lambda device: "no kernels today")
    with pytest.raises(RuntimeError, match="convolution: no kernels today"):
        fused.convolution([cl(1, 16, 2, 2).to(device)], torch.ones(144, 4, device=device))


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((12, 0), 100)])
def test_the_table_is_asked_for_the_newest_architecture_that_it_knows(
    capability: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert op.architecture.__wrapped__(torch.device("cuda", 0)) == expected


def test_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"compute capability 7\.5; convolutions need at least 8\.0"):
        op.architecture.__wrapped__(torch.device("cuda", 0))


# ---- what only hardware shows ----------------------------------------------------------------------------------------


# Early launches are the same code in every precision.
_WAYS = [*itertools.product(DTYPES, (False,)), ("bf16", True)]


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "launch_early"), _WAYS)
@pytest.mark.parametrize("frames", [1, 8, 64])
@pytest.mark.parametrize("name", [*all_recipe_layers(1, "bf16")])
def test_recipe_layers_on_the_gpu(
    name: str, frames: int, precision: Precision, launch_early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, dtype, tf32 = all_recipe_layers(frames, precision)[name], DTYPES[precision], precision == "tf32"
    if launch_early:
        if torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("programmatic dependent launch needs compute capability 9.0")
        monkeypatch.setattr(op, "choose", lambda layer, number: replace(choose(layer, number), launch_early=True))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    if layer.is_transposed:
        x = feature_map((frames, *layer.sources, layer.height, layer.width), dtype, "cuda", 0)
        weight = weights.pack_transposed(drawn((*layer.sources, layer.out, 2, 2), dtype, "cuda", 1, layer.rows))
        tensors = (x, weight, drawn((layer.out,), torch.float32, "cuda", 2))
        found = fused.transposed_convolution(*tensors, tf32=tf32)
        eager, truth = (reference.transposed_convolution(*given) for given in (tensors, wide(tensors)))
    else:
        arguments = operands(layer, Epilogue(residual=layer.residual, head=layer.head), dtype, "cuda")
        found = fused.convolution(**arguments, tf32=tf32)
        eager = reference.convolution(**arguments)
        truth = reference.convolution(**{key: wide(value) for key, value in arguments.items()})
    # TF32 itself is not as exact as 1e-5: eager's own error is what counts then.
    assert_as_exact_as_eager(found, eager, truth, name, precision=dtype, relative_limit=None if tf32 else 1e-5)
