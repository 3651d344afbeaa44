"""Moving MNIST: digits that move in straight lines and bounce off the walls (Srivastava et al. 2015, arXiv:1502.04681).

A digit's position is a point of the unit square, the place of its box among all places where the box fits in the
canvas: pixel = int((canvas − digit_size) · position). Legend: N clips, T frames, S canvas size, K digit size.
"""

from collections.abc import Sequence

import numpy as np

from fastjepa.optional_packages import needed_for

GENERATOR_VERSION = 1  # part of the cache key: raise it when the same arguments would give other pixels

STEP_LENGTH = 0.1  # distance per frame, in units of the square's side

# Clips drawn at once. It bounds the temporary digit patches (2 MB at the default sizes) and changes no pixel.
_CLIPS_PER_CHUNK = 256


def bounce(start: np.ndarray, direction: np.ndarray, n_frames: int) -> np.ndarray:
    """Positions in the unit square of points that move STEP_LENGTH per frame and bounce off the walls.

    Every frame moves first, so frame 0 is one step away from `start`. A coordinate that reaches a wall stops there
    and its velocity turns around; the rest of that step is lost.

    Args:
        start: (..., 2) float, in [0, 1].
        direction: (...) float, angle in radians.
        n_frames: frames to compute, at least 1.

    Returns:
        (..., n_frames, 2) float64, in [0, 1].
    """
    position = np.array(start, np.float64)
    velocity = STEP_LENGTH * np.stack([np.cos(direction), np.sin(direction)], axis=-1)
    frames = np.empty((*position.shape[:-1], n_frames, 2))
    for t in range(n_frames):
        position += velocity
        velocity[(position <= 0) | (position >= 1)] *= -1
        np.clip(position, 0, 1, out=position)
        frames[..., t, :] = position
    return frames


def generate_clips(
    digits: np.ndarray,
    n_clips: int,
    *,
    n_frames: int = 10,
    canvas: int = 64,
    digit_size: int = 28,
    digits_per_clip: int = 2,
    seed: int | Sequence[int],
) -> np.ndarray:
    """Clips of digits drawn at random from `digits`, that start anywhere, move in any direction and bounce.

    Deterministic in its arguments; the first clips of a longer set are the shorter set.

    Args:
        digits: uint8 (n, h, w) images; resized to `digit_size` by area averaging where h or w differ from it.
        n_clips: N, at least 1.
        n_frames: T, at least 1.
        canvas: S, side of a frame in pixels, at least `digit_size`.
        digit_size: K, side of a digit's box in pixels.
        digits_per_clip: digits in each clip; where they overlap the brighter pixel is kept.
        seed: one or more non-negative integers.

    Returns:
        uint8 (N, T, S, S).

    Raises:
        ValueError: an argument is out of the range given above, or `digits` is not a stack of uint8 images.
        MissingPackageError: digits must be resized, and OpenCV is not installed.
    """
    _check_arguments(digits, n_clips, n_frames, canvas, digit_size, digits_per_clip)
    digits = _resize(digits, digit_size)

    # Four uniform numbers per digit, clip by clip: (x, y), direction, which digit.
    rng = np.random.Generator(np.random.PCG64(seed))
    uniform = rng.random((n_clips, digits_per_clip, 4))
    positions = bounce(uniform[..., :2], 2 * np.pi * uniform[..., 2], n_frames)  # (N, digits_per_clip, T, 2)
    corners = ((canvas - digit_size) * positions).astype(np.int64)
    chosen = (len(digits) * uniform[..., 3]).astype(np.int64)  # (N, digits_per_clip)

    clips = np.zeros((n_clips, n_frames, canvas, canvas), np.uint8)
    for first in range(0, n_clips, _CLIPS_PER_CHUNK):
        chunk = slice(first, first + _CLIPS_PER_CHUNK)
        _draw(clips[chunk], digits, chosen[chunk], corners[chunk])
    return clips


def _draw(clips: np.ndarray, digits: np.ndarray, chosen: np.ndarray, corners: np.ndarray) -> None:
    """Draws digits into `clips` (n, T, S, S), overlapping by maximum; `corners` (n, digits, T, 2) is (x, y)."""
    n, n_frames = clips.shape[:2]
    # (n, T, S−K+1, S−K+1, K, K) view of all places where a digit fits: a digit in a frame is one entry of it.
    places = np.lib.stride_tricks.sliding_window_view(clips, digits.shape[1:], axis=(2, 3), writeable=True)
    clip = np.arange(n)[:, None]
    frame = np.arange(n_frames)[None, :]
    for d in range(chosen.shape[1]):  # one digit of each clip at a time, so that no place is written twice
        x, y = corners[:, d, :, 0], corners[:, d, :, 1]
        patches = digits[chosen[:, d], None]  # (n, 1, K, K), the same in all frames
        places[clip, frame, y, x] = np.maximum(places[clip, frame, y, x], patches)


def _resize(digits: np.ndarray, digit_size: int) -> np.ndarray:
    """Digits as uint8 (n, digit_size, digit_size)."""
    if digits.shape[1:] == (digit_size, digit_size):
        return digits
    with needed_for("resizing digits"):
        import cv2
    resized = [cv2.resize(digit, (digit_size, digit_size), interpolation=cv2.INTER_AREA) for digit in digits]
    return np.stack(resized).astype(np.uint8, copy=False)


def _check_arguments(
    digits: np.ndarray, n_clips: int, n_frames: int, canvas: int, digit_size: int, digits_per_clip: int
) -> None:
    if digits.ndim != 3 or digits.dtype != np.uint8 or digits.size == 0:
        raise ValueError(f"digits: expected uint8 images (n, h, w), n ≥ 1, got {digits.dtype} {digits.shape}")
    check_sizes(canvas, digit_size, n_clips=n_clips, n_frames=n_frames, digits_per_clip=digits_per_clip)


def check_sizes(canvas: int, digit_size: int, **counts: int) -> None:
    """Raise ValueError where a size in pixels or one of `counts` is below 1, or the canvas is smaller than a digit."""
    for name, value in {**counts, "canvas": canvas, "digit_size": digit_size}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if canvas < digit_size:
        raise ValueError(f"canvas: {canvas} pixels are too few for digits of digit_size {digit_size}")
