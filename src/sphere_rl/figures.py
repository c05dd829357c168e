"""Figures of the paper from tables of runs: one function a figure, each returns a matplotlib `Figure`.

Colours are Okabe & Ito's, told apart in grey by line styles, markers and hatches. A caption under each figure says
seeds, steps and what is drawn; it is the figure's label, too. What the runs do not hold is drawn as missing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from jaxtyping import Float
from numpy import ndarray

from sphere_rl.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sphere_rl.geometry import Snapshot

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#666666")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "...", "xx", "\\\\", "++", "oo", "--")
FORMATS = ("png", "svg", "pdf")
STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "legend.frameon": False,
    "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "svg.hashsalt": "sphere-rl", "pdf.fonttype": 42,
}  # fmt: skip


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw with this module's style and leave the caller's as it is."""

    @wraps(draw)
    def with_style(*args: Any, **kwargs: Any) -> Figure:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return with_style


@dataclass(frozen=True)
class Curve:
    """One line of a figure: mean over seeds with the range of the seeds."""

    label: str
    x: Sequence[int | float]
    mean: Sequence[int | float]
    low: Sequence[int | float]
    high: Sequence[int | float]
    seeds: int


def save(figure: Figure, path: Path | str) -> list[Path]:
    """Write ``path`` as PNG (200 dpi), SVG and PDF; equal figures give equal bytes."""
    import matplotlib

    stem = Path(path)
    stem.parent.mkdir(parents=True, exist_ok=True)
    metadata: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with matplotlib.rc_context(STYLE):
        figure.draw_without_rendering()  # lays out once for all formats
        figure.set_layout_engine("none")
        box = figure.get_tightbbox().padded(0.1)
        for kind in FORMATS:
            figure.savefig(stem.with_suffix(f".{kind}"), dpi=200, bbox_inches=box, metadata=metadata.get(kind))
    return [stem.with_suffix(f".{kind}") for kind in FORMATS]


def curves(table: pl.DataFrame, x: str, y: str, by: Sequence[str]) -> list[Curve]:
    """Mean and range over seeds of ``y`` at each ``x``, one curve for each value of ``by``; nulls are left out."""
    found = []
    for key, group in table.filter(pl.col(y).is_not_null()).group_by(by, maintain_order=True):
        line = group.group_by(x).agg(
            pl.col(y).mean().alias("mean"), pl.col(y).min().alias("low"), pl.col(y).max().alias("high")
        )
        line = line.sort(x)
        columns = [line[name].to_list() for name in (x, "mean", "low", "high")]
        found.append(Curve(" · ".join(map(str, key)), *columns, seeds=group["seed"].n_unique()))
    return found


@styled
def geometry(snapshots: Mapping[str, Sequence[Snapshot]], caption: str) -> Figure:
    """Draw Figure 1: the unit sphere of output gradients (grey) and its image under K, task by task, a row a method.

    Semi-axes are λ₁, λ₂, λ₃ of the eNTK on the probe batch, divided by λ₁.
    """
    from matplotlib.colors import LightSource

    width = max((len(row) for row in snapshots.values()), default=0)
    if not width:
        return missing("No policies at the ends of tasks yet", caption)
    figure = _figure((2.2 * width, 2.5 * len(snapshots)))
    for i, (method, row) in enumerate(snapshots.items()):
        for snapshot in row:
            place = i * width + snapshot.task_index + 1
            axes: Any = figure.add_subplot(len(snapshots), width, place, projection="3d")
            axes.plot_wireframe(*ellipsoid(np.ones(3)), color="#999999", linewidth=0.3, alpha=0.5, rcount=12, ccount=16)
            axes.plot_surface(
                *ellipsoid(snapshot.semi_axes), color=COLORS[i % len(COLORS)], linewidth=0, antialiased=False,
                lightsource=LightSource(azdeg=225, altdeg=50),
            )  # fmt: skip
            axes.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1))
            axes.set_box_aspect((1, 1, 1), zoom=1.35)
            axes.set_axis_off()
            axes.set_title(f"{method}\n{snapshot.task}, $r_e(K)$ = {snapshot.kernel_rank:.1f}", fontsize=8)
    return _captioned(figure, caption)


def ellipsoid(semi_axes: Float[ndarray, "3"], points: int = 21) -> tuple[ndarray, ndarray, ndarray]:
    """Surface of an ellipsoid, longest axis first: x, y and z on a grid."""
    # from the south pole up: so the faces' normals point outwards, towards the light
    azimuth, height = np.meshgrid(np.linspace(0, 2 * np.pi, points), np.linspace(np.pi, 0, points))
    sphere = np.cos(azimuth) * np.sin(height), np.sin(azimuth) * np.sin(height), np.cos(height)
    return tuple(axis * side for axis, side in zip(semi_axes, sphere, strict=True))  # type: ignore[return-value]


@styled
def success_bars(rows: Sequence[Mapping[str, Any]], label: str, caption: str, ylabel: str = "Success") -> Figure:
    """Draw Figures 2, 4 and 5: RL beside CRL for each of ``label`` ("actor" or "method"), with 95 % intervals.

    ``rows``: `statistics.headline`.
    """
    if not any(row[protocol] for row in rows for protocol in ("rl", "crl")):
        return missing("No method has finished its tasks with every seed yet", caption)
    figure = _figure((max(4.0, 1.1 * len(rows) + 1.5), 3.2))
    axes = figure.add_subplot()
    for i, protocol in enumerate(("rl", "crl")):
        for x, row in enumerate(rows):
            _bar(axes, x + 0.4 * i - 0.2, row[protocol], 0.38, COLORS[i], HATCHES[i], protocol.upper() if not x else "")
    axes.set_xticks(range(len(rows)), [_wrap(str(row[label])) for row in rows])
    axes.set_ylabel(ylabel)
    _scale(axes, ylabel)
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return _captioned(figure, caption)


@styled
def line_plot(
    lines: Sequence[Curve], boundaries: Mapping[float, str], caption: str, ylabel: str, log: bool = False
) -> Figure:
    """Draw Figure 3 and the learning curves: a line a method, task boundaries marked, the range of seeds shaded."""
    if not lines:
        return missing("Nothing measured yet", caption)
    figure = _figure((7.0, 3.2))
    axes = figure.add_subplot()
    for curve, color, style, marker in zip(lines, cycle(COLORS), cycle(LINES), cycle(MARKERS), strict=False):
        points = np.asarray(curve.x)
        axes.plot(
            points, curve.mean, color=color, linestyle=style, marker=marker, markersize=3, linewidth=1.4,
            markevery=max(1, len(points) // 15), label=f"{curve.label} ({curve.seeds})",
        )  # fmt: skip
        axes.fill_between(points, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
    if log:
        axes.set_yscale("log")
    mark_tasks(axes, boundaries)
    axes.set(xlabel="Environment steps", ylabel=ylabel)
    _scale(axes, ylabel)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), title="method (seeds)")
    return _captioned(figure, caption)


def mark_tasks(axes: Axes, boundaries: Mapping[float, str]) -> None:
    """Mark where each task begins, with its name."""
    for step, task in boundaries.items():
        axes.axvline(step, color="#888888", linewidth=0.6, linestyle=(0, (2, 2)))
        axes.text(
            step, 1.01, f" {task}", transform=axes.get_xaxis_transform(), fontsize=6, rotation=28, color="#555555",
            va="bottom",
        )  # fmt: skip


@styled
def routing(loads: Mapping[str, tuple[Sequence[int | float], Float[ndarray, "T E"]]], caption: str) -> Figure:
    """Share of the probe states that each expert is selected for (rows) through training (columns), a panel a run."""
    if not loads:
        return missing("No routing measured: no mixture of experts, or no spectrum lines", caption)
    figure = _figure((7.0, 1.9 * len(loads)))
    for i, (label, (steps, load)) in enumerate(loads.items()):
        axes = figure.add_subplot(len(loads), 1, i + 1)
        edges = np.append(0, steps)
        mesh = axes.pcolormesh(
            edges, np.arange(load.shape[1] + 1), load.T, cmap="cividis", vmin=0, vmax=1, rasterized=True
        )
        axes.set(title=label, ylabel="Expert", yticks=np.arange(load.shape[1]) + 0.5)
        axes.set_yticklabels(map(str, range(load.shape[1])), fontsize=6)
        axes.grid(visible=False)
        figure.colorbar(mesh, ax=axes, label="share of states", fraction=0.03)
    figure.axes[-2].set_xlabel("Environment steps")
    return _captioned(figure, caption)


@styled
def spectrum_decay(snapshots: Mapping[str, Sequence[Snapshot]], caption: str, shown: int = 64) -> Figure:
    """Leading eigenvalues of K over their sum at the end of each task, a panel a method, later tasks darker."""
    if not any(snapshots.values()):
        return missing("No policies at the ends of tasks yet", caption)
    figure = _figure((3.4 * len(snapshots), 3.0))
    for i, (method, row) in enumerate(snapshots.items()):
        axes = figure.add_subplot(1, len(snapshots), i + 1)
        for snapshot, style in zip(row, cycle(LINES), strict=False):
            values = snapshot.kernel_eigenvalues / max(snapshot.kernel_eigenvalues.sum(), 1e-300)
            shade = 0.25 + 0.75 * (snapshot.task_index + 1) / len(row)
            axes.semilogy(
                np.arange(1, min(shown, len(values)) + 1), values[:shown], linestyle=style,
                color=COLORS[i % len(COLORS)], alpha=shade, label=snapshot.task,
            )  # fmt: skip
        axes.set(title=method, xlabel="Index $i$", ylabel=r"$\lambda_i / \mathrm{tr}\,K$" if not i else "")
        axes.legend(fontsize=6)
    return _captioned(figure, caption)


@styled
def tsne(
    panels: Mapping[str, Sequence[tuple[str, Float[ndarray, "N 2"], ndarray]]], caption: str, names: Sequence[str]
) -> Figure:
    """Draw Figure 6: embedded weighted features of the probe batch after each task, a row a method.

    Each panel: task, points and, for colour and marker, the index of each state's dominant singular direction.
    """
    width = max((len(row) for row in panels.values()), default=0)
    if not width:
        return missing("No policies at the ends of tasks yet", caption)
    figure = _figure((2.2 * width, 2.3 * len(panels)))
    for i, (method, row) in enumerate(panels.items()):
        for j, (task, points, direction) in enumerate(row):
            axes = figure.add_subplot(len(panels), width, i * width + j + 1)
            for index in np.unique(direction):
                chosen = points[direction == index]
                axes.scatter(*chosen.T, s=5, color=COLORS[index], marker=MARKERS[index], label=names[index])
            axes.set(xticks=[], yticks=[], title=f"{method}\n{task}")
            axes.title.set_fontsize(8)
    handles = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="upper left", bbox_to_anchor=(1, 1), title="direction")
    return _captioned(figure, caption)


@styled
def proxy_scatter(table: pl.DataFrame, caption: str) -> Figure:
    """Draw Figure 7: r_e(A_last) against r_e(K) over measured batches, with Pearson's r and its 95 % interval."""
    from scipy.stats import pearsonr

    table = table.filter(pl.col("r_e_K").is_not_null() & pl.col("r_e_A").is_not_null())
    if table.height < 3:
        return missing("Fewer than three batches measured", caption)
    figure = _figure((4.2, 3.6))
    axes = figure.add_subplot()
    groups = table.group_by("method", maintain_order=True)
    for (method, group), color, marker in zip(groups, cycle(COLORS), cycle(MARKERS), strict=False):
        axes.scatter(
            group["r_e_A"],
            group["r_e_K"],
            s=9,
            color=color,
            marker=marker,
            alpha=0.7,
            label=str(method[0]),
            rasterized=True,
        )
    axes.set(xlabel="$r_e(A)$, last expert layer", ylabel="$r_e(K)$")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    if table["r_e_A"].n_unique() > 1 and table["r_e_K"].n_unique() > 1:
        found: Any = pearsonr(table["r_e_A"], table["r_e_K"])
        low, high = found.confidence_interval() if table.height > 3 else (float("nan"), float("nan"))
        axes.set_title(f"Pearson r = {found.statistic:.3f} [{low:.3f}, {high:.3f}], {table.height} batches")
    return _captioned(figure, caption)


@styled
def option_sweep(
    points: Mapping[float, Mapping[str, Estimate | None]], option: str, caption: str, ylabel: str = "Success"
) -> Figure:
    """Success against ρ (or another option of a method), RL and CRL, with 95 % intervals."""
    if not points:
        return missing(f"No runs that differ in {option} alone", caption)
    figure = _figure((4.6, 3.0))
    axes = figure.add_subplot()
    for i, protocol in enumerate(("rl", "crl")):
        known = [(x, found) for x, row in sorted(points.items()) if (found := row[protocol]) is not None]
        if known:
            axes.errorbar(
                [x for x, _ in known], [found.value for _, found in known], _errors([found for _, found in known]),
                color=COLORS[i], linestyle=LINES[i], marker=MARKERS[i], capsize=3, label=protocol.upper(),
            )  # fmt: skip
    if min(points) > 0:
        axes.set_xscale("log")
    axes.set(xlabel=option, ylabel=ylabel)
    _scale(axes, ylabel)
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
    figure.text(0.5, 0.6, f"missing: {reason}", ha="center", color="#777777", style="italic")
    return _captioned(figure, caption)


def _figure(size: tuple[float, float]) -> Figure:
    """A figure of its own, outside pyplot: drawn without a display, freed with its last reference."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _captioned(figure: Figure, caption: str) -> Figure:
    figure.set_label(caption)
    columns = max(40, int(figure.get_figwidth() * 16))
    figure.text(0.0, -0.02, textwrap.fill(caption, columns), ha="left", va="top", fontsize=7, color="#333333")
    return figure


def _bar(axes: Axes, x: float, found: Estimate | None, width: float, color: str, hatch: str, label: str) -> None:
    if found is None:
        axes.text(x, 0, "missing", rotation=90, ha="center", va="bottom", fontsize=6, color="#777777", style="italic")
        axes.bar(x, 0, width, color=color, hatch=hatch, label=label, edgecolor="white")
        return
    axes.bar(x, found.value, width, color=color, hatch=hatch, label=label, edgecolor="white")
    if found.low is not None:
        axes.errorbar(x, found.value, _errors([found]), color="black", capsize=2.5, linewidth=1)


def _scale(axes: Axes, ylabel: str) -> None:
    """Success is a share: the same scale in every figure."""
    if ylabel == "Success":
        axes.set_ylim(-0.02, 1.05)


def _errors(found: Sequence[Estimate]) -> Float[ndarray, "2 n"]:
    """Distances from the value down and up to the interval's ends; 0 where there is none."""
    spans = [(0.0, 0.0) if f.low is None or f.high is None else (f.value - f.low, f.high - f.value) for f in found]
    return np.clip(np.array(spans, dtype=float).T, 0, None)


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text.replace("+", "+ "), 14))
