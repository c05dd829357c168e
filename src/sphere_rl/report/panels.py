"""The page's interactive figures: tables to Plotly traces as plain data, which a script of the page draws.

A panel has one or more choices (a metric, a task, a run), each with its traces. A panel without data says what is
missing. Colours are indices into the page's palette, so that both themes have their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from sphere_rl.figures import Curve
from sphere_rl.geometry import Snapshot
from sphere_rl.statistics import Estimate

DASHES = ("solid", "dash", "dashdot", "dot", "longdash")
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")
PATTERNS = ("", "/", ".", "x", "\\", "+", "-", "|")
SHOWN_EIGENVALUES = 64


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


def bars(rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[dict[str, Any]]:
    """RL and CRL bars with 95 % intervals; a bar that the runs do not give yet is null."""
    return [
        {
            "type": "bar",
            "name": protocol.upper(),
            "x": list(labels),
            "y": [row[protocol] and row[protocol].value for row in rows],
            "error_y": _error_bars([row[protocol] for row in rows]),
            "customdata": [row[protocol].seeds if row[protocol] else None for row in rows],
            "hovertemplate": "%{x}<br>" + protocol.upper() + " %{y:.3f}<br>%{customdata} seed(s)<extra></extra>",
            "marker": {"pattern": {"shape": PATTERNS[i], "solidity": 0.25}},
            "palette": i,
        }
        for i, protocol in enumerate(("rl", "crl"))
    ]


def lines(curves: Sequence[Curve], hover: str = "%{y:.3f}") -> list[dict[str, Any]]:
    """A line and a band (the range of the seeds) for each curve, in one legend entry."""
    traces: list[dict[str, Any]] = []
    for i, curve in enumerate(curves):
        x = list(curve.x)
        band = {"x": x + x[::-1], "y": [*curve.high, *list(curve.low)[::-1]], "fill": "toself", "mode": "none"}
        shared = {"type": "scatter", "legendgroup": curve.label, "name": curve.label, "palette": i}
        traces.append(shared | band | {"hoverinfo": "skip", "showlegend": False, "band": True})
        style = {"line": {"dash": DASHES[i % len(DASHES)], "width": 2.2}, "marker": {"size": 6}}
        style["marker"]["symbol"] = SYMBOLS[i % len(SYMBOLS)]
        text = {"hovertemplate": f"{curve.label} · {hover} · {curve.seeds} seed(s)<extra></extra>"}
        mode = "lines+markers" if len(x) <= 40 else "lines"
        traces.append(shared | style | text | {"x": x, "y": list(curve.mean), "mode": mode})
    return traces


def boundaries(starts: Mapping[float, str], steps: int) -> dict[str, Any]:
    """A layout with a dotted line where each task begins, and its name above its ``steps``."""
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


def spectra(snapshots: Mapping[str, Sequence[Snapshot]]) -> dict[str, list[dict[str, Any]]]:
    """For each task λ_i/tr K by index i, a line a method."""
    choices: dict[str, list[dict[str, Any]]] = {}
    for i, (method, row) in enumerate(snapshots.items()):
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
    """For each method a heat map of the share of probe states by expert and environment step."""
    return {
        label: [
            {
                "type": "heatmap", "x": list(steps), "y": [f"expert {e}" for e in range(load.shape[1])],
                "z": load.T.tolist(), "zmin": 0, "zmax": 1, "colorscale": "Cividis", "colorbar": {"title": "share"},
                "hovertemplate": "step %{x:,}<br>%{y}: %{z:.2f} of the states<extra></extra>",
            }
        ]
        for label, (steps, load) in loads.items()
    }  # fmt: skip


def embeddings(panels: Mapping[str, Sequence[tuple[str, np.ndarray, np.ndarray]]], names: Sequence[str]) -> dict:
    """For each method and task the embedded states, coloured by their dominant singular direction."""
    choices: dict[str, list[dict[str, Any]]] = {}
    for method, row in panels.items():
        for i, (task, points, direction) in enumerate(row):
            choices[f"{method}, after {i + 1}. {task}"] = [
                {
                    "type": "scatter", "mode": "markers", "name": names[index], "palette": int(index),
                    "x": points[direction == index, 0].tolist(), "y": points[direction == index, 1].tolist(),
                    "marker": {"size": 6, "symbol": SYMBOLS[index], "opacity": 0.8},
                    "hovertemplate": f"{names[index]}<extra></extra>",
                }
                for index in np.unique(direction)
            ]  # fmt: skip
    return choices


def scatter(table: pl.DataFrame) -> list[dict[str, Any]]:
    """r_e(A) against r_e(K), a colour and a symbol a method; hover names task and step."""
    return [
        {
            "type": "scatter", "mode": "markers", "name": str(key[0]), "x": group["r_e_A"].to_list(),
            "y": group["r_e_K"].to_list(), "palette": i,
            "marker": {"size": 6, "opacity": 0.7, "symbol": SYMBOLS[i % len(SYMBOLS)]},
            "text": [f"{task}, step {step:,}" for task, step in group.select("task", "global_step").iter_rows()],
            "hovertemplate": "%{text}<br>rₑ(A) %{x:.2f} · rₑ(K) %{y:.2f}<extra></extra>",
        }
        for i, (key, group) in enumerate(table.group_by("method", maintain_order=True))
    ]  # fmt: skip


def option_lines(points: Mapping[float, Mapping[str, Estimate | None]]) -> list[dict[str, Any]]:
    """Success against the values of an option, RL and CRL, with 95 % intervals."""
    ordered = sorted(points.items())
    return [
        {
            "type": "scatter", "mode": "lines+markers", "name": protocol.upper(), "x": [x for x, _ in ordered],
            "y": [row[protocol].value if row[protocol] else None for _, row in ordered], "palette": i,  # type: ignore[union-attr]
            "error_y": _error_bars([row[protocol] for _, row in ordered]), "line": {"dash": DASHES[i]},
        }
        for i, protocol in enumerate(("rl", "crl"))
    ]  # fmt: skip


def _error_bars(found: Sequence[Estimate | None]) -> dict[str, Any]:
    known = [f if f is not None and f.low is not None and f.high is not None else None for f in found]
    return {
        "type": "data", "symmetric": False, "thickness": 1.4,
        "array": [f.high - f.value if f and f.high is not None else None for f in known],
        "arrayminus": [f.value - f.low if f and f.low is not None else None for f in known],
    }  # fmt: skip
