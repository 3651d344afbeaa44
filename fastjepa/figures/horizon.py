"""An animation of a rollout to any horizon, beside the ground truth for as long as there is one.

Legend: n clips, T true frames, K = context + horizon frames in all, H×W pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastjepa.figures import style

_COLUMNS = ("ground truth", "rollout", "detection")


def draw_horizon_gif(
    video: np.ndarray,
    rollout: np.ndarray,
    detections: np.ndarray,
    path: Path,
    *,
    context: int = 2,
    fps: float = 8,
    max_clips: int = 3,
) -> Path:
    """Truth, rollout and detections of the first clips side by side, one GIF frame for each frame of time.

    Args:
        video: (n, T, H, W) in [0, 1]; frames after T are shown as missing.
        rollout: (n, horizon, H, W), decoded predictions of the frames after the first `context`.
        detections: (n, horizon, rows, columns) in [0, 1], over the rollout.
        path: ends in .gif; written atomically.
        context: how many frames the model was given.
        fps: frames a second, at most 50 (the format's limit).
        max_clips: clips shown, one above the other.

    Raises:
        ValueError: shapes that do not fit, fps or max_clips out of range, or another suffix.
    """
    if not 0 < fps <= 50:
        raise ValueError(f"fps: expected more than 0 and at most 50 (the GIF format's limit), got {fps}")
    if max_clips < 1:
        raise ValueError(f"max_clips: expected at least 1, got {max_clips}")
    if not video.ndim == rollout.ndim == detections.ndim == 4 or min(video.size, rollout.size, detections.size) == 0:
        raise ValueError("video, rollout and detections: expected 4 dimensions each, none of size 0")
    if len({len(video), len(rollout), len(detections)}) > 1 or video.shape[2:] != rollout.shape[2:]:
        raise ValueError(f"rollout: {rollout.shape} does not go with video {video.shape}")
    if rollout.shape[1] != detections.shape[1]:
        raise ValueError(f"detections: {detections.shape} does not go with rollout {rollout.shape}")
    if not 1 <= context <= video.shape[1]:
        raise ValueError(f"context: expected 1 to {video.shape[1]}, got {context}")
    # Fewer levels than a display shows: they fit one palette, and faint noise, which would fill the file, disappears.
    video, rollout, detections = (np.round(array[:max_clips] * 24) / 24 for array in (video, rollout, detections))
    total = context + rollout.shape[1]
    with style.plot_style():
        frames = [_frame(video, rollout, detections, t, context).render() for t in range(total)]
    durations = [round(1000 / fps)] * total
    durations[-1] *= 4  # the end of a rollout is what one wants to look at
    return style.write_gif(frames, path, durations)


def _frame(video: np.ndarray, rollout: np.ndarray, detections: np.ndarray, t: int, context: int) -> style.PixelCanvas:
    n, T, H, W = video.shape
    total = context + rollout.shape[1]
    scale = -(-128 // W)  # whole, and wide enough for the titles
    height, width = H * scale, W * scale
    margin, gap, title_height, time_height = 12, 8, 30, 34
    x = [margin + column * (width + gap) for column in range(len(_COLUMNS))]
    y = [margin + title_height + clip * (height + gap) for clip in range(n)]
    right, bottom = x[-1] + width, y[-1] + height
    canvas = style.PixelCanvas(right + margin, bottom + time_height + margin)
    for left, title in zip(x, _COLUMNS, strict=True):
        canvas.text(left + width / 2, margin + 12, title, 16, ha="center", weight="bold")
    for clip in range(n):
        if t < T:
            canvas.image(x[0], y[clip], style.grey_panel(video[clip, t], scale))
        else:
            canvas.bar(x[0], y[clip], width, height, style.RULE)
            canvas.text(x[0] + width / 2, y[clip] + height / 2, "the clip is over", 14, ha="center", color=style.MUTED)
        if t < context:
            for left in x[1:]:
                canvas.image(left, y[clip], style.grey_panel(video[clip, t], scale))
        else:
            predicted = rollout[clip, t - context]
            canvas.image(x[1], y[clip], style.grey_panel(predicted, scale))
            canvas.image(x[2], y[clip], style.heat_panel(predicted, detections[clip, t - context], scale))
    state = "given" if t < context else "predicted" if t < T else "beyond the clip"
    canvas.text(margin, bottom + 24, f"t = {t}", 16, weight="bold")
    canvas.text(margin + 62, bottom + 24, state, 16, color=style.MUTED)
    # A time line, filled up to now.
    start = margin + 205
    reached = (right - start) * (t + 1) // total
    canvas.bar(start, bottom + 20, right - start, 8, style.RULE)
    canvas.bar(start, bottom + 20, reached, 8, style.MUTED if t < context else style.SERIES_COLOURS[0])
    return canvas
