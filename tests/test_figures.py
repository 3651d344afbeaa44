from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from fastjepa.figures import curves as figure_curves
from fastjepa.figures import data as figure_data
from fastjepa.figures import rollouts as figure_rollouts
from fastjepa.figures import style as figure_style
from fastjepa.figures.__main__ import main
from fastjepa.figures.curves import draw_ap_curves, draw_training_curves
from fastjepa.figures.data import RolloutArrays, read_metrics, read_rollout
from fastjepa.figures.rollouts import draw_rollout_gif, draw_rollout_strip
from fastjepa.figures.runs import draw_run, draw_step_comparison
from fastjepa.files.safe_files import CheckpointError

AP = (0.8, 0.7, 0.5)


def make_arrays(n: int = 2, T: int = 5, H: int = 64, W: int = 64, cells: int = 8, seed: int = 0) -> RolloutArrays:
    """A bright square that moves one cell per frame over faint noise; the rollout is dimmer than the 1-step."""
    rng = np.random.default_rng(seed)
    video = rng.random((n, T, H, W), dtype=np.float32) * 0.1
    digit_maps = np.zeros((n, T, cells, cells), np.uint8)
    for clip in range(n):
        for t in range(T):
            row, column = (t + clip) % cells, (2 * t) % cells
            digit_maps[clip, t, row, column] = 1
            rows, columns = np.arange(H) * cells // H, np.arange(W) * cells // W
            video[clip, t] += 0.8 * ((rows == row)[:, None] & (columns == column))
    return RolloutArrays(
        video=video,
        one_step=video[:, 2:] * 0.8 - 0.05,  # a decoder has no activation: values below 0 do occur
        rollout=video[:, 2:] * 0.5,
        detections=(digit_maps[:, 2:] * 0.9 + rng.random((n, T - 2, cells, cells)) * 0.1).astype(np.float32),
        digit_maps=digit_maps,
    )


def write_run(folder: Path, steps: object = 4, share: float = 0.03, ap: tuple[float, ...] = AP) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"batch_size": 8, "steps": steps}))
    np.savez(folder / "rollout.npz", **vars(make_arrays()))
    losses = "loss,jepa_loss,vc_loss,std_loss,cov_loss,pred_loss,recon_loss,det_loss,val_recon_loss,val_det_loss"
    names = [*(f"ap_{s}" for s in range(len(ap))), "map", *(f"pooled_ap_{s}" for s in range(len(ap))), "pooled_map"]
    rows = [f"epoch,step,seconds,{losses},{','.join(names)},positive_share"]
    for epoch in (1, 2, 3):
        values = [*(epoch / 3 * a for a in ap), 0.5] * 2
        rows.append(f"{epoch},{10 * epoch},{epoch}.5,{','.join(['0.5'] * 10)},{','.join(map(str, values))},{share}")
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    return folder


def find(image: np.ndarray, panel: np.ndarray) -> list[tuple[int, int]]:
    """The (y, x) where `panel` lies in `image`, pixel for pixel."""
    h, w = panel.shape[:2]
    inside = image[: image.shape[0] - h + 1, : image.shape[1] - w + 1]
    starts = np.argwhere((inside == panel[0, 0]).all(-1))
    return [(y, x) for y, x in starts.tolist() if np.array_equal(image[y : y + h, x : x + w], panel)]


def repeated(frame: np.ndarray, factor: int) -> np.ndarray:
    grey = np.round(np.clip(frame, 0, 1) * 255).astype(np.uint8)
    return np.kron(grey[..., None].repeat(3, -1), np.ones((factor, factor, 1), np.uint8))


# ---- the strip


def test_strip_shows_every_frame_pixel_for_pixel_in_its_row_and_column(tmp_path: Path) -> None:
    arrays = make_arrays()
    path = draw_rollout_strip(arrays, tmp_path / "strip.png", clip=1)
    image = np.asarray(Image.open(path))
    truth = [find(image, repeated(arrays.video[1, t], 2)) for t in range(5)]
    one_step = [find(image, repeated(arrays.one_step[1, i], 2)) for i in range(3)]
    rollout = [find(image, repeated(arrays.rollout[1, i], 2)) for i in range(3)]
    assert [len(places) for places in truth] == [4, 4, 1, 1, 1]  # given frames stand in every row
    assert [len(places) for places in one_step + rollout] == [1] * 6
    columns = [places[0][1] for places in truth]
    steps = np.diff(columns).tolist()
    assert 128 <= steps[0] == steps[2] == steps[3] < steps[1]  # what is given stands apart from what is predicted
    assert [places[0][1] for places in one_step] == [places[0][1] for places in rollout] == columns[2:]
    rows = [y for y, _ in truth[0]]
    assert [y for y, _ in truth[1]] == rows
    assert {places[0][0] for places in truth} == {rows[0]}
    assert {places[0][0] for places in one_step} == {rows[1]}
    assert {places[0][0] for places in rollout} == {rows[2]}


def test_strip_marks_the_true_cells_of_predicted_frames_and_colours_their_probability(tmp_path: Path) -> None:
    arrays = make_arrays()
    arrays.detections[:] = 0
    for i in range(3):
        arrays.detections[0, i, 7, i + 4] = 1  # a certain detection, away from the digit
    image = np.asarray(Image.open(draw_rollout_strip(arrays, tmp_path / "strip.png")))
    outline = np.round(np.array(to_rgb(figure_style.TRUE_CELL_COLOUR)) * 255)
    # The ring of a 16-pixel cell, 2 pixels wide, for the three predicted frames; and the legend's 20-pixel swatch.
    assert (image == outline).all(-1).sum() == 3 * (16**2 - 12**2) + (20**2 - 16**2)
    hottest = figure_style._HEAT_COLOURS[255]
    cell = np.broadcast_to(hottest, (16, 16, 3))
    columns = [find(image, repeated(arrays.video[0, t], 2))[0][1] for t in range(2, 5)]
    assert [x for _, x in find(image, cell)] == [x + (i + 4) * 16 for i, x in enumerate(columns)]


@pytest.mark.parametrize("size", [17, 64, 113])
def test_an_outline_encloses_the_heat_of_its_own_cell(size: int) -> None:
    one_cell = np.zeros((8, 8))
    one_cell[3, 5] = 1
    heat = figure_style.heat_panel(np.zeros((size, size)), one_cell, 1)
    outlined = figure_style.outline_cells(heat, one_cell, width=1)
    rows, columns = np.nonzero((heat != heat[0, 0]).any(-1))
    expected = np.zeros((size, size), bool)
    expected[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
    expected[rows.min() + 1 : rows.max(), columns.min() + 1 : columns.max()] = False
    np.testing.assert_array_equal((outlined != heat).any(-1), expected)


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.7, 1.0])
def test_heat_shows_its_probability_where_the_frame_is_dark(probability: float) -> None:
    panel = figure_style.heat_panel(np.zeros((16, 16)), np.full((8, 8), probability), 1)
    assert (panel == figure_style._HEAT_COLOURS[round(probability * 255)]).all()


def test_heat_is_read_from_lightness_alone() -> None:
    luminance = (figure_style._HEAT_COLOURS / 255.0) ** 2.2 @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance[::8]) > 0).all()


@pytest.mark.parametrize("width", [29, 57, 113, 207, 1634])  # some that 1/100 inch would round down
def test_a_canvas_has_the_size_asked_for(width: int) -> None:
    canvas = figure_style.PixelCanvas(width, 58)
    canvas.bar(0, 0, width, 58, "#123456")
    rendered = canvas.render()
    assert rendered.shape == (58, width, 3)
    assert (rendered == (0x12, 0x34, 0x56)).all()


def test_strip_names_rows_columns_and_what_is_given() -> None:
    texts = figure_rollouts._strip(make_arrays(), 0).texts()
    for label in ("Ground truth", "1-step prediction", "Full rollout", "Detection", "given", "predicted"):
        assert texts.count(label) == 1, label
    assert [text for text in texts if text in ("t = 0", "1", "2", "3", "4")] == ["t = 0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("T", "H", "W"), [(3, 64, 64), (10, 64, 64), (4, 28, 28), (3, 17, 113), (12, 33, 40), (3, 32, 111)]
)
def test_text_stays_on_the_canvas_and_off_the_panels_and_other_text(T: int, H: int, W: int) -> None:
    arrays = make_arrays(T=T, H=H, W=W)
    with figure_style.plot_style():
        for canvas in (figure_rollouts._strip(arrays, 0), figure_rollouts._gif_frame(arrays, T - 1, 3)):
            background = canvas.pixels.copy()
            rendered = canvas.render()
            height, width = rendered.shape[:2]
            taken = (background != 255).any(-1)
            for text in canvas.axes.texts:
                if not text.get_text():
                    continue
                box = text.get_window_extent()
                x0, x1 = int(np.floor(box.x0)), int(np.ceil(box.x1))
                y0, y1 = height - int(np.ceil(box.y1)), height - int(np.floor(box.y0))
                assert x0 >= 0, text
                assert y0 >= 0, text
                assert x1 <= width, text
                assert y1 <= height, text
                assert not taken[y0:y1, x0:x1].any(), f"{text} covers something"
                taken[y0:y1, x0:x1] = True
            written = (rendered != background).any(-1)
            assert written.any()
            assert not (written & ~taken).any()  # everything but text is exactly what was put there


def test_strip_rejects_a_clip_that_is_not_there(tmp_path: Path) -> None:
    for clip in (-1, 2):
        with pytest.raises(ValueError, match="clip: expected 0 to 1"):
            draw_rollout_strip(make_arrays(), tmp_path / "strip.png", clip=clip)


# ---- the animation


def test_gif_has_one_frame_per_frame_of_video_and_stays_small(tmp_path: Path) -> None:
    arrays = make_arrays(n=4, T=10)
    path = draw_rollout_gif(arrays, tmp_path / "rollout.gif", fps=5)
    assert path.stat().st_size < 500_000
    with Image.open(path) as gif:
        assert gif.n_frames == 10
        assert gif.info["loop"] == 0
        durations, decoded = [], []
        for t in range(10):
            gif.seek(t)
            durations.append(gif.info["duration"])
            decoded.append(np.asarray(gif.convert("RGB")).astype(int))
    assert durations == [200] * 9 + [800]
    # 4 panels of 128 pixels, 8 apart, in 12 of margin; 3 of the 4 clips below 30 of titles and above 34 of time line.
    assert decoded[0].shape == (12 + 30 + 3 * 136 - 8 + 34 + 12, 12 + 4 * 136 - 8 + 12, 3)
    for t, image in enumerate(decoded):
        for clip in range(3):
            y, x = 42 + 136 * clip, 12
            panel = image[y : y + 128, x : x + 128]
            error = np.abs(panel - repeated(arrays.video[clip, t], 2).astype(int)).max()
            assert error <= 255 / 48 + 8  # half of a grey level, and what the palette merges


def test_gif_keeps_rare_colours(tmp_path: Path) -> None:
    arrays = make_arrays(n=1, T=10)
    # Few cells of every heat over smooth frames, as a trained model gives them; all values are levels the GIF has.
    arrays.detections[:] = 0
    arrays.detections[0, :, 7] = np.arange(64).reshape(8, 8)[:, ::-1] % 25 / 24
    arrays.rollout[:] = np.round(np.hypot(*np.mgrid[-1:1:64j, -1:1:64j]) / 2**0.5 * 24) / 24
    with Image.open(draw_rollout_gif(arrays, tmp_path / "rollout.gif")) as gif:
        gif.seek(4)
        image = np.asarray(gif.convert("RGB")).astype(int)
    x, y = 12 + 3 * 136, 42
    drawn = figure_rollouts._panels(arrays, 0, 4, 2)[3].astype(int)
    assert np.abs(image[y : y + 128, x : x + 128] - drawn).max() <= 8


def test_gif_names_panels_and_says_what_is_given() -> None:
    for t, state in ((0, "given"), (1, "given"), (2, "predicted"), (4, "predicted")):
        texts = figure_rollouts._gif_frame(make_arrays(), t, 3).texts()
        assert texts == ["ground truth", "1-step", "rollout", "detection", f"t = {t}", state]


@pytest.mark.parametrize("fps", [0, -1, 51, float("nan")])
def test_gif_rejects_a_rate_that_the_format_lacks(tmp_path: Path, fps: float) -> None:
    with pytest.raises(ValueError, match="fps: expected more than 0"):
        draw_rollout_gif(make_arrays(), tmp_path / "rollout.gif", fps=fps)
    with pytest.raises(ValueError, match="max_clips"):
        draw_rollout_gif(make_arrays(), tmp_path / "rollout.gif", max_clips=0)


# ---- curves


def test_ap_figure_draws_each_curve_and_chance() -> None:
    figure = figure_curves._ap_figure({"one": AP, "two": (0.6, np.nan, 0.2, 0.1)}, 0.031)
    (axes,) = figure.axes
    one, two, chance = axes.lines
    np.testing.assert_array_equal(one.get_xydata(), list(enumerate(AP)))
    np.testing.assert_array_equal(two.get_ydata(), (0.6, np.nan, 0.2, 0.1))
    assert set(chance.get_ydata()) == {0.031}
    assert one.get_color() != two.get_color()
    assert one.get_marker() != two.get_marker()
    assert axes.get_ylim() == (0, 1)
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["one", "two", "chance: 3.1% of cells are positive"]
    assert list(axes.get_xticks()) == [0, 1, 2, 3]


def test_a_single_ap_curve_shows_its_values_and_no_chance_unless_given() -> None:
    (axes,) = figure_curves._ap_figure({"one": (0.8, np.nan, 0.5)}, None).axes
    assert len(axes.lines) == 1
    assert [text.get_text() for text in axes.texts] == ["0.80", "0.50"]


@pytest.mark.parametrize(
    ("curves", "share", "message"),
    [
        ({}, None, "at least one"),
        ({"a": ()}, None, "'a'"),
        ({"a": (0.5, 1.2)}, None, "'a'"),
        ({"a": (-0.1,)}, None, "'a'"),
        ({"a": (np.inf,)}, None, "'a'"),
        ({"a": AP}, 1.5, "positive_share"),
        ({"a": AP}, np.nan, "positive_share"),
    ],
)
def test_ap_curves_reject_what_is_no_average_precision(
    tmp_path: Path, curves: dict[str, Any], share: float | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draw_ap_curves(curves, tmp_path / "ap.png", share)
    assert not list(tmp_path.iterdir())


def test_training_figure_has_a_panel_per_loss_and_leaves_out_what_is_missing(tmp_path: Path) -> None:
    metrics = read_metrics(write_run(tmp_path / "run") / "metrics.csv")
    with figure_style.plot_style():
        figure = figure_curves._training_figure(metrics)
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(figure_curves._TRAINING_PANELS)
    by_title = dict(zip(figure_curves._TRAINING_PANELS, figure.axes, strict=True))
    assert [line.get_label() for line in by_title["mAP"].lines] == ["mean over batches", "pooled", "chance"]
    np.testing.assert_array_equal(by_title["mAP"].lines[0].get_xydata(), [(1, 0.5), (2, 0.5), (3, 0.5)])
    small = figure_curves._training_figure({"epoch": np.arange(3), "loss": np.ones(3)})
    assert len(small.axes) == 1
    for metrics in ({"epoch": np.arange(3)}, {"loss": np.ones(3)}):
        with pytest.raises(ValueError, match="expected `epoch` and losses"):
            draw_training_curves(metrics, tmp_path / "training.png")
    with pytest.raises(ValueError, match=r"loss has shape \(2,\)"):
        draw_training_curves({"epoch": np.arange(3), "loss": np.ones(2)}, tmp_path / "training.png")


def test_losses_over_decades_get_a_logarithmic_axis_with_plain_numbers() -> None:
    epochs = np.arange(1.0, 5)
    figure = figure_curves._training_figure({"epoch": epochs, "loss": 10.0**-epochs, "std_loss": 0.1 + epochs})
    wide, narrow = figure.axes
    assert wide.get_yscale() == "log"
    assert wide.yaxis.get_major_formatter()(0.001, 0) == "0.001"
    assert narrow.get_yscale() == "linear"
    assert narrow.get_ylim()[0] == 0
    zero = figure_curves._training_figure({"epoch": epochs, "std_loss": np.array([10.0, 1, 0.1, 0])})
    assert zero.axes[0].get_yscale() == "linear"


# ---- reading


def test_metrics_are_read_as_columns_with_nan_for_empty_cells(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,loss,ap_0\n1,0.5,\n2,0.25,0.75\n")
    metrics = read_metrics(path)
    assert list(metrics) == ["epoch", "loss", "ap_0"]
    np.testing.assert_array_equal(metrics["epoch"], [1, 2])
    np.testing.assert_array_equal(metrics["loss"], [0.5, 0.25])
    np.testing.assert_array_equal(metrics["ap_0"], [np.nan, 0.75])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a header"),
        (b"step,loss\n1,2\n", "with `epoch`"),
        (b"epoch,loss,loss\n1,2,3\n", "different names"),
        (b"epoch,loss\n", "no epoch yet"),
        (b"epoch,loss\n1,2\n2\n", "line 3 has 1 of 2"),
        (b"epoch,loss\n1,low\n", "line 2, column loss: 'low' is not a number"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"epoch," + b"x" * 200_000, "not a CSV file"),
    ],
)
def test_unusable_metrics_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_metrics(path)
    assert str(path) in str(raised.value)


def test_rollout_file_is_read_back(tmp_path: Path) -> None:
    arrays = make_arrays()
    np.savez_compressed(tmp_path / "rollout.npz", extra=np.zeros(3), **vars(arrays))
    loaded = read_rollout(tmp_path / "rollout.npz")
    for name, array in vars(arrays).items():
        np.testing.assert_array_equal(getattr(loaded, name), array)


def _without(name: str) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **{k: v for k, v in vars(make_arrays()).items() if k != name})


def _with(**changed: np.ndarray) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **{**vars(make_arrays()), **changed})


def _truncated(path: Path) -> None:
    np.savez(path, **vars(make_arrays()))
    path.write_bytes(path.read_bytes()[:-1000])


def _flipped(path: Path) -> None:
    np.savez(path, **vars(make_arrays()))
    content = bytearray(path.read_bytes())
    content[20_000] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_without("rollout"), "lacks rollout; it holds video"),
        (_with(video=np.zeros((2, 5, 64, 64), np.uint8)), "video: expected an array of floating-point"),
        (_with(video=np.zeros((2, 5, 1, 64, 64), np.float32)), "video: expected 4 dimensions"),
        (_with(video=np.zeros((0, 5, 64, 64), np.float32)), "video: expected 4 dimensions, none of size 0"),
        (_with(video=np.zeros((2, 2, 64, 64), np.float32)), "video: expected at least 3 frames"),
        (_with(video=np.full((2, 5, 64, 64), 255.0)), r"video: expected values in \[0, 1\], got 255 to 255"),
        (_with(one_step=np.full((2, 3, 64, 64), np.nan)), "one_step: holds values that are not finite"),
        (_with(rollout=np.zeros((2, 5, 64, 64))), r"rollout: expected shape \(2, 3, 64, 64\)"),
        (_with(detections=np.zeros((2, 3, 4, 8))), r"detections: expected shape \(2, 3, 8, 8\)"),
        (_with(detections=np.full((2, 3, 8, 8), -2.0)), r"detections: expected values in \[0, 1\]"),
        (_with(digit_maps=np.zeros((2, 3, 8, 8))), r"digit_maps: expected shape \(2, 5, 8, 8\)"),
        (_with(video=np.array([{"pickled": "object"}])), "Object arrays cannot be loaded"),
        (lambda path: path.write_bytes(pickle.dumps([1])), "not a zip file"),
        (lambda path: path.write_bytes(b""), "not a zip file"),
        (_truncated, "not a zip file"),
        (_flipped, "CRC"),
    ],
)
def test_unusable_rollout_files_are_named(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "rollout.npz"
    write(path)
    with pytest.raises(ValueError, match=message) as raised:
        read_rollout(path)
    assert str(path) in str(raised.value)


def test_a_rollout_file_that_unpacks_to_too_much_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "rollout.npz", **vars(make_arrays()))
    monkeypatch.setattr(figure_data, "_MAX_ROLLOUT_BYTES", 100_000)
    monkeypatch.setattr(np, "load", lambda *args, **kwargs: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match="unpacks to"):
        read_rollout(tmp_path / "rollout.npz")


def test_arrays_must_be_arrays() -> None:
    arrays = make_arrays()
    with pytest.raises(ValueError, match="detections: expected an array"):
        replace(arrays, detections=arrays.detections.tolist())


# ---- writing


def test_pictures_have_the_same_bytes_whatever_matplotlib_is_set_to(tmp_path: Path) -> None:
    draws: dict[str, Callable[[Path], Path]] = {
        "strip.png": lambda path: draw_rollout_strip(make_arrays(T=3), path),
        "rollout.gif": lambda path: draw_rollout_gif(make_arrays(T=3), path),
        "ap.png": lambda path: draw_ap_curves({"one": AP}, path, 0.03),
        "training.png": lambda path: draw_training_curves({"epoch": np.arange(3.0), "loss": np.ones(3)}, path),
    }
    for name, draw in draws.items():
        first = draw(tmp_path / "a" / name).read_bytes()
        with matplotlib.rc_context({"font.size": 30, "font.family": "serif", "axes.facecolor": "red"}):
            before = dict(matplotlib.rcParams)
            assert draw(tmp_path / "b" / name).read_bytes() == first, name
            assert dict(matplotlib.rcParams) == before, name


def test_a_failed_write_leaves_the_picture_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "ap.png"
    target.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", _disk_full)
    with pytest.raises(CheckpointError, match="No space left"):
        draw_ap_curves({"one": AP}, target)
    assert [path.name for path in tmp_path.iterdir()] == ["ap.png"]
    assert target.read_bytes() == b"before"


def test_the_suffix_must_say_what_is_written(tmp_path: Path) -> None:
    for name in ("strip.gif", "strip", "strip.jpg"):
        with pytest.raises(ValueError, match=r"must end in \.png"):
            draw_rollout_strip(make_arrays(T=3), tmp_path / name)
    with pytest.raises(ValueError, match=r"must end in \.gif"):
        draw_rollout_gif(make_arrays(T=3), tmp_path / "rollout.png")


# ---- runs and the command line


def test_draw_run_writes_four_pictures_that_decode(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    paths = draw_run(run)
    assert [path.relative_to(run).as_posix() for path in paths] == [
        f"figures/{name}" for name in ("rollout.png", "rollout.gif", "ap.png", "training.png")
    ]
    for path in paths:
        with Image.open(path) as image:
            image.load()
            assert image.format == path.suffix[1:].upper()
            assert min(image.size) >= 150
            assert "Software" not in image.info  # a library version would change the bytes
            assert getattr(image, "n_frames", 1) == (5 if path.suffix == ".gif" else 1)
    assert {path.name for path in (run / "figures").iterdir()} == {path.name for path in paths}


@pytest.fixture
def drawn_curves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, list[float]], float | None]]:
    """What draw_ap_curves is asked to draw; it is still drawn."""
    calls = []

    def recorded(curves: dict[str, np.ndarray], path: Path, positive_share: float | None = None) -> Path:
        calls.append(({label: list(ap) for label, ap in curves.items()}, positive_share))
        return draw_ap_curves(curves, path, positive_share)

    monkeypatch.setattr("fastjepa.figures.runs.draw_ap_curves", recorded)
    return calls


def test_draw_run_shows_the_last_evaluation(tmp_path: Path, drawn_curves: list[Any]) -> None:
    run = write_run(tmp_path / "run")
    text = (run / "metrics.csv").read_text()
    # A later epoch without an evaluation: empty cells after the training losses.
    (run / "metrics.csv").write_text(text + "4,40,4.5," + ",".join(["0.5"] * 10) + "," * 9 + "\n")
    draw_run(run)
    labels = ["mean over validation batches, mAP 0.667", "pooled over the validation set, mAP 0.667"]
    assert drawn_curves == [({label: list(AP) for label in labels}, 0.03)]


def test_step_comparison_orders_and_labels_runs_by_steps(tmp_path: Path, drawn_curves: list[Any]) -> None:
    runs = [write_run(tmp_path / f"{i}" / "run", steps, ap=(0.1 * i, 0.2)) for i, steps in enumerate((8, 1, 2, 1))]
    path = draw_step_comparison(runs, tmp_path / "steps.png")
    with Image.open(path) as image:
        image.load()
    ((curves, share),) = drawn_curves
    # Two runs have the same steps, so their folders tell them apart, with all of the path: the names are equal.
    assert list(curves) == [
        f"steps 1 ({runs[1]}), mAP 0.150",
        f"steps 1 ({runs[3]}), mAP 0.250",
        "steps 2, mAP 0.200",
        "steps 8, mAP 0.100",
    ]
    assert [ap[0] for ap in curves.values()] == pytest.approx([0.1, 0.3, 0.2, 0.0])
    assert share == 0.03


def test_step_comparison_rejects_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    target = tmp_path / "steps.png"
    good = write_run(tmp_path / "good")
    with pytest.raises(ValueError, match="run_folders: expected at least one"):
        draw_step_comparison([], target)
    with pytest.raises(ValueError, match="named twice"):
        draw_step_comparison([good, good], target)
    for i, steps in enumerate((None, "4", 0, 1.5, True)):
        with pytest.raises(ValueError, match="`steps` to be a whole number"):
            draw_step_comparison([good, write_run(tmp_path / f"bad{i}", steps)], target)
    with pytest.raises(ValueError, match="validated on different data"):
        draw_step_comparison([good, write_run(tmp_path / "other", 2, share=0.05)], target)
    unevaluated = write_run(tmp_path / "early")
    (unevaluated / "metrics.csv").write_text("epoch,loss,ap_0\n1,0.5,\n")
    with pytest.raises(ValueError, match="holds no average precision"):
        draw_step_comparison([unevaluated], target)
    assert not target.exists()


@pytest.mark.parametrize("content", ["{", "[1]", "\0", "[" * 100_000])
def test_a_damaged_config_is_named(tmp_path: Path, content: str) -> None:
    run = write_run(tmp_path / "run")
    (run / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        draw_run(run)


def test_the_command_prints_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / "a", 1), write_run(tmp_path / "b", 2)]
    comparison = tmp_path / "pictures" / "steps.png"
    assert main([str(runs[0]), str(runs[1]), "--compare", str(comparison)]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert printed[-1] == comparison
    assert len(printed) == 9
    assert all(path.is_file() for path in printed)


def test_the_command_says_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    incomplete = write_run(tmp_path / "incomplete")
    (incomplete / "rollout.npz").unlink()
    for arguments, message in (
        ([str(tmp_path / "none")], "none is not a run folder: there is no such folder"),
        ([str(tmp_path / "empty")], "lacks config.json, metrics.csv, rollout.npz"),
        ([str(incomplete)], "lacks rollout.npz (a run writes"),
        ([], "name at least one run folder"),
    ):
        with pytest.raises(SystemExit, match=r"^2$"):
            main(arguments)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert message in captured.err


def test_the_command_says_when_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    (run / "figures").write_text("a file where the folder should be")
    with pytest.raises(SystemExit, match=r"^2$"):
        main([str(run)])
    assert str(run / "figures") in capsys.readouterr().err
    (run / "figures").unlink()
    monkeypatch.setattr(os, "fsync", _disk_full)
    with pytest.raises(SystemExit, match=r"^2$"):
        main([str(run)])
    assert "No space left" in capsys.readouterr().err


def _disk_full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")
