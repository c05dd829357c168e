"""The page itself: content of every suite, laid out by a template with style, script and Plotly inside."""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl

from sphere_rl.errors import RunFolderError
from sphere_rl.report import drawings, reproduction, tables
from sphere_rl.report.content import SuiteContent
from sphere_rl.report.geometry import Snapshot
from sphere_rl.report.suite import arms
from sphere_rl.report.table_files import DIFFERENCES, NUMBERS, write_tables
from sphere_rl.results import Results
from sphere_rl.runs import file_name, make_folder, read_sweep, write_atomic
from sphere_rl.spectrum.vanishing import notices
from sphere_rl.statistics import Estimate

FIGURES = {
    "geometry": "Figure 1, geometry",
    "architectures": "Figure 2, architectures",
    "rank": "Figure 3, rₑ(K)",
    "success": "Figures 4 and 5, success",
    "features": "Figure 6, features",
    "proxy": "Figure 7, proxy",
    "learning": "Learning curves",
    "spectrum": "Spectrum",
    "routing": "Routing",
    "profile": "Performance profiles",
    "foresight": "Rank at a task's start",
    "ablation": "Ablation",
    "rho": "ρ",
}
"""Figures for papers: file name and what it is."""
MISSING = "–"
"""A cell without a number."""


@dataclass(frozen=True)
class Page:
    """A written page, and the runs that it leaves out, wholly or with their policies, with the reason."""

    path: Path
    left_out: Mapping[str, str]


def make_page(results: Results, out: Path, refresh: int | None = None) -> Page:
    """Write ``index.html``, ``figures/`` and ``tables/`` below ``out``.

    The page is one file without links to the network. Figures of an earlier page there, of parts that are no more, are
    taken away. With ``refresh`` it reloads itself after that many seconds, and
    figures that are there already are left for the call without it.
    """
    suites = content_of(results)
    make_folder(out)
    if refresh is None or not (out / "figures").is_dir():  # while runs go on, the page alone is made anew
        make_folder(out / "figures")
        drawings.write(suites, out / "figures")
    write_tables(suites, results, out / "tables")
    page = out / "index.html"
    drawings.take_away_others(page, suites, FIGURES, out / "figures")
    write_atomic(page, render(suites, results, refresh, out / "figures").encode())
    return Page(page, left_out(suites, results))


def content_of(results: Results) -> list[SuiteContent]:
    """What there is to show of each suite and task sequence."""
    known = arms(results)
    return [SuiteContent(name, part, known) for name, part in results.by_sequence().items()]


def make_tables(results: Results, out: Path, formats: Sequence[str]) -> Page:
    """Write only ``tables/`` below ``out``, in these formats; no policy is read for them."""
    write_tables(content_of(results), results, out / "tables", formats)
    return Page(out / "tables", dict(results.broken.iter_rows()))


def left_out(suites: Sequence[SuiteContent], results: Results) -> dict[str, str]:
    """What cannot be read, by run, with the reason: whole runs, and policies of runs that are shown otherwise."""
    found = dict(results.broken.iter_rows())
    for suite in suites:
        _ = suite.snapshots  # reads the policies
        found |= suite.unreadable
    try:
        read_sweep(results.root)
    except RunFolderError as error:
        found["sweep.json"] = str(error)
    return found


def render(suites: Sequence[SuiteContent], results: Results, refresh: int | None, figures: Path) -> str:
    """The page's HTML; it links to the files that are in the folder ``figures``."""
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    parts = files("sphere_rl.report")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((parts / "page.html.j2").read_text(encoding="utf-8"))
    views: list[dict[str, Any]] = [_view(suite) | {"figures": _figures(suite, figures)} for suite in suites]
    data = {
        "panels": {panel["id"]: panel for view in views for panel in view["panels"]},
        "geometry": {view["name"]: view["geometry"] for view in views},
        "methods": {suite.name: _methods(suite) for suite in suites},
        "refresh": refresh,
    }
    scripts = {"theme": THEME, "plotly": get_plotlyjs(), "script": (parts / "page.js").read_text(encoding="utf-8")}
    return template.render(
        **scripts,
        policy=policy(scripts.values()),
        style=(parts / "page.css").read_text(encoding="utf-8"),
        data=_json(data),
        suites=views,
        runs=[_run(row, results) for row in results.runs.iter_rows(named=True)],
        planned=planned(results),
        left_out=left_out(suites, results),
        commands=reproduction.commands(results),
        configs=_configs(results),
        commits=sorted(set(results.runs["commit"].drop_nulls())),
        columns=tables.COLUMNS,
        paper={name: title.partition(",")[0] for name, title in FIGURES.items() if title.startswith("Figure")},
        refresh=refresh,
    )


THEME = """
try { document.documentElement.dataset.theme = localStorage.getItem("theme") || "" }
catch (error) { document.documentElement.dataset.theme = "" }
"""
"""Before anything is drawn."""


def policy(scripts: Iterable[str]) -> str:
    """The page's content-security policy: these scripts run, no others, and nothing comes from the network.

    Whatever a run's names hold, the browser does not take it for a script, should it ever get past the escaping.
    """
    hashes = " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _view(suite: SuiteContent) -> dict[str, Any]:
    """What the template shows of a suite."""
    numbers, differences = _held(NUMBERS, suite.rows), _held(DIFFERENCES, suite.differences)
    large = {name for name in tables.COLUMNS for row in suite.by_task if row[name] and abs(row[name].value) >= 100}
    return {
        "name": suite.name,
        "file": file_name(suite.name),
        "suite": suite.suite,
        "facts": suite.facts(),
        "score": suite.score_name,
        "tasks": suite.tasks,
        "rows": [row | {"cells": {name: _cell(row[name]) for name in numbers}} for row in suite.rows],
        "numbers": numbers,
        "absent": [title for name, title in NUMBERS.items() if name not in numbers],
        "cards": _cards(suite),
        "differences": [
            row | {"cells": {name: _cell(row[name], name != "improvement") for name in differences}}
            for row in suite.differences
        ],
        "difference_titles": differences,
        "by_task": [
            row | {"cells": {name: _cell(row[name], large=name in large) for name in tables.COLUMNS}}
            for row in suite.by_task
        ],
        "panels": [asdict(panel) for panel in suite.panels],
        "ablation": suite.ablation(),
        "geometry": {label: _ellipsoids(row) for label, row in suite.snapshots.items()},
        "geometry_caption": suite.geometry_caption(),
        "warnings": {
            run["run"]: texts for run in suite.runs.iter_rows(named=True) if (texts := _warnings(run, suite.results))
        },
        "absences": suite.absences,
        "unfinished": suite.unfinished,
        "shortened": suite.shortened,
    }


def _held(titles: dict[str, str], rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The columns of a table in which some row has a number; all of them where none has any."""
    held = {name: title for name, title in titles.items() if any(row[name] is not None for row in rows)}
    return held or titles


def _figures(suite: SuiteContent, folder: Path) -> dict[str, str]:
    """Figures for papers that are there, and what they are."""
    return {
        name: title for name, title in FIGURES.items() if drawings.written(folder / f"{file_name(suite.name)}-{name}")
    }


def _methods(suite: SuiteContent) -> dict[str, Any]:
    """Colours of a suite's methods, and which of them the 3-D view shows first: plain PPO beside SPHERE."""
    return {"order": suite.order, "pair": [row and row["label"] for row in suite.pair]}


def _cards(suite: SuiteContent) -> list[dict[str, str]]:
    """The numbers at the top: plain PPO and SPHERE under the same actor in CRL, with differences and ranks.

    None where the runs give none of them.
    """
    plain, ours = (row or {} for row in suite.pair)
    gained = next((row for row in suite.differences if row["label"] == ours.get("label")), {})
    score = suite.score_name
    names = plain.get("label", "plain PPO"), ours.get("label", "SPHERE")
    pair, gap = f"{names[1]} − {names[0]}", _cell(gained.get("gap"), signed=True)
    cards = [
        {"title": f"CRL {score.lower()}", "who": names[0]} | _cell(plain.get("crl")),
        {"title": f"CRL {score.lower()}", "who": names[1]} | _cell(ours.get("crl")),
        {"title": "Difference in CRL", "who": pair} | _cell(gained.get("crl"), signed=True),
        *([{"title": "Difference of the RL − CRL gap", "who": pair} | gap] if gap["value"] != MISSING else []),
        {"title": "CRL rₑ(K)", "who": names[0]} | _cell(plain.get("r_e_K")),
        {"title": "CRL rₑ(K)", "who": names[1]} | _cell(ours.get("r_e_K")),
    ]
    return cards if any(card["value"] != MISSING for card in cards) else []


def _cell(found: Estimate | None, signed: bool = False, large: bool = False) -> dict[str, str]:
    """An estimate as text: value, interval, seeds; differences with their sign. ``large``: without decimals."""
    if found is None:
        return {"value": MISSING, "interval": "missing", "seeds": ""}
    form = f"{'+' if signed else ''}z.{0 if large or abs(found.value) >= 100 else 2}f"
    value, *bounds = (
        "" if number is None else format(number, form).replace("-", "−")
        for number in (found.value, found.low, found.high)
    )
    return {"value": value, "interval": " to ".join(bounds) if bounds[0] else "one seed", "seeds": str(found.seeds)}


def _ellipsoids(snapshots: Sequence[Snapshot]) -> list[dict[str, Any] | None]:
    """The policy at each task's end, by place in the sequence; ``None`` where there is none."""
    known = {snapshot.task_index: _ellipsoid(snapshot) for snapshot in snapshots}
    return [known.get(place) for place in range(max(known) + 1)]


def _ellipsoid(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "task": snapshot.task,
        "semi_axes": snapshot.semi_axes.tolist(),
        "rank": snapshot.kernel_rank,
        "drawn_rank": snapshot.drawn_rank,
        "largest": float(snapshot.kernel_eigenvalues[0]),
        "share": snapshot.top_share,
    }


def _run(row: dict[str, Any], results: Results) -> dict[str, Any]:
    total = row["steps_per_task"] * row["num_tasks"]
    return row | {"progress": row["global_step"] / total if total else 0.0, "warnings": _warnings(row, results)}


def _warnings(run: dict[str, Any], results: Results) -> list[str]:
    """What its spectrum lines have to tell of a run."""
    lines = results.spectra.filter(pl.col("run") == run["run"]).iter_rows(named=True)
    return notices(lines, fresh=run["protocol"] == "rl")


def planned(results: Results) -> list[str]:
    """Runs that a sweep has planned and not begun."""
    begun = {*results.runs["run"], *results.broken["run"]}
    return [name for name in reproduction.sweep(results).get("runs", ()) if name not in begun]


def _configs(results: Results) -> dict[str, str]:
    """The whole configuration of one run of each method, as JSON."""
    chosen = results.runs.unique(["suite", "protocol", "actor", "method"], keep="first", maintain_order=True)
    return {
        " · ".join(row[name] for name in ("suite", "protocol", "actor", "method")): json.dumps(
            results.folder(row["run"]).record(), indent=2
        )
        for row in chosen.iter_rows(named=True)
    }


def _json(data: Any) -> str:
    """JSON for a script element: numbers that JSON does not know are null, and nothing in it looks like a tag."""
    return json.dumps(_plain(data), allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    return data
