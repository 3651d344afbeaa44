"""Pictures of predicted clips: a strip (PNG) and an animation (GIF).

Legend: n clips, T frames, H×W pixels. Frames 0 and 1 are given to the model, frames 2 to T−1 are predicted.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fastjepa.figures import style
from fastjepa.figures.data import RolloutArrays
from fastjepa.model.context import CONTEXT


def draw_rollout_strip(rollout_arrays: RolloutArrays, path: Path, clip: int = 0) -> Path:
    """One clip as a PNG table: truth, 1-step predictions, rollout and heat-map (rows) against time (columns)."""
    with style.plot_style():
        return style.write_png(_strip(rollout_arrays, clip).render(), path)


def _panel_scale(frame_width: int) -> int:
    """Whole factor that makes a panel wide enough for its title."""
    return -(-112 // frame_width)


def _strip(arrays: RolloutArrays, clip: int) -> style.PixelCanvas:
    if not 0 <= clip < len(arrays.video):
        raise ValueError(f"clip: expected 0 to {len(arrays.video) - 1}, got {clip}")
    T, H, W = arrays.video.shape[1:]
    scale = _panel_scale(W)
    height, width = H * scale, W * scale
    margin, label_width, gap, context_gap = 16, 252, 6, 16
    time_height, bracket_height, legend_height = 34, 42, 52
    row_height = max(height, 60)  # the row labels are two lines high

    x = [margin + label_width + t * (width + gap) + (t >= CONTEXT) * context_gap for t in range(T)]
    y_truth = margin + time_height
    y_predicted = y_truth + row_height + bracket_height
    y = [y_truth] + [y_predicted + row * (row_height + gap) for row in range(3)]
    right, bottom = x[-1] + width, y[-1] + height
    canvas = style.PixelCanvas(max(right, x[0] + 800) + margin, bottom + legend_height + margin)

    for t in range(T):
        canvas.text(x[t] + width / 2, margin + 14, f"t = {t}" if t == 0 else str(t), 20, ha="center", color=style.MUTED)
        panels = _panels(arrays, clip, t, scale)
        for row in range(4):
            canvas.image(x[t], y[row], panels[row])

    rows = [
        ("Ground truth", ""),
        ("1-step prediction", "from true frames t−2, t−1"),
        ("Full rollout", "from frames 0 and 1 only"),
        ("Detection", "probability over the rollout"),
    ]
    for top, (title, subtitle) in zip(y, rows, strict=True):
        middle = top + height / 2
        canvas.text(margin, middle - 13 if subtitle else middle, title, 22, weight="bold")
        canvas.text(margin, middle + 15, subtitle, 15.5, color=style.MUTED)

    # Brackets between the true and the predicted rows say which columns of the latter are predictions.
    y_bracket = y_predicted - 8
    for first, last, text in ((0, CONTEXT - 1, "given"), (CONTEXT, T - 1, "predicted")):
        canvas.bar(x[first], y_bracket, x[last] + width - x[first], 2, style.MUTED)
        canvas.text((x[first] + x[last] + width) / 2, y_bracket - 14, text, 18, ha="center", color=style.MUTED)

    _heat_legend(canvas, x[0], bottom + 34)
    return canvas


def _heat_legend(canvas: style.PixelCanvas, x: int, y: int) -> None:
    """Explains the heat-map's colours and the outlined cells, on one line centred on y."""
    canvas.text(x, y, "0", 17, color=style.MUTED)
    canvas.image(x + 18, y - 8, style.colour_bar(16, 200))
    canvas.text(x + 226, y, "1   probability of a digit in the cell", 17, color=style.MUTED)
    swatch = np.zeros((20, 20, 3), np.uint8)
    canvas.image(x + 580, y - 10, style.outline_cells(swatch, np.ones((1, 1))))
    canvas.text(x + 610, y, "true cell of a digit", 17, color=style.MUTED)


def _panels(arrays: RolloutArrays, clip: int, t: int, scale: int) -> list[np.ndarray]:
    """Truth, 1-step prediction, rollout and heat-map of frame t; given frames stand where nothing is predicted."""
    truth = style.grey_panel(arrays.video[clip, t], scale)
    if t < CONTEXT:
        return [truth] * 4
    rollout = arrays.rollout[clip, t - CONTEXT]
    heat = style.heat_panel(rollout, arrays.detections[clip, t - CONTEXT], scale)
    return [
        truth,
        style.grey_panel(arrays.one_step[clip, t - CONTEXT], scale),
        style.grey_panel(rollout, scale),
        style.outline_cells(heat, arrays.digit_maps[clip, t]),
    ]


def draw_rollout_gif(rollout_arrays: RolloutArrays, path: Path, fps: float = 4, max_clips: int = 3) -> Path:
    """The first clips as an animated GIF: truth, 1-step predictions, rollout and heat-map side by side."""
    if not 0 < fps <= 50:
        raise ValueError(f"fps: expected more than 0 and at most 50 (the GIF format's limit), got {fps}")
    if max_clips < 1:
        raise ValueError(f"max_clips: expected at least 1, got {max_clips}")
    T = rollout_arrays.video.shape[1]
    # Fewer levels than a display shows: they fit one palette, and faint noise, which would fill the file, disappears.
    names = ("video", "one_step", "rollout", "detections")
    coarse = replace(rollout_arrays, **{name: np.round(getattr(rollout_arrays, name) * 24) / 24 for name in names})
    with style.plot_style():
        frames = [_gif_frame(coarse, t, max_clips).render() for t in range(T)]
    durations = [round(1000 / fps)] * T
    durations[-1] *= 4  # the end of a rollout is what one wants to look at
    return style.write_gif(frames, path, durations)


def _gif_frame(arrays: RolloutArrays, t: int, max_clips: int) -> style.PixelCanvas:
    T, H, W = arrays.video.shape[1:]
    n = min(len(arrays.video), max_clips)
    scale = _panel_scale(W)
    height, width = H * scale, W * scale
    margin, gap, title_height, time_height = 12, 8, 30, 34
    x = [margin + column * (width + gap) for column in range(4)]
    y = [margin + title_height + clip * (height + gap) for clip in range(n)]
    right, bottom = x[-1] + width, y[-1] + height
    canvas = style.PixelCanvas(right + margin, bottom + time_height + margin)

    for left, title in zip(x, ("ground truth", "1-step", "rollout", "detection"), strict=True):
        canvas.text(left + width / 2, margin + 12, title, 16, ha="center", weight="bold")
    for clip in range(n):
        for left, panel in zip(x, _panels(arrays, clip, t, scale), strict=True):
            canvas.image(left, y[clip], panel)

    # A time line: one tick per frame, filled up to now.
    state = "given" if t < CONTEXT else "predicted"
    canvas.text(margin, bottom + 24, f"t = {t}", 16, weight="bold")
    canvas.text(margin + 62, bottom + 24, state, 16, color=style.MUTED)
    tick = (right - x[1] - 40) // T
    for frame in range(T):
        colour = style.RULE if frame > t else style.MUTED if frame < CONTEXT else style.SERIES_COLOURS[0]
        canvas.bar(right - (T - frame) * tick, bottom + 20, max(1, tick - 3), 8, colour)
    return canvas
