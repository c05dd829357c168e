"""Figures of the paper from tables of runs: one function a figure, each returns a matplotlib `Figure`.

A colour is a method, the same in every figure that is given the same ``order`` of labels; the protocol is fill and line
style. Colours are Okabe & Ito's, told apart in grey by line styles, markers and hatches. A figure's caption (seeds,
steps, what is drawn) is its label and the description inside the files, not a part of the picture. What the runs do not
hold is drawn as missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from jaxtyping import Float
from numpy import ndarray

from sphere_rl.correlations import correlation
from sphere_rl.report.appearance import (
    LINES,
    MARKERS,
    color,
    drawing,
    fill,
    index,
    lighter,
    make_room,
    plain_names,
    shade,
    styled,
    symbol,
    veil,
)
from sphere_rl.report.axes import mark_tasks, scale, steps, wrapped
from sphere_rl.report.curves import Curve, grouped
from sphere_rl.report.foresight import foresight
from sphere_rl.runs import make_folder, write_atomic
from sphere_rl.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sphere_rl.report.geometry import Snapshot

FORMATS = ("png", "svg", "pdf")
PAPER: dict[str, Any] = {"linestyle": "", "marker": "D", "markersize": 6, "color": "black", "markerfacecolor": "white"}
"""The mark of a number that the paper prints."""
MISSING = "missing"
"""Group id of the figures that hold no data."""


def save(figure: Figure, path: Path | str) -> list[Path]:
    """Write ``path`` as PNG (200 dpi), SVG and PDF with the caption as description; equal figures give equal bytes."""
    stem, caption = Path(path), str(figure.get_label())
    make_folder(stem.parent)
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Description": caption},
        "svg": {"Date": None, "Description": caption},
        "pdf": {"CreationDate": None, "Subject": caption},
    }
    with drawing():
        plain_names(figure)
        figure.draw_without_rendering()  # lays out once for all formats
        figure.set_layout_engine("none")
        box = figure.get_tightbbox().padded(0.1)
        for kind in FORMATS:
            drawn = BytesIO()
            figure.savefig(drawn, format=kind, dpi=200, bbox_inches=box, metadata=metadata[kind])
            write_atomic(stem.with_name(f"{stem.name}.{kind}"), drawn.getvalue())
    return [stem.with_name(f"{stem.name}.{kind}") for kind in FORMATS]


@styled
def geometry(snapshots: Mapping[str, Sequence[Snapshot]], caption: str, order: Sequence[str] = ()) -> Figure:
    """Draw Figure 1: the unit sphere of output gradients (grey) and its image under K, task by task, a row a method.

    Semi-axes are `Snapshot.semi_axes`: λ₁, λ₂, λ₃ of the eNTK on the probe batch, scaled to the sum 3 that the sphere's
    have. All panels have one scale.
    """
    from matplotlib.colors import LightSource

    from sphere_rl.report.geometry import ellipsoid

    width = 1 + max((snapshot.task_index for row in snapshots.values() for snapshot in row), default=-1)
    if not width:
        return missing("No policies at the ends of tasks yet", caption)
    figure = _figure((2.2 * width, 2.5 * len(snapshots)))
    reach = max(1.0, *(float(snapshot.semi_axes[0]) for row in snapshots.values() for snapshot in row))
    for i, (method, row) in enumerate(snapshots.items()):
        for snapshot in row:
            place = i * width + snapshot.task_index + 1
            axes: Any = figure.add_subplot(len(snapshots), width, place, projection="3d")
            axes.plot_wireframe(*ellipsoid(np.ones(3)), color="#999999", linewidth=0.3, alpha=0.5, rcount=12, ccount=16)
            axes.plot_surface(
                *ellipsoid(snapshot.semi_axes), color=color(method, i, order), linewidth=0, antialiased=False,
                lightsource=LightSource(azdeg=225, altdeg=50),
            )  # fmt: skip
            axes.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(-reach, reach))
            axes.set_box_aspect((1, 1, 1), zoom=1.35)
            axes.set_axis_off()
            ranks = f"$r_e$ of the three = {snapshot.drawn_rank:.2f}, of all = {snapshot.kernel_rank:.1f}"
            axes.set_title(f"{method}\n{snapshot.task}\n{ranks}", fontsize=7)
    return _captioned(figure, caption)


@styled
def success_bars(
    rows: Sequence[Mapping[str, Any]], label: str, caption: str, ylabel: str = "Success", order: Sequence[str] = ()
) -> Figure:
    """Draw Figures 2, 4 and 5: RL beside CRL for each of ``label`` ("actor" or "method"), with 95 % intervals.

    ``rows``: `statistics.headline`; with their own ``label`` they have the colour that it has in ``order``, with their
    ``paper`` diamonds at what the paper prints.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if not any(row[name] for row in rows for name in ("rl", "crl")):
        return missing("No method has finished its tasks with every seed yet", caption)
    figure = _figure((max(4.0, 1.1 * len(rows) + 1.5), 3.2))
    axes = figure.add_subplot()
    known = [name for name in ("rl", "crl") if any(row[name] for row in rows)]
    for x, row in enumerate(rows):
        own = color(row.get("label", ""), x, order)
        for protocol in known:
            _bar(axes, x + {"rl": -0.2, "crl": 0.2}[protocol], row[protocol], 0.38, fill(own, protocol))
        if paper := row.get("paper"):
            axes.plot((x - 0.2, x + 0.2), paper, **PAPER)
    axes.set_xticks(range(len(rows)), [wrapped(str(row[label])) for row in rows])
    axes.set_ylabel(ylabel)
    scale(axes, ylabel)
    axes.grid(axis="x", visible=False)
    marks: list[Any] = [Patch(**fill("#666666", protocol), label=protocol.upper()) for protocol in known]
    marks += [Line2D([], [], **PAPER, label="the paper's")] if any(row.get("paper") for row in rows) else []
    axes.legend(handles=marks, loc="upper left", bbox_to_anchor=(1, 1))
    return _captioned(figure, caption)


@styled
def line_plot(
    lines: Sequence[Curve], boundaries: Mapping[float, str], caption: str, ylabel: str,
    order: Sequence[str] = (), xlabel: str = "Environment steps",
) -> Figure:  # fmt: skip
    """Draw Figure 3 and the learning curves: a line a method, task boundaries marked, the range of seeds shaded."""
    if not lines:
        return missing("Nothing measured yet", caption)
    figure = _figure((7.0, 3.2))
    axes, handles = figure.add_subplot(), []
    for i, curve in enumerate(lines):
        own, place = color(curve.label, i, order), index(curve.label, i, order)
        points, mean, low, high = (np.array(values, float) for values in (curve.x, curve.mean, curve.low, curve.high))
        known = [i for i, x in enumerate(curve.x) if x is not None]
        marked = sorted({*known[:: max(1, len(known) // 15)], *curve.alone})
        handles += axes.plot(
            points, mean, color=own, linestyle=LINES[place % len(LINES)], marker=symbol(place, MARKERS),
            markersize=3, linewidth=1.4, markevery=marked, label=f"{curve.label} ({curve.seeds})",
        )  # fmt: skip
        axes.fill_between(points, low, high, color=own, alpha=veil(len(lines)), linewidth=0)
    if boundaries:
        mark_tasks(axes, boundaries)
        steps(axes)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    scale(axes, ylabel)
    make_room(axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1), title="method (seeds)"))
    return _captioned(figure, caption)


@styled
def routing(
    loads: Mapping[str, tuple[Sequence[int | float], Float[ndarray, "T E"]]], caption: str,
    boundaries: Mapping[float, str] | None = None,
) -> Figure:  # fmt: skip
    """Share of the probe states that each expert is selected for (rows) through training (columns), a panel a run.

    A column reaches from the measurement before to its own; all panels have the steps of the longest run.
    """
    if not loads:
        return missing("No routing measured: no mixture of experts, or no spectrum lines", caption)
    end = max(measured[-1] for measured, _ in loads.values())  # one for all: a run that goes on is shorter
    starts = {step: task for step, task in (boundaries or {}).items() if step < end}
    figure = _figure((7.0, 1.9 * len(loads)))
    for i, (label, (measured, load)) in enumerate(loads.items()):
        axes = figure.add_subplot(len(loads), 1, i + 1)
        edges = np.append(0, measured)
        mesh = axes.pcolormesh(
            edges, np.arange(load.shape[1] + 1), load.T, cmap="cividis", vmin=0, vmax=1, rasterized=True
        )
        axes.set_title(label, loc="left", pad=34 if starts and not i else 6)
        mark_tasks(axes, starts, "#FFFFFF", names=not i)
        steps(axes)
        axes.set(xlim=(0, end), ylabel="Expert", yticks=np.arange(load.shape[1]) + 0.5)
        axes.set_yticklabels(map(str, range(load.shape[1])), fontsize=6)
        axes.grid(visible=False)
        figure.colorbar(mesh, ax=axes, label="share of states", fraction=0.03)
    figure.axes[-2].set_xlabel("Environment steps")
    return _captioned(figure, caption)


@styled
def spectrum_decay(
    snapshots: Mapping[str, Sequence[Snapshot]], caption: str, shown: int = 64, order: Sequence[str] = ()
) -> Figure:
    """Leading eigenvalues of K over their sum at the end of each task, a panel a method, later tasks darker."""
    if not any(snapshots.values()):
        return missing("No policies at the ends of tasks yet", caption)
    figure = _figure((3.4 * len(snapshots), 3.0))
    for i, (method, row) in enumerate(snapshots.items()):
        axes = figure.add_subplot(1, len(snapshots), i + 1)
        for snapshot, style in zip(row, cycle(LINES), strict=False):
            values = snapshot.kernel_eigenvalues / max(snapshot.kernel_eigenvalues.sum(), 1e-300)
            shade = 0.25 + 0.75 * (snapshot.task_index + 1) / (row[-1].task_index + 1)
            axes.semilogy(
                np.arange(1, min(shown, len(values)) + 1), values[:shown], linestyle=style,
                color=color(method, i, order), alpha=shade, label=snapshot.task,
            )  # fmt: skip
        axes.set(title=method, xlabel="Index $i$", ylabel=r"$\lambda_i / \mathrm{tr}\,K$" if not i else "")
        make_room(axes.legend(fontsize=6), beside=False)
    return _captioned(figure, caption)


@styled
def tsne(
    panels: Mapping[str, Sequence[tuple[str, Float[ndarray, "N 2"], ndarray]]], caption: str, names: Sequence[str],
    order: Sequence[str] = (),
) -> Figure:  # fmt: skip
    """Draw Figure 6: embedded weighted features of the probe batch after each task, a row a method.

    Each panel: task, points and the index of each state's dominant singular direction: its marker, and how light the
    method's colour is (`shade`).
    """
    width = max((len(row) for row in panels.values()), default=0)
    if not width:
        return missing("No policies at the ends of tasks yet", caption)
    figure = _figure((2.2 * width, 2.3 * len(panels)))
    for i, (method, row) in enumerate(panels.items()):
        for j, (task, points, direction) in enumerate(row):
            axes = figure.add_subplot(len(panels), width, i * width + j + 1)
            for one in np.unique(direction):
                chosen = points[direction == one]
                own = lighter(color(method, i, order), shade(int(one), len(names)))
                axes.scatter(*chosen.T, s=5, color=own, marker=MARKERS[one], label=names[one])
            axes.set(xticks=[], yticks=[], title=f"{method}\n{task}")
            axes.title.set_fontsize(8)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1, 1), title="direction")
    return _captioned(figure, caption)


@styled
def proxy_scatter(table: pl.DataFrame, caption: str, by: str = "method", order: Sequence[str] = ()) -> Figure:
    """Draw Figure 7: r_e(A_last) against r_e(K) over measured batches, with Pearson's r and its 95 % interval.

    ``by``: the column that says a point's method.
    """
    table = table.filter(pl.col("r_e_K").is_not_null() & pl.col("r_e_A").is_not_null())
    if table.height < 3:
        return missing("Fewer than three batches measured", caption)
    figure = _figure((4.2, 3.6))
    axes = figure.add_subplot()
    drawn = _points(axes, table, ("r_e_A", "r_e_K"), by, order, 9.0)
    axes.set(xlabel="$r_e(A)$, last expert layer", ylabel="$r_e(K)$")
    make_room(axes.legend(handles=drawn, loc="upper left", bbox_to_anchor=(1, 1)))
    r, low, high = (correlation(table)[name] for name in ("pearson_r", "low", "high"))
    if r is not None:
        interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        axes.set_title(f"Pearson r = {r:.3f}{interval}, {table.height} batches")
    return _captioned(figure, caption)


@styled
def entry_scatter(table: pl.DataFrame, caption: str, ylabel: str = "Success", order: Sequence[str] = ()) -> Figure:
    """r_e(K) and r_e(A) as agents enter their tasks against the score that they reach, from `foresight.entries`."""
    if table.height < 3:
        return missing("Fewer than three tasks entered and finished", caption)
    figure = _figure((7.0, 3.2))
    every: Any = figure.subplots(1, 2, sharey=True)
    points = list[Any]()
    for axes, metric, name in zip(every, ("r_e_K", "r_e_A"), ("$r_e(K)$", "$r_e(A)$"), strict=True):
        points = _points(axes, table, (metric, "score"), "label", order, 16.0)
        axes.set(xlabel=f"{name} at the end of the task before")
        axes.set_title(wrapped(str(foresight(table, metric)), 40), fontsize=8)
        scale(axes, ylabel)
    every[0].set_ylabel(ylabel)
    make_room(every[1].legend(handles=points, loc="upper left", bbox_to_anchor=(1, 1)))
    return _captioned(figure, caption)


@styled
def option_sweep(
    points: Mapping[float, Mapping[str, Any]], option: str, caption: str, ylabel: str = "Success",
    order: Sequence[str] = (),
) -> Figure:  # fmt: skip
    """Success against ρ (or another option of a method), RL and CRL, with 95 % intervals.

    A point with a ``label`` has the colour that it has in ``order``; RL is dashed with open markers.
    """
    if not any(row[protocol] for row in points.values() for protocol in ("rl", "crl")):
        return missing(f"No finished runs that differ in {option} alone", caption)
    figure = _figure((4.6, 3.0))
    axes = figure.add_subplot()
    for i, protocol in enumerate(("rl", "crl")):
        known = [(x, row, found) for x, row in sorted(points.items()) if (found := row[protocol]) is not None]
        style: dict[str, Any] = {"linestyle": ("--", "-")[i], "marker": MARKERS[i]}
        if known:
            axes.plot([x for x, *_ in known], [found.value for *_, found in known], color="#666666", zorder=1,
                      label=protocol.upper(), markerfacecolor=("white", "#666666")[i], **style)  # fmt: skip
        for place, (x, row, found) in enumerate(known):
            own = color(row.get("label", ""), place, order)
            axes.errorbar(x, found.value, _errors([found]), color=own, capsize=3, marker=MARKERS[i],
                          markerfacecolor=("white", own)[i])  # fmt: skip
    if min(points) > 0:
        axes.set_xscale("log")
    axes.set_xticks(sorted(points), [f"{x:g}" for x in sorted(points)])
    axes.minorticks_off()
    axes.set(xlabel=option, ylabel=ylabel)
    scale(axes, ylabel)
    axes.legend()
    return _captioned(figure, caption)


@styled
def table_figure(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Figure:
    """Draw a table, as the ablation's: methods and their success with intervals."""
    if not rows:
        return missing("No such runs yet", caption)
    figure = _figure((1.5 * len(header) + 1, 0.3 * len(rows) + 0.8))
    axes = figure.add_subplot()
    axes.axis("off")
    drawn = axes.table(
        [list(row) for row in rows], colLabels=list(header), loc="center", cellLoc="left", edges="horizontal"
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    drawn.auto_set_column_width(list(range(len(header))))
    return _captioned(figure, caption)


@styled
def missing(reason: str, caption: str) -> Figure:
    """Draw the figure that says what is missing."""
    figure = _figure((5.0, 2.0))
    figure.set_gid(MISSING)
    figure.text(0.5, 0.6, f"missing: {reason}", ha="center", color="#777777", style="italic")
    return _captioned(figure, caption)


def _figure(size: tuple[float, float]) -> Figure:
    """A figure of its own, outside pyplot: drawn without a display, freed with its last reference."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _captioned(figure: Figure, caption: str) -> Figure:
    figure.set_label(caption)
    return figure


def _points(
    axes: Axes, table: pl.DataFrame, columns: tuple[str, str], by: str, order: Sequence[str], size: float
) -> list[Any]:
    """Points of a table, a colour and a marker a value of ``by``; returns what a legend takes."""
    return [
        axes.scatter(*(group[name] for name in columns), s=size, color=color(label, i, order), alpha=0.7, label=label,
                     marker=symbol(i, MARKERS), rasterized=True)
        for label, i, group in grouped(table, by, order)
    ]  # fmt: skip


def _bar(axes: Axes, x: float, found: Estimate | None, width: float, fill: Mapping[str, Any]) -> None:
    if found is None:
        axes.text(x, 0, "missing", rotation=90, ha="center", va="bottom", fontsize=6, color="#777777", style="italic")
        return
    axes.bar(x, found.value, width, **fill)
    if found.low is not None:
        axes.errorbar(x, found.value, _errors([found]), color="black", capsize=2.5, linewidth=1)


def _errors(found: Sequence[Estimate]) -> Float[ndarray, "2 n"]:
    """Distances from the value down and up to the interval's ends; 0 where there is none."""
    spans = [(0.0, 0.0) if f.low is None or f.high is None else (f.value - f.low, f.high - f.value) for f in found]
    return np.clip(np.array(spans, dtype=float).T, 0, None)
