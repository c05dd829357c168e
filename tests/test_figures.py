"""Figures hold the numbers they were given; what is not there is said to be missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
import polars as pl
import pytest
from matplotlib.colors import to_hex

from sphere_rl.report import appearance, figures
from sphere_rl.report.curves import Curve, curves
from sphere_rl.report.geometry import Snapshot, dominant_direction, ellipsoid
from sphere_rl.statistics import Estimate

ROWS = [
    {"label": "none", "actor": "dense", "rl": Estimate(0.8, 0.7, 0.9, 3), "crl": Estimate(0.3, 0.1, 0.6, 3)},
    {"label": "sphere", "actor": "topk_moe", "rl": Estimate(0.9, None, None, 1), "crl": None},
]

POINT: dict[str, Estimate | None] = {"rl": Estimate(0.8, 0.7, 0.9, 3), "crl": Estimate(0.3, None, None, 1)}


def snapshot(task_index: int, *eigenvalues: float) -> Snapshot:
    values = np.array(eigenvalues, float)
    return Snapshot(task_index, f"task{task_index}", values, values, np.eye(4))


def texts(figure: Any) -> str:
    import matplotlib.text

    return " ".join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def test_bars_have_the_values_and_intervals() -> None:
    figure = figures.success_bars(ROWS, "label", "two seeds")
    (axes,) = figure.axes
    heights = {round(patch.get_height(), 6) for patch in axes.patches}  # type: ignore[attr-defined]
    assert {0.8, 0.3, 0.9} <= heights
    bars: list[Any] = [c for c in axes.containers if hasattr(c, "has_yerr")]
    spans = [bar.lines[2][0].get_segments()[0][:, 1] for bar in bars]
    assert np.allclose(spans, [[0.7, 0.9], [0.1, 0.6]])
    assert texts(figure).count("missing") == 1
    assert "two seeds" not in texts(figure)  # a caption stands beside the picture
    assert figure.get_label() == "two seeds"
    fills: list[Any] = list(axes.patches)
    assert len({patch.get_hatch() for patch in fills}) == 2  # readable in grey
    rl, crl, alone = (to_hex(patch.get_edgecolor()) for patch in fills)  # none in rl and crl, sphere in rl
    assert rl == crl != alone  # a colour is a method, not a protocol
    assert [patch.get_label() for patch in axes.get_legend().get_patches()] == ["RL", "CRL"]  # type: ignore[union-attr]


def test_a_method_has_one_colour_in_every_figure() -> None:
    """Also where figures do not have the methods before it: here sphere is the second of the page."""
    order = ["none", "sphere"]
    blue, orange = (color.lower() for color in appearance.COLORS[:2])
    curve = Curve("sphere", [1, 2], [0.1, 0.2], [0.1, 0.2], [0.1, 0.2], 1)
    line = figures.line_plot([curve], {}, "", "y", order=order).axes[0].lines[0]
    assert to_hex(line.get_color()) == orange
    spectrum = figures.spectrum_decay({"sphere": [snapshot(0, 2, 1, 1)]}, "", order=order).axes[0].lines[0]
    assert to_hex(spectrum.get_color()) == orange
    table = pl.DataFrame({"label": ["sphere"] * 3 + ["none"], "r_e_A": [1.0, 2, 3, 4], "r_e_K": [2.0, 4, 6, 9]})
    dots = figures.proxy_scatter(table, "", "label", order).axes[0].collections
    assert [to_hex(one.get_facecolor()[0]) for one in dots] == [blue, orange]  # type: ignore[index]
    bars: Any = figures.success_bars(ROWS[1:], "label", "", order=order).axes[0].patches
    assert to_hex(bars[0].get_edgecolor()) == orange
    features = {"sphere": [("push", np.eye(2), np.array([0, 1]))]}
    shades: Any = figures.tsne(features, "", ("1st", "2nd"), order).axes[0].collections
    assert [to_hex(one.get_facecolor()[0]) for one in shades] == [orange, appearance.lighter(orange, 0.45)]


def test_curves_are_means_and_ranges_over_seeds() -> None:
    table = pl.DataFrame({"m": ["a"] * 4 + ["b"], "seed": [0, 1, 0, 1, 0], "x": [2, 2, 1, 1, 1],
                          "y": [0.2, 0.6, 0.0, 0.1, None]})  # fmt: skip
    (curve,) = curves(table, "x", "y", ["m"])
    assert curve == Curve("a", [1, 2], [0.05, 0.4], [0.0, 0.2], [0.1, 0.6], 2, [2, 2])
    (curve,) = curves(table.with_columns(task=pl.col("x") - 1), "x", "y", ["m"], part="task")
    assert curve.x == [1, None, 2]  # two tasks: nothing joins them
    assert curve.mean == [0.05, None, 0.4]
    (line,) = figures.line_plot([curve], {}, "", "y").axes[0].lines
    assert np.isnan(np.asarray(line.get_ydata())).tolist() == [False, True, False]


def test_line_plot_draws_curves_and_boundaries() -> None:
    curve = Curve("none", [0, 5, 10], [0.0, 0.5, 0.4], [0.0] * 3, [1.0] * 3, 2)
    figure = figures.line_plot([curve, curve], {0.0: "push", 5.0: "pull"}, "caption", "y")
    (axes,) = figure.axes
    drawn = [np.asarray(line.get_ydata()) for line in axes.lines if len(np.asarray(line.get_xdata())) == 3]
    assert np.array_equal(drawn, np.array([curve.mean, curve.mean], float))
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()
    assert {"push", "pull"} <= set(texts(figure).split())


def test_semi_axes_are_eigenvalues_with_the_sum_three() -> None:
    found = snapshot(0, 8.0, 4.0, 2.0, 2.0)
    assert found.semi_axes.tolist() == pytest.approx([24 / 14, 12 / 14, 6 / 14])
    shares = np.array([8, 4, 2]) / 14
    assert found.drawn_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert snapshot(0, 5.0, 5.0, 5.0, 1.0).semi_axes.tolist() == [1, 1, 1]  # the sphere itself, whatever its size
    assert found.top_share == pytest.approx(14 / 16)
    entropy = -(0.5 * np.log(0.5) + 0.25 * np.log(0.25) + 2 * 0.125 * np.log(0.125))
    assert found.kernel_rank == pytest.approx(np.exp(entropy))
    assert snapshot(0, 0.0, 0.0, 0.0).semi_axes.tolist() == [0, 0, 0]


def test_ellipsoid_lies_on_its_surface() -> None:
    x, y, z = ellipsoid(np.array([1.0, 0.5, 0.25]))
    assert np.allclose(x**2 + (y / 0.5) ** 2 + (z / 0.25) ** 2, 1)
    assert x.max() == pytest.approx(1, abs=0.01)


def test_geometry_has_a_panel_for_each_policy() -> None:
    rows = {"none": [snapshot(0, 4, 2, 1), snapshot(1, 4, 0.2, 0.1)], "sphere": [snapshot(0, 4, 3, 3)]}
    figure = figures.geometry(rows, "caption")
    assert len(figure.axes) == 3
    assert "task1" in texts(figure)
    surface = cast(Any, figure.axes[1]).collections[-1]
    assert np.abs(surface._faces[..., 1]).max() == pytest.approx(3 * 0.2 / 4.3, abs=0.005)
    reach = 3 * 4 / 4.3  # the longest of all: one scale
    assert {axes.get_xlim() for axes in figure.axes} == {(-reach, reach)}


def test_proxy_says_pearsons_r() -> None:
    table = pl.DataFrame({"method": ["a", "a", "b", "b"], "r_e_A": [1.0, 2, 3, 4], "r_e_K": [2.0, 4, 6, 9]})
    r = np.corrcoef(table["r_e_A"], table["r_e_K"])[0, 1]
    assert f"r = {r:.3f}" in figures.proxy_scatter(table, "").axes[0].get_title()
    assert "missing" in texts(figures.proxy_scatter(table.head(2), ""))


def test_dominant_direction_by_hand() -> None:
    """Two lines of states: the longer is the first direction, the other the second."""
    features = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.1, -1.0]])
    assert dominant_direction(features).tolist() == [0, 0, 1, 1]
    assert dominant_direction(np.eye(6) * np.arange(6, 0, -1), shown=3).tolist() == [0, 1, 2, 2, 2, 2]


def test_option_sweep_routing_and_tables() -> None:
    figure = figures.option_sweep({0.01: POINT, 0.1: POINT | {"crl": None}}, "ρ", "")
    assert figure.axes[0].get_xscale() == "log"
    loads = {"none": ([10, 20], np.array([[1.0, 0.0], [0.5, 0.5]]))}
    figure = figures.routing(loads, "", {0.0: "push", 10.0: "pull"})
    mesh = figure.axes[0].collections[0]
    assert figure.axes[0].get_xlim() == (0, 20)
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [0, 10]  # type: ignore[index]
    assert {"push", "pull"} <= set(texts(figure).split())
    assert np.asarray(mesh.get_array()).ravel().tolist() == [1.0, 0.5, 0.0, 0.5]
    (table,) = figures.table_figure(("variant", "CRL"), [["joint", "0.54"]], "").axes[0].tables
    assert [table[1, column].get_text().get_text() for column in range(2)] == ["joint", "0.54"]


def test_nothing_measured_is_missing() -> None:
    for figure in (
        figures.geometry({}, "why"), figures.success_bars([], "label", "why"), figures.line_plot([], {}, "why", ""),
        figures.routing({}, "why"), figures.spectrum_decay({}, "why"), figures.tsne({}, "why", ()),
        figures.option_sweep({}, "ρ", "why"), figures.option_sweep({0.1: {"rl": None, "crl": None}}, "ρ", "why"),
        figures.table_figure((), [], "why"),
    ):  # fmt: skip
        assert "missing: " in texts(figure)
        assert (figure.get_label(), figure.get_gid()) == ("why", figures.MISSING)
    assert figures.success_bars(ROWS, "label", "").get_gid() != figures.MISSING


def test_saved_in_three_formats_reproducibly(tmp_path: Path) -> None:
    before = matplotlib.rcParams["font.size"], matplotlib.rcParams["axes.grid"]
    paths = figures.save(figures.spectrum_decay({"none": [snapshot(0, 2, 1, 1)]}, "caption"), tmp_path / "a" / "s")
    assert [path.name for path in paths] == ["s.png", "s.svg", "s.pdf"]
    first = [path.read_bytes() for path in paths]
    assert [content[:4] for content in first] == [b"\x89PNG", b"<?xm", b"%PDF"]
    assert all(b"caption" in content for content in first[:2])  # inside the file, not in the picture
    figures.save(figures.spectrum_decay({"none": [snapshot(0, 2, 1, 1)]}, "caption"), tmp_path / "a" / "s")
    assert [path.read_bytes() for path in paths] == first
    assert (matplotlib.rcParams["font.size"], matplotlib.rcParams["axes.grid"]) == before


@pytest.mark.parametrize(("count", "length"), [(40, 0), (3, 60)])
def test_figures_grow_with_their_legends(count: int, length: int) -> None:
    """A warning, here an error, would say that the layout has no room for the axes."""
    names = [f"method-{i}" + "x" * length for i in range(count)]
    lines = [Curve(name, [0, 1], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], 3) for name in names]
    points = pl.DataFrame({"r_e_A": np.arange(3.0 * count), "r_e_K": np.arange(3.0 * count), "method": names * 3})
    decay = {"none": [snapshot(i, 3.0, 2.0, 1.0) for i in range(count)]}
    few = figures.line_plot(lines[:3], {}, "", "y")
    for figure in (
        figures.line_plot(lines, {}, "", "y"),
        figures.proxy_scatter(points, ""),
        figures.spectrum_decay(decay, ""),
    ):
        figure.draw_without_rendering()
        box = figure.axes[0].get_window_extent()
        assert min(box.width, box.height) > 1.5 * figure.dpi  # inches
    assert (few.get_size_inches() == (7.0, 3.2)).all() == (length == 0)
