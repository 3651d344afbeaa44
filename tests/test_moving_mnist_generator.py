"""The bouncing-digit generator, checked against properties of the motion and a clip-by-clip reference."""

import math

import cv2
import numpy as np
import pytest

from fastjepa.moving_mnist import generator
from fastjepa.moving_mnist.digits import embedded_digits
from fastjepa.moving_mnist.generator import bounce, generate_clips
from properties import given, settings, st

# A full square: where it is can be read off a frame.
SQUARE = np.full((1, 28, 28), 255, np.uint8)


def corners(clips: np.ndarray, digit_size: int) -> np.ndarray:
    """(N, T, 2): x and y of the only square of each frame; fails unless exactly that square is bright."""
    found = np.empty((*clips.shape[:2], 2), int)
    for n, t in np.ndindex(*clips.shape[:2]):
        rows, columns = np.nonzero(clips[n, t].any(1))[0], np.nonzero(clips[n, t].any(0))[0]
        found[n, t] = columns[0], rows[0]
        box = clips[n, t, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.shape == (digit_size, digit_size)
        assert (box == 255).all()
    return found


sizes = st.tuples(st.integers(1, 30), st.integers(0, 40)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@settings(max_examples=40, deadline=None)
@given(size=sizes, seed=st.integers(0, 2**40), n_frames=st.integers(1, 15))
def test_a_digit_stays_whole_inside_the_canvas_and_keeps_its_speed(
    size: tuple[int, int], seed: int, n_frames: int
) -> None:
    digit_size, canvas = size
    clips = generate_clips(
        SQUARE, 4, n_frames=n_frames, canvas=canvas, digit_size=digit_size, digits_per_clip=1, seed=seed
    )
    assert clips.shape == (4, n_frames, canvas, canvas)
    assert clips.dtype == np.uint8
    xy = corners(clips, digit_size)  # a whole square was found in each frame, so none is cut off

    room = canvas - digit_size
    step = 0.1 * room
    moved = np.linalg.norm(np.diff(xy, axis=1), axis=-1)
    # Cutting to whole pixels moves a coordinate by less than 1, so a difference of two by less than 1 each way.
    slack = math.sqrt(2)
    assert (moved < step + slack).all()
    # A coordinate within a step of a wall may be touching it between pixels or lose part of its step.
    free = ((xy > 0) & (xy + 1 < room)).all(axis=-1)
    assert (moved[free[:, :-1] & free[:, 1:]] > step - slack).all()


@settings(deadline=None)
@given(
    x=st.floats(0, 1),
    y=st.floats(0, 1),
    direction=st.floats(0, 2 * math.pi),
    n_frames=st.integers(1, 60),
)
def test_bounce_moves_first_and_turns_around_at_walls(x: float, y: float, direction: float, n_frames: int) -> None:
    positions = bounce(np.array([x, y]), np.array(direction), n_frames)
    assert positions.shape == (n_frames, 2)
    # One coordinate at a time, in plain Python.
    for axis, v in enumerate((0.1 * math.cos(direction), 0.1 * math.sin(direction))):
        p = (x, y)[axis]
        for t in range(n_frames):
            p += v
            if p <= 0 or p >= 1:
                p, v = min(max(p, 0.0), 1.0), -v
            assert 0 <= positions[t, axis] <= 1
            # numpy's and libm's sine may differ by a rounding, which 60 additions of 0.1 turn into ~1e-15.
            assert positions[t, axis] == pytest.approx(p, abs=1e-13)


def test_bounce_of_one_known_path() -> None:
    positions = bounce(np.array([0.75, 0.5]), np.array(0.0), 5)
    np.testing.assert_allclose(positions[:, 0], [0.85, 0.95, 1.0, 0.9, 0.8], atol=1e-12)
    np.testing.assert_array_equal(positions[:, 1], 0.5)


@pytest.mark.parametrize("digits_per_clip", [1, 2, 3])
def test_clips_equal_those_drawn_digit_by_digit(digits_per_clip: int) -> None:
    digits = embedded_digits()[0][:50]
    clips = generate_clips(digits, 6, n_frames=12, canvas=50, digits_per_clip=digits_per_clip, seed=3)

    uniform = np.random.Generator(np.random.PCG64(3)).random((6, digits_per_clip, 4))
    expected = np.zeros_like(clips)
    for n, d in np.ndindex(6, digits_per_clip):
        x, y, turn, which = uniform[n, d]
        for t, position in enumerate(bounce(np.array([x, y]), np.array(2 * np.pi * turn), 12)):
            left, top = int(22 * position[0]), int(22 * position[1])
            frame = expected[n, t, top : top + 28, left : left + 28]
            np.maximum(frame, digits[int(which * 50)], out=frame)  # overlap by maximum
    np.testing.assert_array_equal(clips, expected)


def test_overlapping_digits_keep_the_brighter_pixel() -> None:
    # Canvas as small as the digit: both digits lie on the same place in every frame.
    digits = np.random.default_rng(0).integers(0, 256, (2, 28, 28), np.uint8)
    clips = generate_clips(digits, 30, n_frames=2, canvas=28, seed=0)
    possible = [digits[0], digits[1], np.maximum(digits[0], digits[1])]
    seen = {next(i for i, image in enumerate(possible) if np.array_equal(clip[0], image)) for clip in clips}
    assert seen == {0, 1, 2}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**40), chunk=st.integers(1, 9))
def test_deterministic_in_the_seed_whatever_the_chunks(seed: int, chunk: int) -> None:
    digits = embedded_digits()[0][:20]
    with pytest.MonkeyPatch.context() as patch:
        clips = generate_clips(digits, 8, n_frames=3, seed=seed)
        patch.setattr(generator, "_CLIPS_PER_CHUNK", chunk)
        np.testing.assert_array_equal(generate_clips(digits, 8, n_frames=3, seed=seed), clips)
        np.testing.assert_array_equal(generate_clips(digits, 5, n_frames=3, seed=seed), clips[:5])
    assert not np.array_equal(generate_clips(digits, 8, n_frames=3, seed=seed + 1), clips)


def test_starts_directions_and_digits_cover_their_range() -> None:
    grey = np.arange(1, 11, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    clips = generate_clips(grey, 2000, n_frames=2, canvas=104, digit_size=4, digits_per_clip=1, seed=0)
    which = np.bincount(clips[:, 0].max(axis=(1, 2)), minlength=11)[1:]
    # 200 expected of each; a binomial count is within 5 standard deviations (67) but for odds of one in a million.
    assert (abs(which - 200) < 67).all()
    xy = corners((clips > 0).astype(np.uint8) * 255, 4)
    assert xy[:, 0].min() == 0
    assert xy[:, 0].max() >= 99
    angle = np.arctan2(*np.moveaxis(xy[:, 1] - xy[:, 0], -1, 0))
    quadrants = np.histogram(angle, 4, (-np.pi, np.pi))[0]
    assert (abs(quadrants - 500) < 5 * math.sqrt(2000 * 3 / 16) + 50).all()  # + 50: clips that start at a wall


def test_other_digit_sizes_average_areas() -> None:
    digits = embedded_digits()[0][:3]
    clips = generate_clips(digits, 1, n_frames=1, canvas=12, digit_size=12, digits_per_clip=1, seed=0)
    resized = [cv2.resize(digit, (12, 12), interpolation=cv2.INTER_AREA) for digit in digits]
    assert any(np.array_equal(clips[0, 0], image) for image in resized)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digits": SQUARE[0]}, "digits: expected uint8 images"),
        ({"digits": SQUARE[:0]}, "digits: expected uint8 images"),
        ({"digits": SQUARE.astype(np.float32)}, "digits: expected uint8 images"),
        ({"n_clips": 0}, "n_clips: expected at least 1, got 0"),
        ({"n_frames": 0}, "n_frames: expected at least 1, got 0"),
        ({"canvas": -64}, "canvas: expected at least 1, got -64"),
        ({"digit_size": 0}, "digit_size: expected at least 1, got 0"),
        ({"digits_per_clip": 0}, "digits_per_clip: expected at least 1, got 0"),
        ({"canvas": 27}, "canvas: 27 pixels are too few for digits of digit_size 28"),
        ({"seed": -1}, "non-negative"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"digits": SQUARE, "n_clips": 1, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        generate_clips(**arguments)
