"""The page's interactive figures: tables to Plotly traces as plain data, which a script of the page draws.

A panel has one or more choices (a metric, a task, a run), each with its traces. A panel without data says what is
missing. Colours are indices into the page's palette, so that both themes have their own: a method's place in ``order``,
the same in every figure. ``protocol`` says how a trace is filled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from sphere_rl.report.appearance import index, shade, symbol, veil
from sphere_rl.report.curves import Curve, grouped
from sphere_rl.report.geometry import Snapshot
from sphere_rl.statistics import Estimate

DASHES = ("solid", "dash", "dashdot", "dot", "longdash")
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")
PROTOCOLS = ("rl", "crl")
SHOWN_EIGENVALUES = 64
TITLES = {"r_e_K": "Effective rank of the eNTK, rₑ(K)", "r_e_A": "Effective rank of the features, rₑ(A)"}
"""Headings of the metrics that have one; the others go by their name."""
AXES = {"r_e_K": "rₑ(K)", "r_e_A": "rₑ(A)"}
"""Metrics at an axis; the others go by their name."""


@dataclass(frozen=True)
class Panel:
    """One figure of the page: ``choices`` maps what the reader picks to Plotly traces; ``figure`` names its files."""

    id: str
    title: str
    caption: str
    figure: str
    choices: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    choose: str = ""
    """What is picked, such as "metric"; empty for a single choice."""
    layout: Mapping[str, Any] = field(default_factory=dict)
    missing: str = ""
    """Why there is nothing to draw; empty where there is."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """Headings of the choices that have one of their own; ``title`` of the others."""
    chosen_axis: str = ""
    """Axis whose title is the choice, such as "yaxis"."""
    names: Mapping[str, str] = field(default_factory=dict)
    """What that axis says for a choice, where it is not the choice itself."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """What a choice shows, such as a metric's definition."""


def bars(rows: Sequence[Mapping[str, Any]], labels: Sequence[str], order: Sequence[str]) -> list[dict[str, Any]]:
    """RL and CRL bars with 95 % intervals, each of its method's colour; a bar that the runs do not give yet is null.

    What the paper prints is a diamond on its bar. The legend is of two grey bars without a value, since no method's
    colour stands for a protocol.
    """
    colors = [index(row["label"], i, order) for i, row in enumerate(rows)]
    drawn = [
        {
            "type": "bar", "name": protocol.upper(), "protocol": protocol, "offsetgroup": protocol, "showlegend": False,
            "x": list(labels), "y": [row[protocol] and row[protocol].value for row in rows],
            "error_y": _error_bars([row[protocol] for row in rows]), "palette": colors,
            "customdata": [row[protocol].seeds if row[protocol] else None for row in rows],
            "hovertemplate": "%{x}<br>" + protocol.upper() + " %{y:.3f}<br>%{customdata} seed(s)<extra></extra>",
        }
        for protocol in PROTOCOLS
    ]  # fmt: skip
    legend = [
        {"type": "bar", "name": protocol.upper(), "protocol": protocol, "offsetgroup": protocol, "x": [labels[0]],
         "y": [None], "palette": None, "hoverinfo": "skip"}
        for protocol in PROTOCOLS
        if any(row[protocol] for row in rows)
    ]  # fmt: skip
    paper = [
        {
            "type": "scatter", "mode": "markers", "name": "the paper's", "showlegend": protocol == "crl",
            "legendgroup": "paper", "offsetgroup": protocol, "x": list(labels), "palette": None,
            "y": [row["paper"] and row["paper"][i] for row in rows], "outlined": True,
            "marker": {"symbol": "diamond", "size": 10, "line": {"width": 1.5}},
            "hovertemplate": "%{x}<br>" + protocol.upper() + " %{y:.2f}<br>printed in the paper<extra></extra>",
        }
        for i, protocol in enumerate(PROTOCOLS)
        if any(row["paper"] for row in rows)
    ]  # fmt: skip
    return drawn + legend + paper


def lines(curves: Sequence[Curve], order: Sequence[str]) -> list[dict[str, Any]]:
    """A line and a band (the range of the seeds) for each curve, in one legend entry; both break where it does."""
    traces: list[dict[str, Any]] = []
    for i, curve in enumerate(curves):
        place = index(curve.label, i, order)
        shared = {"type": "scatter", "legendgroup": curve.label, "name": curve.label, "palette": place}
        band = {"fill": "toself", "mode": "none", "hoverinfo": "skip", "showlegend": False, "band": veil(len(curves))}
        traces.append(shared | _band(curve) | band)
        style = {"line": {"dash": DASHES[place % len(DASHES)], "width": 2.2}}
        style["marker"] = {"size": 6, "symbol": symbol(place, SYMBOLS)}
        text: dict[str, Any] = {"customdata": list(curve.seeds_at) or [curve.seeds] * len(curve.x)}
        text["hovertemplate"] = f"{curve.label} · %{{y:.3f}} · %{{customdata}} seed(s)<extra></extra>"
        mode = "lines+markers" if len(curve.x) <= 40 or curve.alone else "lines"
        traces.append(shared | style | text | {"x": list(curve.x), "y": list(curve.mean), "mode": mode})
    return traces


def _band(curve: Curve) -> dict[str, list[Any]]:
    """Outline of the range of the seeds, a closed piece for each unbroken part of the curve."""
    outline: dict[str, list[Any]] = {"x": [], "y": []}
    breaks = [i for i, x in enumerate(curve.x) if x is None]
    for start, end in zip([0, *(i + 1 for i in breaks)], [*breaks, len(curve.x)], strict=True):
        x, low, high = (list(values[start:end]) for values in (curve.x, curve.low, curve.high))
        gap = [None] if start else []
        outline["x"] += [*gap, *x, *x[::-1]]
        outline["y"] += [*gap, *high, *low[::-1]]
    return outline


def boundaries(starts: Mapping[float, str], steps: int) -> dict[str, Any]:
    """A layout with a dotted line where each task begins, and its name above its ``steps``."""
    if not starts:
        return {}
    shapes = [
        {"type": "line", "xref": "x", "yref": "paper", "x0": x, "x1": x, "y0": 0, "y1": 1,
         "line": {"dash": "dot", "width": 1}}
        for x in starts
    ]  # fmt: skip
    names = [
        {"xref": "x", "yref": "paper", "x": x + steps / 2, "y": 1, "text": task, "showarrow": False,
         "textangle": -24 if len(starts) > 3 else 0, "yanchor": "bottom", "xanchor": "center"}
        for x, task in starts.items()
    ]  # fmt: skip
    margin = {"t": 70 if len(starts) > 3 else 30}
    return {"shapes": shapes, "annotations": names, "margin": margin, "hovermode": "x unified",
            "xaxis": {"range": [0, (max(starts) + steps) * 1.01]}}  # fmt: skip


def spectra(snapshots: Mapping[str, Sequence[Snapshot]], order: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """For each task λ_i/tr K by index i, a line a method."""
    choices: dict[str, list[dict[str, Any]]] = {}
    for place, (method, row) in enumerate(snapshots.items()):
        i = index(method, place, order)
        for snapshot in row:
            total = max(float(snapshot.kernel_eigenvalues.sum()), 1e-300)
            values = snapshot.kernel_eigenvalues[:SHOWN_EIGENVALUES] / total
            positive = [float(value) if value > 0 else None for value in values]
            trace = {
                "type": "scatter", "mode": "lines", "palette": i,
                "name": f"{method} (rₑ = {snapshot.kernel_rank:.1f})",
                "x": list(range(1, len(values) + 1)), "y": positive,
                "line": {"dash": DASHES[i % len(DASHES)], "width": 2.2},
                "hovertemplate": f"{method} · λ<sub>%{{x}}</sub>/tr K = %{{y:.3g}}<extra></extra>",
            }  # fmt: skip
            choices.setdefault(f"{snapshot.task_index + 1}. {snapshot.task}", []).append(trace)
    return choices


def routing(loads: Mapping[str, tuple[Sequence[int | float], np.ndarray]]) -> dict[str, list[dict[str, Any]]]:
    """For each method a heat map of the share of probe states by expert and environment step.

    ``x``: edges of the columns; each reaches from the measurement before to its own.
    """
    return {
        label: [
            {
                "type": "heatmap", "x": [0, *steps], "y": [f"expert {e}" for e in range(load.shape[1])],
                "z": load.T.tolist(), "zmin": 0, "zmax": 1, "colorscale": "Cividis", "colorbar": {"title": "share"},
                "customdata": [list(steps)] * load.shape[1],
                "hovertemplate": "step %{customdata:,}<br>%{y}: %{z:.2f} of the states<extra></extra>",
            }
        ]
        for label, (steps, load) in loads.items()
    }  # fmt: skip


def embeddings(
    panels: Mapping[str, Sequence[tuple[str, np.ndarray, np.ndarray]]], names: Sequence[str], order: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """For each method and task the embedded states in the method's colour, lighter by dominant singular direction."""
    choices: dict[str, list[dict[str, Any]]] = {}
    for place, (method, row) in enumerate(panels.items()):
        for task, points, direction in row:
            choices[f"{method}, after {task}"] = [
                {
                    "type": "scatter", "mode": "markers", "name": names[one], "palette": index(method, place, order),
                    "shade": shade(int(one), len(names)),
                    "x": points[direction == one, 0].tolist(), "y": points[direction == one, 1].tolist(),
                    "marker": {"size": 6, "symbol": SYMBOLS[one], "opacity": 0.9},
                    "hovertemplate": f"{names[one]}<extra></extra>",
                }
                for one in np.unique(direction)
            ]  # fmt: skip
    return choices


def scatter(table: pl.DataFrame, order: Sequence[str]) -> list[dict[str, Any]]:
    """r_e(A) against r_e(K), a colour and a symbol a method; hover names task and step."""
    text = pl.format("{}, step {}", "task", pl.col("global_step").map_elements("{:,}".format, return_dtype=pl.String))
    return _points(table.with_columns(text=text), "r_e_A", "r_e_K", order, {"size": 6, "opacity": 0.7},
                   "rₑ(A) %{x:.2f} · rₑ(K) %{y:.2f}")  # fmt: skip


def entries(table: pl.DataFrame, metric: str, order: Sequence[str]) -> list[dict[str, Any]]:
    """A metric as agents enter their tasks against the score at the end, a colour and a symbol a method."""
    text = pl.format("{}: {}. {}", "run", pl.col("place") + 1, "task")
    return _points(table.with_columns(text=text), metric, "score", order, {"size": 8, "opacity": 0.8},
                   metric + " %{x:.3g}, then %{y:.2f}")  # fmt: skip


def _points(
    table: pl.DataFrame, x: str, y: str, order: Sequence[str], marker: Mapping[str, Any], numbers: str
) -> list[dict[str, Any]]:
    """Points of a table, a colour and a symbol a label; hover shows their ``text`` and these numbers."""
    traces = []
    for label, i, group in grouped(table, "label", order):
        traces.append({
            "type": "scatter", "mode": "markers", "name": label, "x": group[x].to_list(), "y": group[y].to_list(),
            "palette": i, "marker": {**marker, "symbol": symbol(i, SYMBOLS)}, "text": group["text"].to_list(),
            "hovertemplate": f"%{{text}}<br>{numbers}<extra></extra>",
        })  # fmt: skip
    return traces


def option_lines(points: Mapping[float, Mapping[str, Any]], order: Sequence[str]) -> list[dict[str, Any]]:
    """Success against the values of an option with 95 % intervals: RL dashed with open markers, CRL full.

    Each point has its method's colour, the line between methods none.
    """
    ordered = sorted(points.items())
    colors = [index(row["label"], i, order) for i, (_, row) in enumerate(ordered)]
    return [
        {
            "type": "scatter", "mode": "lines+markers", "name": protocol.upper(), "protocol": protocol,
            "x": [x for x, _ in ordered], "y": [row[protocol].value if row[protocol] else None for _, row in ordered],
            "palette": colors, "error_y": _error_bars([row[protocol] for _, row in ordered]),
            "line": {"dash": ("dash", "solid")[i]}, "marker": {"size": 9, "symbol": ("circle-open", "circle")[i]},
            "hovertemplate": "ρ = %{x}: " + protocol.upper() + " %{y:.3f}<extra></extra>",
        }
        for i, protocol in enumerate(PROTOCOLS)
        if any(row[protocol] for row in points.values())
    ]  # fmt: skip


def _error_bars(found: Sequence[Estimate | None]) -> dict[str, Any]:
    known = [f if f is not None and f.low is not None and f.high is not None else None for f in found]
    return {
        "type": "data", "symmetric": False, "thickness": 1.4,
        "array": [f.high - f.value if f and f.high is not None else None for f in known],
        "arrayminus": [f.value - f.low if f and f.low is not None else None for f in known],
    }  # fmt: skip
