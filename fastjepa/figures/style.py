"""How the pictures look: colours, type, image panels, and a canvas that places them on exact pixels.

Nothing here touches pyplot or changes matplotlib's global state for longer than a `with` block.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from fastjepa.files.safe_files import write_atomic
from fastjepa.optional_packages import needed_for

with needed_for("drawing"):
    import matplotlib.style
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from PIL import Image

INK = "#1b1f24"
MUTED = "#5b6470"
RULE = "#c4cad2"
# Okabe and Ito (2008): told apart with every common colour-vision deficiency. Markers differ too, for grey prints.
SERIES_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SERIES_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
TRUE_CELL_COLOUR = "#56B4E9"

# magma grows in lightness from black, so it is read correctly without colour vision; its pale end is cut off because
# it would pass for a white digit.
_HEAT_COLOURS = (colormaps["magma"](np.linspace(0.0, 0.82, 256))[:, :3] * 255).round().astype(np.uint8)

PLOT_STYLE: list[str | dict[str, object]] = [
    "default",  # not whatever the user's matplotlibrc says
    {
        "font.family": "DejaVu Sans",  # ships with matplotlib: the same picture on every machine
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": RULE,
        "axes.labelcolor": MUTED,
        "axes.titlecolor": INK,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e8ebef",
        "grid.linewidth": 0.8,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": MUTED,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "legend.frameon": False,
        "savefig.dpi": 200,
    },
]


def series_style(index: int) -> dict[str, Any]:
    """Colour and marker of the `index`-th curve of a plot; the pair repeats only after 42 curves."""
    return {
        "color": SERIES_COLOURS[index % len(SERIES_COLOURS)],
        "marker": SERIES_MARKERS[index % len(SERIES_MARKERS)],
    }


def plot_style() -> AbstractContextManager[None]:
    """Context manager under which plots are built and saved."""
    return matplotlib.style.context(PLOT_STYLE)


# ---- image panels: uint8 RGB arrays -------------------------------------------------------------------------------


def enlarge(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest-neighbour resize of (h, w, ...) to (height, width, ...): exact repetition when the factors are whole."""
    rows = np.arange(height) * image.shape[0] // height
    columns = np.arange(width) * image.shape[1] // width
    return image[rows[:, None], columns]


def grey_panel(frame: np.ndarray, scale: int) -> np.ndarray:
    """(H, W) with values in [0, 1], clipped to it, → uint8 (H·scale, W·scale, 3)."""
    height, width = frame.shape
    grey = (np.clip(frame, 0.0, 1.0) * 255).round().astype(np.uint8)
    return np.repeat(enlarge(grey, height * scale, width * scale)[..., None], 3, axis=-1)


def heat_panel(frame: np.ndarray, probabilities: np.ndarray, scale: int) -> np.ndarray:
    """The dimmed frame and a heat-map of `probabilities` (rows, columns) → uint8 (H·scale, W·scale, 3)."""
    height, width = frame.shape[0] * scale, frame.shape[1] * scale
    heat = _HEAT_COLOURS[(np.clip(probabilities, 0.0, 1.0) * 255).round().astype(np.uint8)]
    # The lighter of the two in each channel: the frame shows where nothing is detected and never washes out the heat.
    return np.maximum(enlarge(heat, height, width), grey_panel(frame * 0.6, scale))


def outline_cells(panel: np.ndarray, cells: np.ndarray, width: int = 2) -> np.ndarray:
    """A copy of `panel` with an outline inside every cell of `cells` (rows, columns) that is not zero."""
    panel = panel.copy()
    colour = np.round(np.array(to_rgb(TRUE_CELL_COLOUR)) * 255).astype(np.uint8)
    for row, column in np.argwhere(cells):
        # ceil, because enlarge() starts cell i at the first pixel p with p·cells // size = i
        top, bottom = (-(-edge * panel.shape[0] // cells.shape[0]) for edge in (row, row + 1))
        left, right = (-(-edge * panel.shape[1] // cells.shape[1]) for edge in (column, column + 1))
        cell = panel[top:bottom, left:right]
        cell[:width] = cell[-width:] = cell[:, :width] = cell[:, -width:] = colour
    return panel


def colour_bar(height: int, width: int) -> np.ndarray:
    """The heat-map's colours from probability 0 (left) to 1 (right), uint8 (height, width, 3)."""
    return enlarge(_HEAT_COLOURS[None], height, width)


# ---- canvas -------------------------------------------------------------------------------------------------------


class PixelCanvas:
    """A white picture measured in pixels from the top left: images land on whole pixels, text is drawn over them."""

    _DPI = 72  # a point is a pixel; and pixels / 72 · 72 is never rounded to one pixel less, as it is with 100

    def __init__(self, width: int, height: int) -> None:
        self.pixels = np.full((height, width, 3), 255, np.uint8)
        self.figure = Figure(figsize=(width / self._DPI, height / self._DPI), dpi=self._DPI)
        self.axes: Axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()

    def image(self, x: int, y: int, rgb: np.ndarray) -> None:
        """Puts a uint8 (h, w, 3) image with its top left pixel at (x, y)."""
        self.pixels[y : y + rgb.shape[0], x : x + rgb.shape[1]] = rgb

    def bar(self, x: int, y: int, width: int, height: int, colour: str) -> None:
        """Fills a rectangle."""
        self.pixels[y : y + height, x : x + width] = np.round(np.array(to_rgb(colour)) * 255).astype(np.uint8)

    def text(self, x: float, y: float, text: str, size: float, **style: str) -> None:
        """Writes one line, `size` pixels high, vertically centred on y; `ha` and `weight` as in matplotlib."""
        style = {"color": INK, "va": "center_baseline", **style}
        self.axes.text(x, y, text, fontsize=size, **style)  # type: ignore[arg-type]

    def texts(self) -> list[str]:
        """Everything written on the canvas, in order."""
        return [text.get_text() for text in self.axes.texts]

    def render(self) -> np.ndarray:
        """uint8 (height, width, 3)."""
        self.figure.figimage(self.pixels, zorder=-1, origin="upper")
        agg = FigureCanvasAgg(self.figure)
        agg.draw()
        return np.asarray(agg.buffer_rgba())[..., :3].copy()


# ---- files --------------------------------------------------------------------------------------------------------


def write_plot(figure: Figure, path: Path) -> Path:
    """Saves a matplotlib figure as PNG, atomically and with the same bytes every time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return _write(buffer, path, ".png")


def write_png(rgb: np.ndarray, path: Path) -> Path:
    """Saves a uint8 (h, w, 3) image as PNG, atomically."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="PNG", optimize=True)
    return _write(buffer, path, ".png")


def write_gif(frames: Sequence[np.ndarray], path: Path, milliseconds: Sequence[int]) -> Path:
    """Saves uint8 (h, w, 3) frames as an endless GIF, atomically."""
    height = frames[0].shape[0]
    # Quantised as one tall image, because a palette per frame costs bytes and makes colours flicker. Maximum coverage
    # keeps rare colours (hot cells, outlines), which the default method merges into the many greys.
    tall = Image.fromarray(np.concatenate(frames)).quantize(
        256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    )
    first, *rest = (tall.crop((0, i * height, tall.width, (i + 1) * height)) for i in range(len(frames)))
    buffer = io.BytesIO()
    first.save(
        buffer, format="GIF", save_all=True, append_images=rest, duration=list(milliseconds), loop=0, optimize=True
    )
    return _write(buffer, path, ".gif")


def _write(content: io.BytesIO, path: Path, suffix: str) -> Path:
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise ValueError(f"path: {path} must end in {suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(content.getbuffer()))
    return path
