"""What is made of a sweep's runs: the table, the heat-map, the curves."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest

from fastjepa.sweeping.plan import Run
from fastjepa.sweeping.report import cells_of, summary, write_report
from fastjepa.sweeping.state import State, note_failure, read_states
from made_up_sweep import leave, leave_finished, planned, row

pytestmark = pytest.mark.packages("tyro", "torchmetrics", "matplotlib", "PIL")

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from fastjepa.figures import sweeps  # noqa: E402
from fastjepa.figures.sweeps import MAX_PANELS, Cell, draw_cell_curves, draw_heat_map  # noqa: E402


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written, in order."""
    written: list[Figure] = []
    write = sweeps.style.write_plot

    def noted(figure: Figure, path: Path) -> Path:
        written.append(figure)
        return write(figure, path)

    monkeypatch.setattr(sweeps.style, "write_plot", noted)
    return written


def words(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def a_sweep(out: Path) -> tuple[list[Run], list[State]]:
    """Of 2 × 2 cells with 2 seeds: all finished but one that broke, and one cell that was begun or not at all."""
    runs = planned(out, "cov_coeff=1,10", "std_coeff=5,50")
    for i, run in enumerate(runs):
        if run.cell != "cov_coeff=10,std_coeff=50":
            leave_finished(run, 0.2 + i / 100)
    leave(runs[0], row(1, 30, 0.15))
    note_failure(runs[0].folder, "exit status 9")
    leave(runs[3], row(1, 30, 0.9))
    return runs, read_states(runs, out)


def test_the_table_has_a_row_for_each_run(tmp_path: Path) -> None:
    runs, states = a_sweep(tmp_path)
    write_report(runs, states, tmp_path)
    lines = list(csv.reader((tmp_path / "sweep.csv").open()))
    assert lines[0] == (
        "cov_coeff std_coeff seed status epochs_done mAP AP_0 AP_1 positive_share seconds folder".split()
    )
    assert lines[1] == "1 5 1 broken 1 0.15 0.25 0.04999999999999999 0.025 2.5 cov_coeff=1,std_coeff=5/seed-1".split()
    assert lines[2][:6] == ["1", "50", "1", "finished", "2", "0.21000000000000002"]
    assert lines[4][:6] == ["10", "50", "1", "begun", "1", "0.9"]
    assert lines[8] == [
        "10", "50", "2", "not begun", "0", "", "", "", "", "", "cov_coeff=10,std_coeff=50/seed-2"
    ]  # fmt: skip
    assert len(lines) == 9


def test_a_cell_is_what_its_finished_runs_found(tmp_path: Path) -> None:
    cells = cells_of(*a_sweep(tmp_path))
    assert [dict(cell.values) for cell in cells] == [
        {"cov_coeff": cov, "std_coeff": std} for cov in ("1", "10") for std in ("5", "50")
    ]
    assert [[round(value, 9) for value in cell.map] for cell in cells] == [[0.24], [0.21, 0.25], [0.22, 0.26], []]
    assert [cell.n_seeds for cell in cells] == [2] * 4
    np.testing.assert_allclose(cells[1].ap, [[0.31, 0.11], [0.35, 0.15]])
    assert cells[1].positive_share == pytest.approx(0.025)


def test_the_summary_says_the_best_the_spread_and_what_broke(tmp_path: Path) -> None:
    runs, states = a_sweep(tmp_path)
    assert summary(runs, states).splitlines() == [
        "8 runs: 1 broken, 5 finished, 1 begun, 1 not begun",
        "best: cov_coeff 1, std_coeff 5: mAP 0.240 (mean of 1 seed)",
        "cells' means lie within 0.010 of each other, seeds of one cell within 0.040",
        f"broken: {runs[0].folder}: exit status 9",
    ]


def test_the_heat_map_has_mean_and_spread_in_each_cell(tmp_path: Path, figures: list[Figure]) -> None:
    write_report(*a_sweep(tmp_path), tmp_path)
    heat_map, curves = figures
    assert words(heat_map) == [
        "0.240", "1 of 2 seeds", "0.230", "0.210 – 0.250", "0.240", "0.220 – 0.260", "no run\nfinished"
    ]  # fmt: skip
    axes = heat_map.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["5", "50"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "10"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("std_coeff", "cov_coeff")
    # Rows are the first axis, from above: the cell with 0.210 – 0.250 is in the first row, second column.
    (spread,) = (text for text in axes.texts if text.get_text() == "0.210 – 0.250")
    assert spread.xy == (1, 0)
    assert axes.get_ylim() == (1.5, -0.5)
    # Colours are as wide as the seeds of a cell are apart, which is more than the means are.
    (bar,) = heat_map.axes[1:]
    np.testing.assert_allclose(bar.get_ylim(), (0.215, 0.255))
    assert len([line for line in curves.axes[0].lines if len(line.get_xdata()) == 2]) == 4  # three cells, and chance
    for name in ("heatmap.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def cells(**axes: str) -> list[Cell]:
    """A grid with two seeds, mAP growing from cell to cell."""
    found = []
    for i, values in enumerate(itertools.product(*(text.split(",") for text in axes.values()))):
        ap = np.array([[0.3, 0.2, 0.1], [0.34, 0.22, 0.1]]) + i / 1000
        found.append(Cell(dict(zip(axes, values, strict=True)), ap.mean(axis=1), ap, 2, 0.02))
    return found


def test_further_axes_make_further_maps_on_one_scale(tmp_path: Path, figures: list[Figure]) -> None:
    draw_heat_map(cells(cov_coeff="1,10,100", std_coeff="1,10", lr="1,2", steps="4,8"), tmp_path / "map.png")
    *maps, bar = figures[0].axes
    assert [axes.get_title(loc="left") for axes in maps] == [
        "lr 1, steps 4", "lr 1, steps 8", "lr 2, steps 4", "lr 2, steps 8"
    ]  # fmt: skip
    assert {len(axes.texts) for axes in maps} == {12}  # a mean and a spread for each of six cells
    assert bar.get_ylabel() == "mAP"


def test_one_axis_is_a_single_row(tmp_path: Path, figures: list[Figure]) -> None:
    draw_heat_map(cells(lr="1,2,3,4"), tmp_path / "map.png")
    axes = figures[0].axes[0]
    assert axes.get_ylim() == (0.5, -0.5)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3", "4"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("lr", "")


def test_no_words_of_a_picture_lie_on_each_other(tmp_path: Path, figures: list[Figure]) -> None:
    """Those of the published grid, with a cell of fewer seeds, in which there are the most."""
    published = cells(cov_coeff="1,10,100", std_coeff="1,10,100")
    published[4] = Cell(published[4].values, published[4].map, published[4].ap, 3, 0.02)
    draw_heat_map(published, tmp_path / "map.png")
    draw_cell_curves(published, tmp_path / "curves.png")
    for figure in figures:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
        whole = figure.bbox
        for i, (text, box) in enumerate(boxes):
            assert box.x0 >= whole.x0 - 1, text
            assert box.x1 <= whole.x1 + 1, text
            for other, its_box in boxes[i + 1 :]:
                assert not box.overlaps(its_box), (text, other)


def test_the_curves_have_a_band_from_the_lowest_to_the_highest_seed(tmp_path: Path, figures: list[Figure]) -> None:
    draw_cell_curves(cells(lr="1,2"), tmp_path / "curves.png")
    axes = figures[0].axes[0]
    first = axes.lines[0]
    assert first.get_label() == "lr 1: mAP 0.210"
    np.testing.assert_allclose(first.get_ydata(), [0.32, 0.21, 0.1])
    corners = axes.collections[0].get_paths()[0].vertices
    assert {(0.0, 0.3), (0.0, 0.34), (1.0, 0.2), (1.0, 0.22)} <= {(x, round(y, 6)) for x, y in corners}
    assert len(axes.collections) == 2
    legend = figures[0].legends[0]
    assert legend.get_texts()[-1].get_text() == "chance: 2.0% of cells are positive"


def test_of_many_cells_the_best_are_drawn_and_the_title_says_so(tmp_path: Path, figures: list[Figure]) -> None:
    draw_cell_curves(cells(lr="1,2,3,4,5", steps="1,2,3"), tmp_path / "curves.png")
    axes = figures[0].axes[0]
    assert "the 9 best of 15 cells by mAP" in axes.get_title(loc="left")
    curves = [line for line in axes.lines if str(line.get_label()).startswith("lr")]
    assert [str(line.get_label()).split(":")[0] for line in curves][:2] == ["lr 3, steps 1", "lr 3, steps 2"]
    assert len({(line.get_color(), line.get_marker()) for line in curves}) == len(curves) == 9
    assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == 9  # without markers too


def test_a_run_without_a_digit_in_its_clips_counts_as_none(tmp_path: Path) -> None:
    runs = planned(tmp_path, "lr=1", seeds=(1, 2))
    rows = [row(epoch, 30 * epoch, float("nan")) for epoch in (1, 2)]
    leave(runs[0], *rows)
    leave_finished(runs[1], 0.3)
    (cell,) = cells_of(runs, read_states(runs, tmp_path))
    assert cell.map.tolist() == [0.3]


def test_nothing_is_drawn_before_a_run_is_finished(tmp_path: Path) -> None:
    runs = planned(tmp_path, "lr=1", seeds=(1,))
    assert write_report(runs, read_states(runs, tmp_path), tmp_path) == [tmp_path / "sweep.csv"]
    for draw in (draw_heat_map, draw_cell_curves):
        with pytest.raises(ValueError, match="expected at least one with a finished run"):
            draw([Cell({"lr": "1"}, np.empty(0), np.empty((0, 0)), 1)], tmp_path / "x.png")


def test_too_many_maps_are_left_out_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ",".join(map(str, range(1, MAX_PANELS + 2)))
    with pytest.raises(ValueError, match=f"they make {MAX_PANELS + 1} maps, of at most {MAX_PANELS}"):
        draw_heat_map(cells(lr="1", cov_coeff="1", steps=steps), tmp_path / "x.png")
    runs = planned(tmp_path, "lr=1", "cov_coeff=1", f"steps={steps}", seeds=(1,))
    leave_finished(runs[0], 0.3)
    written = write_report(runs, read_states(runs, tmp_path), tmp_path)
    assert [path.name for path in written] == ["sweep.csv", "curves.png"]
    assert "heatmap.png is left out: it would be 49 maps, of at most 48" in capsys.readouterr().out
