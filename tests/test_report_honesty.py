"""What a strict reader asks of a page: what is unfinished, what is missing and why, whose mark is whose, how sure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scipy.stats import pearsonr, spearmanr
from synthetic_runs import write_run

from sphere_rl.correlations import correlation, correlation_interval
from sphere_rl.report import appearance, axes, figures, page, panels
from sphere_rl.report.content import SuiteContent
from sphere_rl.report.curves import Curve
from sphere_rl.results import load_results
from sphere_rl.statistics import Estimate

ROOT = Path(__file__).parents[1]
MANY = [f"method{i:02d}" for i in range(16)]


def test_long_labels_leave_out_what_the_preset_has(tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "raw": {}, "clip": {"normalize_observations": True, "observation_clip": 3.0},
        "stop": {"normalize_observations": True, "observation_clip": 3.0, "target_kl": 0.03},
    }  # fmt: skip
    for name, settings in changes.items():
        write_run(tmp_path / name, ["Pendulum-v1"], protocol="rl", **settings)
    suite = SuiteContent("gym", load_results(tmp_path))
    clip = "none normalize_observations=True observation_clip=3"
    assert suite.labels == ["none", clip, "none target_kl=0.03 normalize_observations=True observation_clip=3"]
    full = {row["label"]: row["method"] for row in suite.rows}
    assert full["none"] == "none target_kl=0 normalize_observations=False observation_clip=10"  # tables keep all of it
    assert suite.shortened
    write_run(tmp_path / "two" / "a", ["Pendulum-v1"], gamma=0.9)
    write_run(tmp_path / "two" / "b", ["Pendulum-v1"], gamma=0.99)
    few = SuiteContent("gym", load_results(tmp_path / "two"))
    assert few.labels == ["none gamma=0.9", "none gamma=0.99"]
    assert not few.shortened


def test_unfinished_runs_are_named_at_the_top(tmp_path: Path) -> None:
    write_run(tmp_path / "r" / "whole", ["Pendulum-v1"])
    write_run(tmp_path / "r" / "broken", ["Pendulum-v1"], seed=1, error="disk full")
    html = page.make_page(load_results(tmp_path / "r"), tmp_path / "p").path.read_text()
    notice = html[html.index("<b>Not finished</b>") : html.index("Headline numbers")]
    assert "broken (failed, 1 of 1 tasks, 320 of 320 steps)" in notice
    assert "whole" not in notice
    write_run(tmp_path / "q" / "whole", ["Pendulum-v1"])
    assert "Not finished" not in page.make_page(load_results(tmp_path / "q"), tmp_path / "p2").path.read_text()


def test_published_runs_have_one_reason_for_all_that_needs_policies() -> None:
    suite = SuiteContent("cw10", load_results(ROOT / "docs" / "results" / "silent"))
    assert suite.absences == {"its policies are not published": suite.labels}
    missing = {panel.figure: panel.missing for panel in suite.panels}
    assert missing["spectrum"] == missing["features"] == "its policies are not published"
    (success,) = [panel for panel in suite.panels if panel.figure == "success"]
    assert "Missing: RL of every method. " in success.caption
    assert {trace["protocol"] for trace in success.choices[""] if trace["palette"] is None} == {"crl"}


def test_no_two_methods_look_alike() -> None:
    """Also where there are more of them than colours: 16 methods on the page and in files."""
    rows = [{"label": name, "task": "t", "global_step": 1, "r_e_A": 1.0, "r_e_K": 2.0} for name in reversed(MANY)]
    table = pl.DataFrame(rows)
    traces = panels.scatter(table, MANY)
    assert [trace["name"] for trace in traces] == MANY  # in the page's order, whatever comes first in the table
    assert len({(trace["palette"] % 8, trace["marker"]["symbol"]) for trace in traces}) == len(MANY)
    drawn: Any = figures.proxy_scatter(table, "", "label", MANY).axes[0].collections
    looks = {(tuple(dots.get_facecolor()[0]), dots.get_paths()[0].vertices.tobytes()) for dots in drawn}
    assert len(looks) == len(MANY)
    curves = [Curve(name, [1, 2], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], 1) for name in MANY]
    shown = [trace for trace in panels.lines(curves, MANY) if not trace.get("band")]
    assert len({(t["palette"] % 8, t["line"]["dash"], t["marker"]["symbol"]) for t in shown}) == len(MANY)
    assert appearance.symbol(3, "abcdefgh") == "d"


def test_runs_of_different_length_have_one_axis_of_steps() -> None:
    load = np.full((2, 3), 0.5)
    figure = figures.routing({"long": ([10, 40], load), "short": ([5, 10], load)}, "", {0.0: "a", 20.0: "b", 80.0: "c"})
    drawn = [one for one in figure.axes if one.get_title(loc="left")]
    assert [one.get_xlim() for one in drawn] == [(0, 40), (0, 40)]
    assert [len(one.lines) for one in drawn] == [2, 2]  # a task that none has begun is not marked


def test_shares_and_options_have_scales_that_can_be_read() -> None:
    flat = Curve("none", [0.0, 0.5], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], 1)
    figure = figures.line_plot([flat], {}, "", "share of (seed, task)")
    assert figure.axes[0].get_ylim() == pytest.approx((-0.02, 1.05))
    swept = figures.option_sweep(
        {rho: {"rl": None, "crl": Estimate(0.5, None, None, 1)} for rho in (0.03, 0.1, 0.3)}, "ρ", ""
    )
    assert [tick.get_text() for tick in swept.axes[0].get_xticklabels()] == ["0.03", "0.1", "0.3"]
    assert axes.wrapped("literal_grad_001") == "literal_grad_\n001"
    assert axes.wrapped("sphere+layernorm", 20) == "sphere+layernorm"


def test_a_column_of_numbers_has_one_form_and_many_bands_are_thin(tmp_path: Path) -> None:
    """Returns of the first task are above 100, those of the second are not: neither has decimals."""
    write_run(tmp_path / "r" / "a", ["Pendulum-v1", "CartPole-v1"], protocol="crl")
    path = tmp_path / "r" / "a" / "eval.jsonl"
    path.write_text(path.read_text().replace('"mean_return": 10.0', '"mean_return": 410.4', 1))
    html = page.make_page(load_results(tmp_path / "r"), tmp_path / "p").path.read_text()
    returns = re.findall(r'data-column="mean_return" data-label="Return"><b>([^<]*)</b>', html)
    assert returns == ["410", "10"]
    assert appearance.veil(2) == 0.15
    assert appearance.veil(12) == pytest.approx(0.05)


def test_interval_of_a_correlation_draws_runs() -> None:
    """Against draws one by one; lines of one run that repeat each other make it no narrower."""
    generator = np.random.default_rng(3)
    run = np.repeat(np.arange(6), [3, 4, 5, 4, 3, 5])
    x, y = (generator.normal(size=6)[run] + 0.1 * generator.normal(size=run.size).round(1) for _ in range(2))
    x[4:8] = x[4]  # ties
    for ranks, function in ((False, pearsonr), (True, spearmanr)):
        found = correlation_interval(x, y, run.tolist(), ranks=ranks, seed=1)
        draws: list[float] = []
        for times in np.random.default_rng(1).multinomial(6, np.full(6, 1 / 6), 2000):
            chosen = np.concatenate([np.flatnonzero(run == one) for one in range(6) for _ in range(times[one])])
            if len({*run[chosen]}) > 1:
                draws.append(float(function(x[chosen], y[chosen]).statistic))  # type: ignore[attr-defined]
        assert found == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.01)
    assert correlation_interval(x, y, [0] * run.size) == (None, None)
    table = pl.DataFrame({"run": run, "r_e_A": x, "r_e_K": y})
    twice = pl.concat([table, table])
    assert correlation(twice)["low"] == pytest.approx(correlation(table)["low"])
    assert correlation(table.filter(pl.col("run") == table["run"][0]))["low"] is None  # one run says nothing of others
    assert correlation(table.drop("run"))["low"] == pytest.approx(pearsonr(x, y).confidence_interval().low)  # type: ignore[attr-defined]
