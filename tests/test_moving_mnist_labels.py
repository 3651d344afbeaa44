"""Digit maps against a frame-by-frame OpenCV reference, and hand-made frames with known answers."""

import cv2
import numpy as np
import pytest

from fastjepa.moving_mnist import labels
from fastjepa.moving_mnist.digits import embedded_digits
from fastjepa.moving_mnist.generator import generate_clips
from fastjepa.moving_mnist.labels import digit_maps


def reference_map(frame: np.ndarray, cells: int) -> np.ndarray:
    """The definition, in float64 and without any sharing of work."""
    frame = frame.astype(np.float64)
    mask = np.where(frame > (frame.min() + frame.max()) / 2, 255, 0).astype(np.uint8)
    # CHAIN_APPROX_NONE keeps every border pixel, so the extremes below are the box.
    contours = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    expected = np.zeros((cells, cells), np.uint8)
    for contour in contours:
        xs, ys = contour[:, 0, 0], contour[:, 0, 1]
        x = (xs.min() + xs.max() + 1) / 2
        y = (ys.min() + ys.max() + 1) / 2
        expected[int(y / frame.shape[0] * cells), int(x / frame.shape[1] * cells)] = 1
    return expected


def assert_equals_reference(frames: np.ndarray, cells: int = 8) -> np.ndarray:
    maps = digit_maps(frames, cells)
    assert maps.dtype == np.uint8
    assert maps.shape == (*frames.shape[:-2], cells, cells)
    for index in np.ndindex(*frames.shape[:-2]):
        np.testing.assert_array_equal(maps[index], reference_map(frames[index], cells))
    return maps


@pytest.mark.parametrize(("canvas", "digit_size"), [(64, 28), (32, 14), (50, 20), (37, 11)])
def test_generated_clips(canvas: int, digit_size: int) -> None:
    clips = generate_clips(embedded_digits()[0], 40, canvas=canvas, digit_size=digit_size, seed=1)
    maps = assert_equals_reference(clips)
    digits_found = maps.sum(axis=(2, 3))
    assert digits_found.max() >= 2
    assert digits_found.min() >= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(200, 64, 64), (4, 5, 33, 47), (12, 7)])
def test_noisy_frames(dtype: type, shape: tuple[int, ...]) -> None:
    # Smoothed noise: contours with holes, specks inside holes, shapes at the border.
    rng = np.random.default_rng(0)
    noise = np.stack(
        [cv2.GaussianBlur(f, (5, 5), 0) for f in rng.normal(size=(np.prod(shape[:-2], dtype=int), *shape[-2:]))]
    )
    noise = (noise - noise.min()) / np.ptp(noise)
    frames = (255 * noise if dtype == np.uint8 else 3 * noise - 1).astype(dtype).reshape(shape)
    assert_equals_reference(frames)
    assert_equals_reference(frames, cells=5)


def test_uint8_threshold_is_exact_when_the_sum_needs_nine_bits() -> None:
    # (100 + 201)/2 = 150.5 separates 150 from 151; a sum of two bytes that wraps would separate 22 from 23.
    frame = np.full((64, 64), 100, np.uint8)
    frame[0, 0] = 201
    frame[20, 20], frame[40, 40] = 150, 151
    maps = assert_equals_reference(frame)
    assert np.argwhere(maps).tolist() == [[0, 0], [5, 5]]


def test_digits_that_touch_make_one_box() -> None:
    frame = np.zeros((64, 64), np.uint8)
    frame[4:12, 4:12] = 255
    frame[12:20, 12:20] = 255  # touches at a corner: 8-connected
    assert np.argwhere(digit_maps(frame)).tolist() == [[1, 1]]  # box [4, 20), centre 12
    frame[11:13, 11:13] = 0
    assert np.argwhere(digit_maps(frame)).tolist() == [[1, 1], [2, 2]]  # centres 8 and 16


def test_holes_and_what_is_inside_them_do_not_count() -> None:
    frame = np.zeros((64, 64), np.uint8)
    frame[8:40, 8:40] = 255
    frame[10:38, 10:38] = 0
    frame[12:14, 12:14] = 255
    assert np.argwhere(digit_maps(frame)).tolist() == [[3, 3]]


def test_a_row_is_a_y_and_single_pixels_at_the_border_stay_in_the_outer_cells() -> None:
    frame = np.zeros((48, 80), np.uint8)
    frame[0, 79] = frame[47, 0] = frame[47, 79] = 255
    assert np.argwhere(digit_maps(frame)).tolist() == [[0, 7], [7, 0], [7, 7]]
    assert np.argwhere(digit_maps(frame, cells=100)).tolist() == [[1, 99], [98, 0], [98, 99]]


@pytest.mark.parametrize("value", [0, 7, 255, 0.25])
def test_a_constant_frame_has_no_digit(value: float) -> None:
    assert not digit_maps(np.full((3, 64, 64), value, np.float32 if value == 0.25 else np.uint8)).any()


def test_frames_do_not_influence_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = generate_clips(embedded_digits()[0], 3, n_frames=3, seed=1) // 2
    clips[1] *= 2
    maps = digit_maps(clips)
    monkeypatch.setattr(labels, "_FRAMES_PER_CHUNK", 2)
    np.testing.assert_array_equal(digit_maps(clips), maps)
    assert_equals_reference(clips)


def test_no_frames_give_no_maps() -> None:
    assert digit_maps(np.zeros((0, 10, 64, 64), np.uint8)).shape == (0, 10, 8, 8)


@pytest.mark.parametrize(
    ("frames", "cells", "message"),
    [
        (np.zeros(64, np.uint8), 8, r"frames: expected shape \(..., H, W\)"),
        (np.zeros((2, 0, 64), np.uint8), 8, r"frames: expected shape \(..., H, W\)"),
        (np.zeros((64, 64), np.int32), 8, "frames: expected uint8 or float, got int32"),
        (np.zeros((64, 64), object), 8, "frames: expected uint8 or float, got object"),
        (np.full((64, 64), np.nan), 8, "frames: a value is NaN or infinite"),
        (np.array([[0.0, np.inf]]), 8, "frames: a value is NaN or infinite"),
        (np.zeros((64, 64), np.uint8), 0, "cells: expected at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(frames: np.ndarray, cells: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digit_maps(frames, cells)
